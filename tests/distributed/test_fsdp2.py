"""FSDP2 computes what one process computes, whatever the options, with uneven and with empty shards."""

from typing import Any

import pytest
import torch
from pairs import Pair, apollo, backward, matrices, mesh, small, tokens
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import insitu
from insitu import APOLLO

EVEN = [(12, 8), (8, 12), (6, 6), (4, 8, 12)]  # FSDP2 cuts other dimensions than the first only evenly

OPTIONS: list[dict[str, Any]] = [
    {},
    {"projection": "rademacher", "limiter": None},
    {"projection": "sketch", "dense": "apollo"},
    {"projection": "svd"},
    {"rank": 1, "dense": "apollo"},
    {"granularity": "tensor", "denominator": "exact", "dense": "apollo"},
    {"denominator": "exact", "dense": "sgd"},
    {"weight_decay": 0.0, "maximize": True, "backend": "reference"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@on_ranks(2, 4)
def test_sharded_equals_single(options: dict[str, Any], world: int) -> None:
    pair = Pair(small(), fully_shard(small(), mesh=mesh(world)), apollo(**options))
    pair.steps().assert_equal()


@on_ranks(2, 4)
def test_each_rank_with_its_batch_trains_as_one_process_with_all(world: int) -> None:
    whole, parts = small(), fully_shard(small(), mesh=mesh(world))
    pair = Pair(whole, parts, apollo(dense="apollo"))
    for step in range(5):
        backward(parts, tokens(step, mesh(world).get_rank()))
        backward(whole, torch.cat([tokens(step, rank) for rank in range(world)]))
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            mean = q.grad.full_tensor()
            torch.testing.assert_close(mean, p.grad, rtol=1e-4, atol=1e-6)
            p.grad = mean  # AdamW makes much of the last place of a gradient near zero
        for optimizer in pair.optimizers:
            optimizer.step()
    pair.assert_equal()


@on_ranks(4)
def test_hybrid_sharding_equals_single() -> None:
    Pair(small(), fully_shard(small(), mesh=mesh(2, 2)), apollo(dense="apollo")).steps().assert_equal()


@on_ranks(2)
def test_sharded_along_the_second_dimension() -> None:
    model = fully_shard(matrices(EVEN), mesh=mesh(2), shard_placement_fn=lambda p: Shard(1))
    assert model[0].placements == (Shard(1),)
    Pair(matrices(EVEN), model, apollo()).steps().assert_equal()


@on_ranks(2)
def test_parameters_replaced_after_the_optimizer_was_made(world: int) -> None:
    # What accelerate does with an optimizer that it is given beside a model to shard.
    def make(model: nn.Module) -> APOLLO:
        optimizer = apollo()(small())
        replaced = iter(insitu.param_groups(model))
        for group in optimizer.param_groups:
            group["params"] = next(replaced)["params"]
        return optimizer

    Pair(small(), fully_shard(small(), mesh=mesh(world)), make).steps().assert_equal()
