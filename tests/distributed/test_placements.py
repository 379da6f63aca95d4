"""DTensors of every placement, on meshes of one and two dimensions, compute what whole tensors compute."""

from typing import Any

import pytest
import torch
from pairs import Pair, apollo, gradient, matrices, mesh, shard, sharded
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import insitu

PLACEMENTS = {"S0": Shard(0), "S1": Shard(1), "S2": Shard(2), "R": Replicate()}
MATRICES = [(12, 8), (8, 12), (9, 9), (21, 5), (5, 21), (3, 7), (7, 3)]
STACKS = [(4, 8, 12), (3, 12, 8), (5, 9, 9), (1, 6, 7)]
OPTIONS: list[dict[str, Any]] = [{"denominator": "exact"}, {"granularity": "tensor", "projection": "sketch"}]


def placed(names: str) -> list[Any]:
    return [PLACEMENTS[name] for name in names.split()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("where", ["S0", "S1", "R"])
@on_ranks(2, 4)
def test_matrices_on_a_line(where: str, options: dict[str, Any], world: int) -> None:
    model = matrices(MATRICES)
    Pair(model, sharded(model, mesh(world), placed(where)), apollo(**options)).steps().assert_equal()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("where", ["S0", "S1", "S2", "R"])
@on_ranks(2, 4)
def test_stacks_on_a_line(where: str, options: dict[str, Any], world: int) -> None:
    model = matrices(STACKS)
    Pair(model, sharded(model, mesh(world), placed(where)), apollo(**options)).steps().assert_equal()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("where", ["R S0", "S1 R", "S0 S1", "S1 S0", "S0 S0", "S1 S1"])
@on_ranks(4)
def test_matrices_on_a_square(where: str, options: dict[str, Any]) -> None:
    model = matrices(MATRICES)
    Pair(model, sharded(model, mesh(2, 2), placed(where)), apollo(**options)).steps().assert_equal()


@pytest.mark.parametrize("where", ["R S0", "S0 S1", "S0 S2", "S1 S2", "S2 S1", "S2 S0", "S1 S1", "S0 S0"])
@on_ranks(4)
def test_stacks_on_a_square(where: str) -> None:
    model = matrices(STACKS)
    Pair(model, sharded(model, mesh(2, 2), placed(where)), apollo(projection="rademacher")).steps().assert_equal()


@pytest.mark.parametrize("where", ["S0", "S1"])
@on_ranks(2, 4)
def test_singular_vectors_of_a_sharded_gradient(where: str, world: int) -> None:
    model = matrices([*MATRICES, *STACKS])
    Pair(model, sharded(model, mesh(world), placed(where)), apollo(projection="svd")).steps().assert_equal()


@on_ranks(2, 4)
def test_a_side_of_several_dimensions_of_which_one_is_long(world: int) -> None:
    model = matrices([(9, 1, 7), (7, 1, 9)])
    Pair(model, sharded(model, mesh(world), placed("S2")), apollo()).steps().assert_equal()


@on_ranks(2)
def test_a_side_of_which_a_part_is_sharded_is_refused_by_name() -> None:
    model = sharded(matrices([(6, 4, 3, 3)]), mesh(2), placed("S1"))
    model[0].grad = torch.ones_like(model[0])
    with pytest.raises(ValueError, match=r"parameter 0.*sharded along dimension 1"):
        insitu.APOLLO([model[0]], rank=1).step()


@pytest.mark.parametrize("where", ["S0", "S1"])
@on_ranks(2, 4)
def test_moments_are_sharded_with_the_tensor(where: str, world: int) -> None:
    shapes = [(8, 4), (4, 8), (4, 4, 8), (4, 8, 4)]
    model = sharded(matrices(shapes), mesh(world), placed(where))
    optimizer = insitu.APOLLO(model.parameters(), rank=1)
    for i, p in enumerate(model):
        p.grad = shard(gradient(p.shape, i, 0), mesh(world), p.placements)
    optimizer.step()
    for p in model:
        moments = optimizer.state[p]["exp_avg"]
        assert isinstance(moments, DTensor)
        assert moments.to_local().numel() == moments.numel() // world


@pytest.mark.parametrize("where", ["partial", "S1", "R"])
@on_ranks(2)
def test_a_gradient_that_is_placed_otherwise_is_redistributed(where: str) -> None:
    model = matrices([(12, 8), (8, 12)])
    pair = Pair(model, sharded(model, mesh(2), placed("S0")), apollo())
    for step in range(3):
        for i, (p, q) in enumerate(zip(pair.whole.parameters(), pair.parts.parameters(), strict=True)):
            p.grad = gradient(p.shape, i, step)
            if where == "partial":
                q.grad = DTensor.from_local(p.grad / 2, mesh(2), [Partial()])
            else:
                q.grad = shard(p.grad, mesh(2), placed(where))
        for optimizer in pair.optimizers:
            optimizer.step()
    pair.assert_equal()


@on_ranks(2)
def test_a_parameter_of_partial_sums_is_refused_by_name() -> None:
    p = nn.Parameter(DTensor.from_local(torch.ones(6, 4), mesh(2), [Partial()]))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"parameter 0.*partial sums"):
        insitu.APOLLO([p], rank=1).step()


def fused(shape: tuple[int, int], dim: int) -> tuple[Tensor, DTensor]:
    """Of two fused layers, every process has a half of each."""
    whole = gradient(shape, 0, 0)
    return whole, shard(whole, mesh(2), [_StridedShard(dim, split_factor=2)])


@on_ranks(2)
def test_channels_of_fused_layers_lie_apart() -> None:
    whole, part = fused((12, 8), 0)
    assert torch.equal(part.to_local(), torch.cat([t.chunk(2)[mesh(2).get_local_rank()] for t in whole.chunk(2)]))
    for rounding in ("stochastic", "compensated"):
        pair = Pair(
            nn.ParameterList([nn.Parameter(whole.bfloat16())]),
            nn.ParameterList([nn.Parameter(part.bfloat16())]),
            apollo(rounding=rounding, projection="sketch"),
        )
        pair.steps().assert_equal()


@on_ranks(2)
def test_a_projected_side_of_fused_layers_is_refused_everywhere() -> None:
    for shape, dim in (((8, 12), 0), ((12, 8), 1)):
        p = nn.Parameter(fused(shape, dim)[1])
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=r"parameter 0.*lie apart"):
            insitu.APOLLO([p], rank=1).step()
