"""Projections: the rule for the side, E[P^T P] = I, balance, and purity."""

import pytest
import torch

from insitu.optim.projection import Sketch, layout, make, project


def dense(P: torch.Tensor | Sketch, m: int) -> torch.Tensor:
    return project(torch.eye(m), P, -1)  # P I


def test_the_smaller_side_is_projected_and_a_square_keeps_its_rows() -> None:
    assert (layout(9, 4, 2).projected, layout(9, 4, 2).channel_dim, layout(9, 4, 2).moments) == (4, -2, (9, 2))
    assert (layout(4, 9, 2).projected, layout(4, 9, 2).channel_dim, layout(4, 9, 2).moments) == (4, -1, (2, 9))
    assert (layout(5, 5, 2).channel_dim, layout(5, 5, 2).moments) == (-2, (5, 2))
    assert layout(3, 8, 100).rank == 3


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sketch"])
@pytest.mark.parametrize(("m", "rank"), [(12, 3), (13, 4), (5, 5), (7, 1), (37, 18)])
def test_the_expectation_of_p_transposed_p_is_the_identity(kind: str, m: int, rank: int) -> None:
    num = 4000
    mean = torch.zeros(m, m, dtype=torch.float64)
    for seed in range(num):
        P = dense(make(kind, seed, 0, layout(m, m, rank)), m).double()
        mean += P.T @ P / num
    # Entries of P^T P have a variance of at most 2 / r; five standard deviations of the mean.
    assert (mean - torch.eye(m)).abs().max() < 5 * (2 / rank / num) ** 0.5


@pytest.mark.parametrize(("m", "rank"), [(12, 3), (13, 4), (100, 7), (6, 6), (9, 1), (96, 32)])
def test_sketch_buckets_are_balanced_and_signs_fair(m: int, rank: int) -> None:
    P = dense(make("sketch", 0, 0, layout(m, m, rank)), m)
    assert P.shape == (rank, m)
    assert (P.abs().sum(0) == 1).all(), "every coordinate goes to one bucket"
    sizes = P.abs().sum(1)
    assert sizes.max() - sizes.min() <= 1


def test_a_sketch_keeps_blocks_of_16_together_and_lets_others_collide_as_if_by_chance() -> None:
    m, rank, num = 192, 48, 3000
    together = torch.zeros(m, m)
    firsts = set()
    for seed in range(num):
        sketch = make("sketch", seed, 0, layout(m, m, rank))
        assert isinstance(sketch, Sketch)
        assert sketch.whole
        blocks = sketch.order.view(-1, 16)
        assert (blocks // 16 == blocks[:, :1] // 16).all()
        assert torch.equal(blocks.flatten().sort().values, torch.arange(m, dtype=torch.int32))
        firsts.add(blocks[0, 0].item())
        bucket = torch.empty(m, dtype=torch.int64)
        bucket[sketch.order.long()] = torch.arange(m) % rank
        together += bucket[:, None] == bucket
    share = together / num
    i = torch.arange(m)
    near = i[:, None] // 16 == i // 16
    assert (share[near] == (i[:, None] == i)[near].float()).all(), "of one block none collide"
    # 12 blocks, of which each meets 3 others, in a random place of 16.
    expected = 3 / 11 / 16
    assert (share[~near].mean() - expected).abs() < 1e-3
    assert (share[~near] - expected).abs().max() < 6 * (expected / num) ** 0.5, "whatever lies between them"
    assert firsts == set(range(m))


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sketch"])
def test_a_projection_is_a_function_of_seed_and_refresh_index(kind: str) -> None:
    def of(seed: int, index: int) -> torch.Tensor:
        torch.manual_seed(torch.seed())  # the global generator must not matter
        return dense(make(kind, seed, index, layout(20, 30, 5)), 20)

    assert torch.equal(of(1, 0), of(1, 0))
    assert not torch.equal(of(1, 0), of(2, 0))
    assert not torch.equal(of(1, 0), of(1, 1))


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sketch"])
def test_both_orientations_agree(kind: str) -> None:
    P = make(kind, 3, 0, layout(9, 6, 4))
    G = torch.randn(9, 6)
    torch.testing.assert_close(project(G, P, -2), project(G.T.contiguous(), P, -1).T)
