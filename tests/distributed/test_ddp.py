"""DistributedDataParallel: every process has the whole model, and they must not part."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import Pair, apollo, backward, small, tokens
from ranks import on_ranks
from test_bits import all_of, bits
from torch.nn.parallel import DistributedDataParallel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rank": 1, "dense": "apollo"}, {"projection": "svd"}], ids=str)
@on_ranks(2)
def test_replicas_stay_identical(options: dict[str, Any], dtype: torch.dtype, world: int) -> None:
    model = DistributedDataParallel(small(dtype))
    optimizer = apollo(**options)(model)
    for step in range(4):
        backward(model, tokens(step, dist.get_rank()))
        optimizer.step()
    mine = bits(all_of(model, optimizer))
    others = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(others, mine)
    assert torch.equal(*others)


@on_ranks(2)
def test_the_step_is_that_of_the_mean_gradient(world: int) -> None:
    whole, wrapped = small(), DistributedDataParallel(small())
    pair = Pair(whole, wrapped, apollo())
    for step in range(4):
        backward(wrapped, tokens(step, dist.get_rank()))
        backward(whole, torch.cat([tokens(step, rank) for rank in range(world)]))
        for p, q in zip(whole.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
            p.grad = q.grad.clone()
        for optimizer in pair.optimizers:
            optimizer.step()
    pair.assert_equal()
