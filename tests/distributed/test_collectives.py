"""How often the processes talk: at most three collectives in a step for each mesh dimension, whatever the number of tensors."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from pairs import apollo, gradient, matrices, mesh, shard, sharded, small
from ranks import on_ranks
from test_placements import placed
from test_tensor_parallel import parallel
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from insitu.optim import exchange

TALL, WIDE, VECTORS = [(12, 8), (21, 5)], [(8, 12), (5, 21)], [(7,), (12,)]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each process group is used; nothing may go past the functions that are watched."""
    groups: Counter[str] = Counter()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, group: Any, **kwargs: Any) -> Any:
            groups[group.group_name] += 1
            return function(*args, group=group, **kwargs)

        return call

    names = ("_reduce_scatter_single", "_all_gather_single")
    with (
        patch.multiple(exchange, **{name: watched(getattr(exchange, name)) for name in names}),
        patch.object(exchange.dist, "all_reduce", watched(dist.all_reduce)),
        CommDebugMode() as seen,
    ):
        yield groups
    assert seen.get_total_counts() == groups.total()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Counter[str]:
    for i, p in enumerate(model.parameters()):
        p.grad = shard(gradient(p.shape, i, number).to(p.dtype), p.device_mesh, p.placements)
    with counted() as groups:
        optimizer.step()
    return groups


@pytest.mark.parametrize(
    ("shapes", "where", "expected"),
    [
        (VECTORS, "S0", 1),
        ([*TALL, *VECTORS], "S0", 2),
        (WIDE, "S1", 2),
        (WIDE, "S0", 3),
        (TALL, "S1", 3),
        ([*TALL, *WIDE, (3, 8, 12), (3, 12, 8), *VECTORS], "S0", 3),
        ([*TALL, *WIDE, *VECTORS], "R", 0),
    ],
    ids=["vectors", "tall", "wide along columns", "wide", "tall along columns", "mixed", "replicated"],
)
@on_ranks(2)
def test_what_crosses_a_line(shapes: list[tuple[int, ...]], where: str, expected: int) -> None:
    model = sharded(matrices(shapes), mesh(2), placed(where))
    optimizer = apollo()(model)
    for number in range(2):
        groups = step(model, optimizer, number)
        assert groups.total() == expected
        assert len(groups) == (expected > 0)


@on_ranks(2, 4)
def test_a_model_of_many_layers_needs_three(world: int) -> None:
    model = fully_shard(nn.Sequential(*(small(torch.bfloat16) for _ in range(5))), mesh=mesh(world))
    options = {"rounding": "compensated", "nonfinite": "skip"} if world == 4 else {"granularity": "tensor"}
    assert step(model, apollo(**options)(model), 0).total() == 3


@pytest.mark.parametrize("where", ["R S0", "S0 S1", "S1 S0", "S0 S0", "S1 S1"])
@on_ranks(4)
def test_at_most_three_for_each_dimension_of_a_square(where: str) -> None:
    model = sharded(matrices([*TALL, *WIDE, (9, 9)]), mesh(2, 2), placed(where))
    groups = step(model, apollo()(model), 0)
    assert len(groups) == 2 - ("R" in where)
    assert max(groups.values()) <= 3


@on_ranks(4)
def test_at_most_three_for_each_dimension_of_fsdp_over_tensor_parallelism() -> None:
    model = parallel((12, 8, 20))
    optimizer = apollo()(model)
    for _ in range(2):
        for p, q in zip(model.parameters(), parallel((12, 8, 20)).parameters(), strict=True):
            p.grad = q.detach().clone()
        with counted() as groups:
            optimizer.step()
        assert sorted(groups.values()) == [3, 3]


@on_ranks(2)
def test_singular_vectors_need_the_whole_gradient_only_where_they_are_made() -> None:
    model = sharded(matrices([*TALL, *WIDE]), mesh(2), placed("S0"))
    optimizer = apollo(projection="svd")(model)
    for i, p in enumerate(model):
        p.grad = shard(gradient(p.shape, i, 0), mesh(2), p.placements)
    with CommDebugMode() as seen:
        optimizer.step()
    assert seen.get_total_counts() == 3 + len(model)
    assert step(model, optimizer, 1).total() == 3
