"""Int8 weights under FSDP2: the bits of one process, checkpoints, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pairs import mesh, shard, some
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import insitu
from insitu.optim.quantized import Int8Weight


def model(dtype: torch.dtype = torch.float32, group_size: int | None = 4, seed: int = 7) -> nn.Module:
    """Tall, wide and square, with rows that 2 and 4 divide and columns that groups of 4 do not."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 8), nn.Linear(8, 8), nn.LayerNorm(8)).to(dtype)
    insitu.quantize(made, group_size=group_size)
    return made


def optimizer(of: nn.Module, **options: Any) -> torch.optim.Optimizer:
    options = {"lr": 1e-2, "rank": 3, "refresh": 3, "weight_decay": 0.01, **options}
    return insitu.APOLLO(insitu.param_groups(of), **options)


def give_gradients(of: nn.Module, step: int) -> None:
    for i, p in enumerate(of.parameters()):
        G = some(tuple(p.shape), i, step).to(p.dtype)
        p.grad = shard(G, p.device_mesh, p.placements) if isinstance(p, DTensor) else G


def stored(of: nn.Module) -> dict[str, Tensor]:
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in of.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = stored(one), stored(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"backend": "reference"}, {"rounding": "nearest"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_ranks(2)
def test_two_ranks_write_the_int8_of_one(options: dict[str, Any], dtype: torch.dtype, world: int) -> None:
    whole, parts = model(dtype), fully_shard(model(dtype), mesh=mesh(world))
    start = stored(whole)
    pairs = [(m, optimizer(m, limiter=None, **options)) for m in (whole, parts)]
    for step in range(4):
        for m, optim in pairs:
            give_gradients(m, step)
            optim.step()
    names = [name for name in start if name.endswith("weight_int8")]
    mine, theirs = stored(whole), stored(parts)
    assert len(names) == 3
    for name in names:
        assert not torch.equal(mine[name], start[name])
        scale = name.replace("int8", "scale")
        if name.startswith("0."):  # channels are rows, so whole ones are here: nothing is summed across ranks but norms
            assert torch.equal(mine[name], theirs[name])
            assert torch.equal(mine[scale], theirs[scale])
        # A sum in another order may carry a number over the edge of its rounding, but by one step and rarely.
        away = (mine[name].int() - theirs[name].int()).abs()
        assert away.max() <= 1 or not torch.equal(mine[scale], theirs[scale])
        assert (away != 0).float().mean() < 0.02


@on_ranks(2)
def test_forward_and_backward_are_those_of_one_process(world: int) -> None:
    whole, parts = model(), model()
    for layer in parts:
        fully_shard(layer, mesh=mesh(world))
    fully_shard(parts, mesh=mesh(world))
    x = some((6, 10), 1)
    for _ in range(2):  # the second all-gather writes to the memory of the first
        outs = []
        for m in (whole, parts):
            m.zero_grad()
            outs.append(m(x))
            (outs[-1] * some((6, 8), 2)).sum().backward()
        torch.testing.assert_close(outs[1], outs[0])
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-5, atol=1e-6)
        for m in (whole, parts):
            optimizer(m, rank=2).step()
    locals_ = [p.to_local() for p in parts.parameters() if p.ndim == 2]
    assert all(isinstance(local, Int8Weight) for local in locals_)
    assert locals_[0].int_data.shape == (20 // world, 10)


@on_ranks(2)
def test_mixed_precision_gathers_int8_and_computes_in_bf16(world: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parts = fully_shard(model(), mesh=mesh(world), mp_policy=policy)
    out = parts(some((6, 10), 1))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {p.grad.dtype for p in parts.parameters()} == {torch.float32}
    reference = model()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(out.float(), reference(some((6, 10), 1)).float(), rtol=0.05, atol=0.05)


@on_ranks(2)
def test_checkpoints_across_ranks_and_from_one_process(world: int, shared_path: Path) -> None:
    parts = fully_shard(model(), mesh=mesh(world))
    dcp.save({"model": get_model_state_dict(parts)}, checkpoint_id=shared_path / "sharded")
    other = fully_shard(model(seed=8), mesh=mesh(world))
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=shared_path / "sharded")
    set_model_state_dict(other, state["model"])
    assert_same(other, parts)

    single = model(seed=9)
    state = {"model": single.state_dict()}
    dcp.load(state, checkpoint_id=shared_path / "sharded")
    single.load_state_dict(state["model"])
    assert_same(single, parts)

    # Whole tensors, as one process saves them, into shards.
    third = fully_shard(model(seed=10), mesh=mesh(world))
    set_model_state_dict(third, single.state_dict(), options=StateDictOptions(full_state_dict=True))
    assert_same(third, parts)
    full = get_model_state_dict(third, options=StateDictOptions(full_state_dict=True))
    for name, value in single.state_dict().items():
        if dist.get_rank() == 0:
            assert torch.equal(full[name], value), name


@pytest.mark.parametrize("as_view", [False, True])
@on_ranks(2)
def test_replicas_under_ddp_keep_the_same_bits(as_view: bool) -> None:
    replica = nn.parallel.DistributedDataParallel(model(), init_sync=False, gradient_as_bucket_view=as_view)
    whole = model()
    optimizers = [optimizer(of, limiter=None) for of in (replica, whole)]
    for step in range(3):
        for of in (replica, whole):
            of.zero_grad()
        replica(some((4, 10), step, dist.get_rank())).square().mean().backward()
        for rank in range(2):
            (whole(some((4, 10), step, rank)).square().mean() / 2).backward()
        for p, q in zip(replica.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        for optim in optimizers:
            optim.step()
    for name, value in replica.module.state_dict().items():
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value)
        assert torch.equal(*both), name


@on_ranks(2)
def test_what_is_refused(world: int) -> None:
    odd = nn.Sequential(nn.Linear(6, 9))
    insitu.quantize(odd)
    with pytest.raises(ValueError, match=r"\(9, 6\).*pieces of 5.*skip="):
        fully_shard(odd, mesh=mesh(world))
    with pytest.raises(ValueError, match="cut into pieces"):
        fully_shard(model(), mesh=mesh(world), shard_placement_fn=lambda p: torch.distributed.tensor.Shard(p.ndim - 1))
    late = fully_shard(nn.Sequential(nn.Linear(6, 8)), mesh=mesh(world))
    with pytest.raises(ValueError, match="quantize before fully_shard"):
        insitu.quantize(late)
    other = fully_shard(model(group_size=5), mesh=mesh(world))
    with pytest.raises(RuntimeError, match="saved with 5 columns to a scale, and the model has 4"):
        fully_shard(model(), mesh=mesh(world)).load_state_dict(other.state_dict())
    with pytest.raises(NotImplementedError, match="is not defined for int8 weights"):
        nn.parallel.DistributedDataParallel(model())
    with pytest.raises(NotImplementedError, match="is not defined for int8 weights"):
        parallelize_module(model(), mesh(world), {"0": ColwiseParallel()})(some((6, 10), 1))
