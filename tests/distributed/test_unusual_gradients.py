"""Gradients that are zero or not finite on some processes only: what is done about them is done everywhere."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import Pair, apollo, gradient, matrices, mesh, sharded, small
from ranks import on_ranks
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

SHAPES = [(12, 8), (8, 12), (9, 9), (4, 8, 12), (13,)]


def only_first_half(shape: Sequence[int], index: int, step: int) -> Tensor:
    G = gradient(shape, index, step)
    G[(len(G) + 1) // 2 :] = 0
    return G


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"adamw": ["*"]}], ids=str)
@on_ranks(2)
def test_a_shard_without_gradient_still_decays_with_the_whole(options: dict[str, Any]) -> None:
    model = matrices(SHAPES)
    pair = Pair(model, sharded(model, mesh(2), [Shard(0)]), apollo(weight_decay=0.1, **options))
    pair.steps(4, only_first_half).assert_equal()
    last = [p.detach()[-1] / start[-1] for p, start in zip(pair.whole.parameters(), pair.start, strict=True)]
    torch.testing.assert_close(last[0], torch.full((8,), (1 - 1e-2 * 0.1) ** 4))


@on_ranks(2, 4)
def test_a_gradient_that_is_all_zero_changes_nothing(world: int) -> None:
    model = fully_shard(small(torch.bfloat16), mesh=mesh(world))
    optimizer = apollo(weight_decay=0.1)(model)
    before = [p.detach().to_local().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    assert all(int(optimizer.state[p]["step"]) == 0 for p in model.parameters())


def with_nan(shape: Sequence[int], index: int, step: int) -> Tensor:
    """In what the last process has of the second tensor."""
    G = gradient(shape, index, step)
    if step == 2 and index == 1:
        G[-1, -1] = float("nan")
    return G


@pytest.mark.parametrize("dim", [0, 1])
@on_ranks(2)
def test_a_nan_on_one_rank_stops_all_and_changes_nothing(dim: int) -> None:
    model = matrices([(12, 8), (8, 12)])
    pair = Pair(model, sharded(model, mesh(2), [Shard(dim)]), apollo())
    pair.steps(2)
    before = [p.detach().to_local().clone() for p in pair.parts.parameters()]
    with pytest.raises(ValueError, match=r"the gradient of 1 is not finite") as alone:
        pair.step(2, with_nan)
    with pytest.raises(ValueError, match=r"the gradient of 1 is not finite") as together:
        pair.optimizers[1].step()
    assert str(together.value) == str(alone.value)
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, pair.parts.parameters(), strict=True))
    for step in (3, 4):
        pair.step(step)
    pair.assert_equal()


@pytest.mark.parametrize("dim", [0, 1])
@on_ranks(2)
def test_a_nan_on_one_rank_is_skipped_by_all(dim: int) -> None:
    model = matrices([(12, 8), (8, 12)])
    pair = Pair(model, sharded(model, mesh(2), [Shard(dim)]), apollo(nonfinite="skip"))
    pair.steps(5, with_nan).assert_equal()
    counts = [(int(s["step"]), int(s["skipped"])) for s in pair.optimizers[1].state.values()]
    assert counts == [(5, 0), (4, 1)]
    said: list[Any] = [None, None]
    dist.all_gather_object(said, counts)
    assert said == [counts, counts]
