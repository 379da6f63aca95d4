"""Apollo and ApolloW on several processes compute what one process computes."""

import warnings
from typing import Any

import pytest
import torch
from pairs import Pair, gradient, matrices, mesh, shard, sharded, small
from ranks import on_ranks
from test_collectives import step
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from insitu import ApolloQN

DECAY = {"l2": 0.02, "decoupled": 0.1, "stable": 0.02}
OPTIONS: list[dict[str, Any]] = [
    {"rebound": rebound, "decay": decay, "weight_decay": DECAY[decay]}
    for rebound in ("constant", "belief")
    for decay in DECAY
]


def quasi_newton(**options: Any) -> Any:
    def make(model: nn.Module) -> ApolloQN:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the warm-up is short
            return ApolloQN(model.parameters(), **{"lr": 1e-2, "warmup": 3, **options})

    return make


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@on_ranks(2, 4)
def test_sharded_equals_single(options: dict[str, Any], world: int) -> None:
    Pair(small(), fully_shard(small(), mesh=mesh(world)), quasi_newton(**options)).steps().assert_equal()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@on_ranks(2)
def test_sharded_along_columns_in_low_precision(options: dict[str, Any]) -> None:
    model = matrices([(12, 8), (8, 12), (5, 21)], torch.bfloat16)
    pair = Pair(model, sharded(model, mesh(2), [Shard(1)]), quasi_newton(moments="bfloat16", **options))
    pair.steps().assert_equal()


@on_ranks(2)
def test_it_needs_at_most_three_collectives() -> None:
    for options in OPTIONS:
        model = fully_shard(small(), mesh=mesh(2))
        optimizer = quasi_newton(**options)(model)
        for number in range(2):
            assert step(model, optimizer, number).total() <= 3


@on_ranks(2)
def test_a_nan_on_one_rank_stops_all() -> None:
    model = sharded(matrices([(12, 8)]), mesh(2), [Shard(0)])
    optimizer = quasi_newton()(model)
    G = gradient((12, 8), 0, 0)
    G[-1, -1] = float("nan")
    model[0].grad = shard(G, mesh(2), [Shard(0)])
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()
