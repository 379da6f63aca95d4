"""Gradient release on several processes: DDP, FSDP2 and tensor parallel have the bits of their plain steps."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import Make, apollo, backward, mesh, small, tokens
from ranks import on_ranks
from test_bits import all_of, bits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import insitu
from insitu import GradientRelease
from insitu.optim.released import is_released

RELEASED = r"was used and freed in backward \(GradientRelease\)"
OPTIMIZERS: dict[str, Make] = {
    "APOLLO": apollo(dense="apollo"),
    "Mini": apollo(rank=1),
    "svd": apollo(projection="svd"),
    "ApolloQN": lambda model: insitu.ApolloQN(model.parameters(), warmup=100),
}
Step = Callable[[nn.Module, int], None]


def descend(m: nn.Module, optimizer: torch.optim.Optimizer, steps: int, step_of: Step | None = None) -> None:
    for step in range(steps):
        m.zero_grad()
        (step_of or one_backward)(m, step)
        optimizer.step()


def one_backward(m: nn.Module, *seed: int) -> None:
    """Not ``pairs.backward``, which forgets the gradients of the micro-batches before."""
    batch = tokens(*seed, dist.get_rank())
    nn.functional.cross_entropy(m(batch).float().flatten(0, 1), batch.roll(1, 1).flatten()).backward()


def assert_equal(plain: nn.Module, released: nn.Module, one: Any, other: Any) -> None:
    assert torch.equal(bits(all_of(plain, one)), bits(all_of(released, other)))
    fresh = small(next(plain.parameters()).dtype)
    if type(plain) is DistributedDataParallel:
        assert not all(torch.equal(p, q) for p, q in zip(plain.parameters(), fresh.parameters(), strict=True))


# --- DDP ---


def wrapped(dtype: torch.dtype = torch.float32, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(small(dtype), bucket_cap_mb=0.002, **options)  # several buckets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS)
@on_ranks(2)
def test_ddp(make: str, dtype: torch.dtype) -> None:
    plain, released = wrapped(dtype), wrapped(dtype)
    optimizers = [OPTIMIZERS[make](m) for m in (plain, released)]
    GradientRelease(optimizers[1], ddp=released)

    def watched(m: nn.Module, step: int) -> None:
        before = [p.detach().clone() for p in m.parameters()]
        one_backward(m, step)
        assert all(is_released(p) for p in m.parameters())
        assert sum(not torch.equal(p, q) for p, q in zip(m.parameters(), before, strict=True)) > 6

    descend(plain, optimizers[0], 4)
    descend(released, optimizers[1], 4, watched)
    assert_equal(plain, released, *optimizers)


@pytest.mark.parametrize("how", ["no_sync", "accumulate"])
@on_ranks(2)
def test_ddp_under_accumulation(how: str) -> None:
    plain, released = wrapped(), wrapped()
    optimizers = [apollo()(m) for m in (plain, released)]
    release = GradientRelease(optimizers[1], ddp=released)

    def micro_batches(m: nn.Module, step: int) -> None:
        for micro in range(3):
            kept = m.no_sync() if how == "no_sync" else release.accumulate() if m is released else nullcontext()
            with kept if micro < 2 else nullcontext():
                one_backward(m, step, micro)

    for m, optimizer in zip((plain, released), optimizers, strict=True):
        descend(m, optimizer, 3, micro_batches)
    assert_equal(plain, released, *optimizers)


class Either(nn.Module):
    """Each process uses one of two layers, and nobody the third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[dist.get_rank()](x)


@on_ranks(2)
def test_ddp_with_parameters_that_not_every_process_uses() -> None:
    models = [DistributedDataParallel(Either(), find_unused_parameters=True) for _ in range(2)]
    optimizers = [apollo()(m) for m in models]
    GradientRelease(optimizers[1], ddp=models[1])
    start = copy.deepcopy(models[0].module.state_dict())
    for m, optimizer in zip(models, optimizers, strict=True):
        descend(m, optimizer, 3, lambda m, step: m(torch.full((2, 6), 1.0 + step)).square().sum().backward())
    for name, p in models[0].module.state_dict().items():
        assert torch.equal(p, models[1].module.state_dict()[name]), name
        assert torch.equal(p, start[name]) == name.startswith("layers.2"), name


@on_ranks(2)
def test_ddp_refuses_what_needs_all_gradients() -> None:
    released = wrapped()
    optimizer = apollo()(released)
    GradientRelease(optimizer, ddp=released)
    one_backward(released, 0)
    with pytest.raises(ValueError, match=RELEASED):
        nn.utils.clip_grad_norm_(released.parameters(), 1.0)
    with pytest.raises(ValueError, match=r"release\.accumulate"):
        one_backward(released, 1)


@on_ranks(2)
def test_without_ddp_several_processes_are_refused() -> None:
    released = wrapped()
    optimizer = apollo()(released)
    before = [p.detach().clone() for p in released.parameters()]
    release = GradientRelease(optimizer)
    with pytest.raises(ValueError, match=r"2 processes run.*ddp=model.*fully_shard.*ddp=False"):
        one_backward(released, 0)
    assert all(torch.equal(p, q) for p, q in zip(released.parameters(), before, strict=True))
    release.remove()


