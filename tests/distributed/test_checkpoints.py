"""State and checkpoints of sharded runs: a resume on as many processes, on more or on fewer, or on one."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pairs import Pair, apollo, assert_part, gradient, mesh, shard, small
from ranks import on_ranks
from tolerances import SHARDED
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

OPTIONS: list[dict[str, Any]] = [
    {},
    {"projection": "svd", "dense": "apollo"},
    {"rounding": "compensated", "moments": "bfloat16", "dense": "sgd"},
]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(model.parameters()):
            G = gradient(p.shape, i, step).to(p.dtype)
            p.grad = shard(G, p.device_mesh, p.placements) if isinstance(p, DTensor) else G
        optimizer.step()


def made(
    on: DeviceMesh | None, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small(dtype)
    if on is not None:
        fully_shard(model, mesh=on)
    return model, apollo(**options)(model)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, **options: bool) -> dict[str, Any]:
    return dict(
        zip(("model", "optimizer"), get_state_dict(model, optimizer, options=StateDictOptions(**options)), strict=True)
    )


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], **options: bool) -> None:
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(**options),
    )


def spoil(model: nn.Module) -> None:
    """So that only what was loaded can make it right."""
    with torch.no_grad():
        for p in model.parameters():
            (p.to_local() if isinstance(p, DTensor) else p).fill_(0.5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@on_ranks(4)
def test_state_has_the_same_keys_everywhere_and_comes_without_a_step(options: dict[str, Any]) -> None:
    model, optimizer = made(mesh(4), torch.bfloat16, **options)
    before = [p.detach().to_local().clone() for p in model.parameters()]
    state_of(model, optimizer)
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    assert all(int(optimizer.state[p]["step"]) == 0 for p in model.parameters())
    kinds = [
        {k: (type(v).__name__, getattr(v, "shape", None)) for k, v in optimizer.state[p].items()}
        for p in model.parameters()
    ]
    said: list[Any] = [None] * 4
    dist.all_gather_object(said, kinds)
    assert said == [kinds] * 4
    train(model, optimizer, range(3))
    fresh, fresh_optimizer = made(mesh(4), torch.bfloat16, **options)
    train(fresh, fresh_optimizer, range(3))
    assert_same(fresh, fresh_optimizer, model, optimizer, 0.0)


def assert_same(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    other: nn.Module,
    other_optimizer: torch.optim.Optimizer,
    tolerance: float,
) -> None:
    """``other`` is as ``model``, which is on one process, or sharded alike."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        mine, theirs = optimizer.state[p], other_optimizer.state[q]
        assert mine.keys() == theirs.keys()
        for key, a, b in [("weight", p.detach(), q.detach()), *((k, mine[k], theirs[k]) for k in mine)]:
            if isinstance(a, torch.Tensor):
                a, b = (x.to_local() if isinstance(a, DTensor) and isinstance(b, DTensor) else x for x in (a, b))
                assert_part(a, b, tolerance * float(a.abs().max()) if a.numel() else 0.0, f"{key} of {name}")
            else:
                assert a == b


@pytest.mark.parametrize(
    ("options", "dtype"), [(OPTIONS[0], torch.float32), *((o, torch.bfloat16) for o in OPTIONS[1:])], ids=str
)
@on_ranks(4)
def test_a_resume_on_as_many_processes_is_bit_exact(
    options: dict[str, Any], dtype: torch.dtype, shared_path: Path
) -> None:
    model, optimizer = made(mesh(4), dtype, **options)
    train(model, optimizer, range(4))
    save(state_of(model, optimizer), shared_path)
    train(model, optimizer, range(4, 8))

    resumed, resumed_optimizer = made(mesh(4), dtype, **options, seed=5)  # the seeds come from the checkpoint
    spoil(resumed)
    load(resumed, resumed_optimizer, shared_path)
    train(resumed, resumed_optimizer, range(4, 8))
    assert_same(model, optimizer, resumed, resumed_optimizer, 0.0)


def save(state: dict[str, Any], path: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path / "saved", **options)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, **options: Any) -> None:
    state = state_of(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path / "saved", **options)
    restore(model, optimizer, state)


@pytest.mark.parametrize(
    ("saved", "loaded", "options"), [(4, 2, OPTIONS[1]), (4, 1, {}), (2, 4, {}), (1, 4, OPTIONS[1])], ids=str
)
@on_ranks(4)
def test_a_resume_on_another_number_of_processes(
    options: dict[str, Any], saved: int, loaded: int, shared_path: Path
) -> None:
    some = {4: mesh(4), 2: DeviceMesh("cpu", [0, 1]), 1: None}
    whole, whole_optimizer = made(None, **options)
    train(whole, whole_optimizer, range(7))
    for num, first in ((saved, True), (loaded, False)):
        if dist.get_rank() < num:
            alone: dict[str, Any] = {"no_dist": True} if num == 1 else {"process_group": some[num].get_group()}
            model, optimizer = made(some[num], **options)
            if first:
                train(model, optimizer, range(4))
                save(state_of(model, optimizer), shared_path, **alone)
            else:
                spoil(model)
                load(model, optimizer, shared_path, **alone)
                train(model, optimizer, range(4, 7))
                pair = Pair.__new__(Pair)
                pair.whole, pair.parts, pair.optimizers = whole, model, (whole_optimizer, optimizer)
                pair.start = [p.detach() for p in small().parameters()]
                pair.assert_equal(SHARDED)
        dist.barrier()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@on_ranks(2)
def test_a_full_state_dict_goes_to_one_process_and_back(options: dict[str, Any]) -> None:
    model, optimizer = made(mesh(2), **options)
    train(model, optimizer, range(4))
    # Copies, because what is whole already is shared, and restoring distributes the dict in place.
    full, again = (copy.deepcopy(state_of(model, optimizer, full_state_dict=True)) for _ in range(2))
    train(model, optimizer, range(4, 7))

    resumed, resumed_optimizer = made(mesh(2), **options)
    spoil(resumed)
    restore(resumed, resumed_optimizer, full, full_state_dict=True)
    train(resumed, resumed_optimizer, range(4, 7))
    assert_same(model, optimizer, resumed, resumed_optimizer, 0.0)

    alone, alone_optimizer = made(None, **options)
    restore(alone, alone_optimizer, again)
    train(alone, alone_optimizer, range(4, 7))
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=SHARDED, atol=SHARDED)
