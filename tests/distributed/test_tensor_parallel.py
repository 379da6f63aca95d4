"""FSDP2 over tensor parallelism: rows are cut twice, or rows and columns."""

from typing import Any

import pytest
import torch
from pairs import Pair, apollo, backward, mesh
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Block(nn.Module):
    """The shapes of a transformer's layer: square, wide (few key heads), tall, and wide again."""

    def __init__(self, width: int, keys: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.back = nn.Linear(keys, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.key(x)) + self.query(x)
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, sizes[0])
        self.blocks = nn.Sequential(Block(*sizes))
        self.head = nn.Linear(sizes[0], 29)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


PLAN = {"key": ColwiseParallel(), "back": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}


def model(sizes: tuple[int, ...]) -> Model:
    torch.manual_seed(7)
    return Model(*sizes)


def parallel(sizes: tuple[int, ...]) -> Model:
    both = mesh(2, 2)
    made = model(sizes)
    for block in made.blocks:
        parallelize_module(block, both["inner"], PLAN)
        fully_shard(block, mesh=both["outer"])
    return fully_shard(made, mesh=both["outer"])


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((12, 8, 20), {}),
        ((12, 8, 20), {"projection": "sketch", "granularity": "tensor"}),
        ((10, 6, 18), {"dense": "apollo"}),
        ((10, 6, 18), {"projection": "svd"}),
    ],
    ids=str,
)
@on_ranks(4)
def test_sharded_equals_single(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    whole, parts = model(sizes), parallel(sizes)
    assert "StridedShard" in str(parts.blocks[0].up.weight.placements)
    assert parts.blocks[0].down.weight.placements == (Shard(0), Shard(1))
    pair = Pair(whole, parts, apollo(**options))
    for step in range(4):
        batch = torch.randint(0, 29, (4, 7), generator=torch.Generator().manual_seed(step))
        backward(parts, batch)
        backward(whole, batch)
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            assert isinstance(q.grad, DTensor)
            mean = q.grad.full_tensor()
            torch.testing.assert_close(mean, p.grad, rtol=1e-4, atol=1e-6)
            p.grad = mean
        for optimizer in pair.optimizers:
            optimizer.step()
    pair.assert_equal()