@on_ranks(2)
def test_processes_that_train_apart_say_so() -> None:
    plain, released = small(), small()
    optimizers = [apollo()(m) for m in (plain, released)]
    GradientRelease(optimizers[1], ddp=False)
    for m, optimizer in zip((plain, released), optimizers, strict=True):
        descend(m, optimizer, 3)
    assert_equal(plain, released, *optimizers)


@on_ranks(2)
def test_a_ddp_that_cannot_be_taken_is_refused() -> None:
    m = wrapped(gradient_as_bucket_view=True)
    with pytest.raises(ValueError, match="gradient_as_bucket_view=True"):
        GradientRelease(apollo()(m), ddp=m)
    m = wrapped()
    with pytest.raises(ValueError, match="parameter 0 is not averaged by ddp"):
        GradientRelease(insitu.APOLLOMini(small().parameters()), ddp=m)
    m.register_comm_hook(None, lambda state, bucket: None)
    with pytest.raises(ValueError, match="ddp has a communication hook already"):
        GradientRelease(apollo()(m), ddp=m)


@on_ranks(2)
def test_ddp_after_remove_takes_plain_steps() -> None:
    plain, released = wrapped(), wrapped()
    optimizers = [apollo()(m) for m in (plain, released)]
    release = GradientRelease(optimizers[1], ddp=released)
    for m, optimizer in zip((plain, released), optimizers, strict=True):
        descend(m, optimizer, 2)
        release.remove()
        descend(m, optimizer, 2)
    assert released.module.square.weight.grad is not None
    assert not is_released(released.module.square.weight)
    assert_equal(plain, released, *optimizers)


# --- FSDP2 and tensor parallel ---


def sharded(world: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    m = small(dtype)
    for layer in (m.tall, m.wide, m.square):
        fully_shard(layer, mesh=mesh(world))
    return fully_shard(m, mesh=mesh(world))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS)
@on_ranks(2)
def test_fsdp2(make: str, dtype: torch.dtype, world: int) -> None:
    plain, released = sharded(world, dtype), sharded(world, dtype)
    optimizers = [OPTIMIZERS[make](m) for m in (plain, released)]
    GradientRelease(optimizers[1])

    norms: list[list[float]] = [[], []]

    def watched(m: nn.Module, step: int) -> None:
        one_backward(m, step)
        assert all(is_released(p) for p in m.parameters()) == (m is released)
        norm = nn.utils.get_total_norm([p.grad for p in m.parameters()])
        norms[m is released].append(float(norm.full_tensor()))

    descend(plain, optimizers[0], 4, watched)
    descend(released, optimizers[1], 4, watched)
    assert_equal(plain, released, *optimizers)
    assert norms[0] == pytest.approx(norms[1], rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("release", [True, False])
@on_ranks(2)
def test_under_fsdp2_the_gradients_of_one_layer_live_at_a_time(release: bool, world: int) -> None:
    # FSDP2 reduces the gradients of a layer into one piece of memory, of which each is a part.
    m = fully_shard(
        nn.Sequential(*[fully_shard(nn.Linear(16, 16), mesh=mesh(world)) for _ in range(5)]), mesh=mesh(world)
    )
    held: set[StorageWeakRef] = set()
    most = 0

    def look(p: Any) -> None:
        nonlocal most, held
        held = {storage for storage in held if not storage.expired()} | {
            StorageWeakRef(p.grad.to_local().untyped_storage())
        }
        most = max(most, len(held))

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(look)
    optimizer = apollo()(m)
    if release:
        GradientRelease(optimizer)
    for _ in range(2):
        m(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert most == (1 if release else 5)


@pytest.mark.parametrize("how", ["no sync", "accumulate"])
@on_ranks(2)
def test_fsdp2_under_accumulation(how: str, world: int) -> None:
    plain, released = sharded(world), sharded(world)
    optimizers = [apollo()(m) for m in (plain, released)]
    release = GradientRelease(optimizers[1])

    def micro_batches(m: Any, step: int) -> None:
        for micro in range(3):
            if how == "no sync":
                m.set_requires_gradient_sync(micro == 2)
            with release.accumulate() if how == "accumulate" and micro < 2 else nullcontext():
                one_backward(m, step, micro)

    for m, optimizer in zip((plain, released), optimizers, strict=True):
        descend(m, optimizer, 3, micro_batches)
    assert_equal(plain, released, *optimizers)


@on_ranks(2)
def test_fsdp2_refuses_what_needs_all_gradients(world: int) -> None:
    released = sharded(world)
    optimizer = apollo()(released)
    GradientRelease(optimizer)
    one_backward(released, 0)
    with pytest.raises(ValueError, match=RELEASED):
        nn.utils.clip_grad_norm_(released.parameters(), 1.0)
    with pytest.raises(ValueError, match=r"release\.accumulate"):
        one_backward(released, 1)


@on_ranks(2)
def test_tensor_parallel(world: int) -> None:
    def parallel() -> nn.Module:
        torch.manual_seed(7)
        m = nn.Sequential(nn.Embedding(29, 12), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 29))
        return parallelize_module(m, mesh(world), {"1": ColwiseParallel(), "3": RowwiseParallel()})

    plain, released = parallel(), parallel()
    optimizers = [apollo()(m) for m in (plain, released)]
    GradientRelease(optimizers[1], ddp=False)  # the embedding is whole everywhere, with the same gradient
    for m, optimizer in zip((plain, released), optimizers, strict=True):
        for step in range(4):
            backward(m, tokens(step))
            optimizer.step()
    assert_equal(plain, released, *optimizers)
