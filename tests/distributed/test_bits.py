"""Low precision: what is rounded on several processes has the bits that one process gives it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import Pair, apollo, backward, matrices, mesh, sharded, small, tokens
from ranks import on_ranks
from tolerances import EXACT
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

TALL, WIDE, STACKS = [(12, 8), (9, 9), (21, 5)], [(8, 12), (5, 21)], [(3, 12, 8), (4, 9, 9)]
# The sketch adds in an order of its own. How a library multiplies matrices may depend on the number of rows.
STORED: list[dict[str, Any]] = [
    {},
    {"moments": "bfloat16"},
    {"rounding": "compensated"},
    {"rounding": "compensated", "moments": "bfloat16"},
    {"rounding": "nearest", "granularity": "tensor"},
    *({"backend": backend} for backend in ("blocked", "native", "fused")),
]


@pytest.mark.parametrize("options", STORED, ids=str)
@pytest.mark.parametrize(
    ("shapes", "dim"), [(TALL, 0), (WIDE, 1), (STACKS, 0), (STACKS, 1)], ids=["tall", "wide", "stack", "tall stack"]
)
@on_ranks(2)
def test_with_its_channels_sharded_a_tensor_has_the_bits_of_the_whole(
    shapes: list[tuple[int, ...]], dim: int, options: dict[str, Any]
) -> None:
    model = matrices(shapes, torch.bfloat16)
    Pair(model, sharded(model, mesh(2), [Shard(dim)]), apollo(projection="sketch", **options)).steps().assert_equal(
        EXACT
    )


@pytest.mark.parametrize(
    "options",
    [
        {"adamw": ["*"]},
        {"adamw": ["*"], "moments": "bfloat16"},
        *({"adamw": ["*"], "backend": backend} for backend in ("blocked", "native", "fused")),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [0, 1])
@on_ranks(2, 4)
def test_what_is_not_projected_has_the_bits_of_the_whole(dim: int, options: dict[str, Any], world: int) -> None:
    model = matrices([(21, 7), (3, 5), (4, 6, 5)], torch.bfloat16)
    Pair(model, sharded(model, mesh(world), [Shard(dim)]), apollo(**options)).steps().assert_equal(EXACT)


def bits(tensors: list[Tensor]) -> Tensor:
    """Every byte of the parts that are here."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in local])


def all_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights and state."""
    state = [v for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return [*model.parameters(), *(v.view(1) if v.ndim == 0 else v for v in state)]


@pytest.mark.parametrize(
    "options", [{}, {"rounding": "compensated"}, {"moments": "bfloat16", "dense": "apollo"}], ids=str
)
@on_ranks(4)
def test_replicas_of_a_shard_stay_identical(options: dict[str, Any]) -> None:
    both = mesh(2, 2)
    model = fully_shard(small(torch.bfloat16), mesh=both)
    optimizer = apollo(**options)(model)
    before = bits(list(model.parameters()))
    for step in range(4):
        backward(model, tokens(step, dist.get_rank()))
        optimizer.step()
    mine = bits(all_of(model, optimizer))
    assert not torch.equal(mine[: len(before)], before)
    other = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(other, mine, group=both.get_group("outer"))
    assert torch.equal(*other)
