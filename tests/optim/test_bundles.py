"""Which tensors go through a step together: how many, and that it changes no bit."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from insitu import APOLLO
from insitu.optim import bundles
from insitu.optim.task import Task

SHAPE = (24, 24)


def stepped(
    monkeypatch: pytest.MonkeyPatch,
    num: int,
    *,
    elements: int = 1 << 26,
    transposed: Sequence[int] = (),
    **options: Any,
) -> tuple[list[Tensor], list[int]]:
    """All weights and states after three steps, and how many tensors went together: bound once, and kept."""
    sizes: list[int] = []
    bind = APOLLO._bind

    def counted(self: APOLLO, tasks: Sequence[Task]) -> Any:
        sizes.append(len(tasks))
        return bind(self, tasks)

    with monkeypatch.context() as patched:
        patched.setattr(bundles, "_ELEMENTS", elements)
        patched.setattr(APOLLO, "_bind", counted)
        generator = torch.Generator().manual_seed(5)
        params = [nn.Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(num)]
        optimizer = APOLLO(params, lr=1e-2, **options)
        for _ in range(3):
            for i, p in enumerate(params):
                g = torch.randn(SHAPE, generator=generator)
                p.grad = g.t().contiguous().t() if i in transposed else g
            optimizer.step()
    states = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    assert all(int(optimizer.state[p]["step"]) == 3 for p in params)
    return [*(p.detach() for p in params), *states], sizes


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_tensors_of_one_shape_have_the_same_bits_alone_and_together(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, ones = stepped(monkeypatch, 5, elements=1, rank=1, backend=backend)
    together, all_of_them = stepped(monkeypatch, 5, rank=1, backend=backend)
    assert (ones, all_of_them) == ([1] * 5, [5])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_a_bundle_takes_at_most_half_of_the_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tensor has 576 numbers, and so much scratch memory has the step; R has 24 for each rank.
    for rank, expected in ((2, [5]), (4, [3, 2]), (12, [1] * 5)):
        _, bundles = stepped(monkeypatch, 5, rank=rank)
        assert bundles == expected
    _, bundles = stepped(monkeypatch, 5, rank=2, moments="bfloat16")  # with copies of M and V
    assert bundles == [2, 2, 1]


def test_a_gradient_that_would_be_copied_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = stepped(monkeypatch, 4, rank=1)
    mixed, bundles = stepped(monkeypatch, 4, rank=1, transposed=[2])
    assert sorted(bundles) == [1, 3]
    for one, other in zip(plain, mixed, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_moments_in_bf16_are_copied_a_bundle_at_a_time(backend: str) -> None:
    params = [nn.Parameter(torch.randn(256, 256)) for _ in range(32)]
    optimizer = APOLLO(params, rank=64, moments="bfloat16", projection="sketch", backend=backend)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()  # what is kept is made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    allocated = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(allocated, key=lambda event: event.start_ns())]
    one_tensor, all_copies = params[0].nbytes, sum(2 * 4 * optimizer.state[p]["exp_avg"].numel() for p in params)
    waiting = one_tensor + 32 * 1024  # R, and sums per channel
    assert waiting + 4 * one_tensor < all_copies
    assert max(accumulate(changes)) < waiting + 4 * one_tensor


def test_first_come_those_that_hold_least_beside_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    bind = APOLLO._bind

    def seen(self: APOLLO, tasks: Sequence[Task]) -> Any:
        shapes.append(tuple(tasks[0].parameter.shape))
        return bind(self, tasks)

    monkeypatch.setattr(APOLLO, "_bind", seen)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((8, 64), (64,), (16, 64), (64, 64))]
    optimizer = APOLLO(params, rank=2)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert shapes == [(64,), (64, 64), (16, 64), (8, 64)]
