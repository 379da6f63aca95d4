"""Int8 numbers and their scales: error bounds, the mean, what stays as it is, and the oracle in float64."""

import numpy as np
import oracle_int8 as oracle
import pytest
import torch
from torch import Tensor

from insitu.optim.int8 import Groups, grouped, quantize_nearest
from insitu.optim.rounding import Precision, _uniform, make_scratch
from insitu.optim.seeds import mix

SMALLEST = torch.finfo(torch.float32).tiny
SHAPES = [(7, 40, 8), (3, 37, 8), (1, 50, 16), (5, 6, 100), (9, 1, 4), (4, 33, 1), (6, 20, None)]


def floats(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.logspace(-6, 6, shape[0])[:, None]


def spread(groups: Groups) -> Tensor:
    """The scale of each element, float64."""
    return groups.scale.double().repeat_interleave(groups.size, 1)[:, : groups.cols]


def read(q: Tensor, groups: Groups) -> Tensor:
    return groups.dequantize(q.float())


def written(W: Tensor, groups: Groups, key: int | None) -> tuple[Tensor, Groups]:
    groups = groups._replace(scale=groups.scale.clone())
    out = torch.empty(W.shape, dtype=torch.int8)
    Precision(key, groups=groups).write(out, W.clone())
    return out, groups


@pytest.mark.parametrize(("rows", "cols", "size"), SHAPES, ids=str)
def test_nearest_is_within_half_a_scale_and_no_scale_is_larger_than_it_must(
    rows: int, cols: int, size: int | None
) -> None:
    W = floats(rows, cols)
    q, groups = quantize_nearest(W, size)
    assert q.dtype == torch.int8
    assert groups.scale.shape == (rows, -(-cols // (size or cols)))
    assert ((W.double() - q.double() * spread(groups)).abs() <= 0.5 * spread(groups)).all()
    # The largest of each group is at 120, but for the rounding of the scale up to 8 bits.
    for g, values in enumerate(W.split(groups.size, 1)):
        largest = values.abs().amax(1).double() / groups.scale[:, g].double()
        assert ((largest <= 120.0001) & (largest > 119)).all()


@pytest.mark.parametrize(("rows", "cols", "size"), SHAPES, ids=str)
def test_stochastic_is_one_of_the_two_neighbours(rows: int, cols: int, size: int | None) -> None:
    W = floats(rows, cols)
    q, groups = written(W, grouped(rows, cols, size), key=5)
    assert ((W.double() - q.double() * spread(groups)).abs() < spread(groups)).all()
    other, _ = written(W, grouped(rows, cols, size), key=6)
    assert not torch.equal(q, other)


@pytest.mark.parametrize(("rows", "cols", "size"), SHAPES, ids=str)
@pytest.mark.parametrize("key", [None, 77], ids=["nearest", "stochastic"])
def test_every_bit_is_the_oracles_when_weights_grow_and_shrink(
    rows: int, cols: int, size: int | None, key: int | None
) -> None:
    W, groups = floats(rows, cols), grouped(rows, cols, size)
    scale = groups.scale.double().numpy()
    kept = 0
    for factor in (1, 1.04, 1.04, 0.5, 0.95, 0.0, 1e-30, 1.0):
        q, groups = written(W * factor, groups, key)
        before = scale
        expected, scale = oracle.write((W * factor).numpy(), scale, groups.size, key)
        assert np.array_equal(q.numpy(), expected)
        assert np.array_equal(groups.scale.double().numpy(), scale)
        assert np.allclose(read(q, groups).numpy(), oracle.read(expected, scale, groups.size), rtol=0, atol=0)
        kept += int((before == scale).sum())
    assert kept > 0


def test_a_scale_stays_between_its_bounds_and_changes_beyond_them() -> None:
    groups = grouped(1, 2, None)
    groups.scale.fill_(0.5)
    for largest, expected in ((63.5, 0.5), (48.0, 0.5), (63.51, None), (47.99, None)):
        _, after = written(torch.tensor([[1.0, -largest]]), groups, None)
        if expected is None:
            assert float(after.scale) != 0.5
            assert 119 < largest / float(after.scale) <= 120
        else:
            assert float(after.scale) == expected


@pytest.mark.parametrize("fraction", [0.0625, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_kept(fraction: float, sign: int) -> None:
    n = 400_000
    groups = grouped(1, n, None)
    groups.scale.fill_(2.0**-9)
    W = torch.full((1, n), sign * (7 + fraction) * 2.0**-9)
    W[0, 0] = 100 * 2.0**-9  # keeps the scale
    q, after = written(W, groups, key=11)
    assert torch.equal(after.scale, groups.scale)
    share = (q[0, 1:].double() * sign - 7).mean().item()
    # Five standard deviations of a binomial share, and what 16 bits of chance leave.
    assert share == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / n) ** 0.5 + 2**-17)


def test_the_mean_over_seeds_is_kept_at_each_element() -> None:
    W = torch.randn(4, 16)
    num = 2000
    start = quantize_nearest(W, 8)[1]  # the scale stays, so that means may be compared
    every = [written(W, start, mix(seed, 3)) for seed in range(num)]
    mean = torch.stack([read(*one).double() for one in every]).mean(0)
    bound = 5 * 0.5 / num**0.5 * spread(start)  # five deviations of a share of num draws
    assert ((mean - W.double()).abs() < bound).all()
    nearest = read(*quantize_nearest(W, 8)).double()
    assert ((nearest - W.double()).abs() > bound).any(), "rounding to nearest would pass too"


def test_the_chance_is_every_odd_multiple_of_2_to_the_minus_17() -> None:
    u = _uniform(torch.arange(1 << 16, dtype=torch.int32)).double()
    assert torch.equal(u, (torch.arange(1 << 16).double() + 0.5) / 2**16)


@pytest.mark.parametrize("key", [None, 1, 2, 3])
def test_what_is_written_back_unchanged_stays_to_the_bit(key: int | None) -> None:
    q, groups = written(floats(200, 300), grouped(200, 300, 32), key=9)
    q[3, :64] = 0  # a group of zeros, and one with its old scale
    q[4, 0], q[5, 0] = 127, -127
    q[6, :32], groups.scale[6, 0] = 0, SMALLEST
    q[6, 0] = 3  # so small a group that its scale can go no lower
    groups.scale[3, :2] = SMALLEST
    again, after = written(read(q, groups), groups, key)
    assert torch.equal(again, q)
    assert torch.equal(after.scale, groups.scale)


def test_groups_of_zeros_and_of_tiny_and_of_huge_weights() -> None:
    W = torch.zeros(4, 8)
    W[1] = 1e-38
    W[2] = torch.tensor([3e38, -3e38, 1e38, 0, 0, 0, 0, 1])
    q, groups = quantize_nearest(W, 4)
    assert not q[0].any()
    assert not q[3].any()
    assert (groups.scale[0] == SMALLEST).all()
    assert read(q, groups).isfinite().all()
    assert ((read(q, groups) - W).abs() <= 0.5 * spread(groups)).all()
    moved, after = written(read(q, groups) + 1.0, groups, 5)
    torch.testing.assert_close(read(moved, after)[0], torch.ones(8), rtol=0.01, atol=0)


def test_what_is_not_finite_shows() -> None:
    for bad in (float("nan"), float("inf")):
        W = torch.ones(2, 8)
        W[0, 1] = bad
        q, groups = written(W, grouped(2, 8, 4), 5)
        assert not read(q, groups)[0, :4].isfinite().any()
        assert read(q, groups)[0, 4:].isfinite().all()
        assert read(q, groups)[1].isfinite().all()


@pytest.mark.parametrize("scratch", [64, 1 << 12])
def test_rows_written_in_pieces_are_those_of_the_whole(scratch: int) -> None:
    W, groups = floats(12, 50), grouped(12, 50, 16)
    whole, after = written(W, groups, 4)
    pieces = torch.empty_like(whole)
    told = Precision(4, groups=groups)
    for first, count in ((0, 5), (5, 1), (6, 6)):
        work = W[first : first + count].clone()
        told.of(first * 50, count * 50).write(
            pieces[first : first + count], work, make_scratch(torch.device("cpu"), scratch)
        )
    assert torch.equal(pieces, whole)
    assert torch.equal(groups.scale, after.scale)
    scattered = torch.empty_like(whole)
    index = torch.arange(600)
    told._replace(start=index, groups=grouped(12, 50, 16)).write(scattered, W.clone())
    assert torch.equal(scattered, whole)
