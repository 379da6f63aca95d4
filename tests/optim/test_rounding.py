"""Stochastic rounding: one of the two neighbours, the right mean, and slices that round as the whole."""

import pytest
import torch

from insitu import APOLLO
from insitu.optim.rounding import stochastic_round


def neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 numbers just below and above in magnitude."""
    low = (x.view(torch.int32) & -65536).view(torch.float32)
    return low, ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)


def test_each_result_is_one_of_the_two_neighbours_and_exact_values_stay() -> None:
    x = torch.randn(100_000) * torch.logspace(-20, 20, 100_000)
    rounded = stochastic_round(x, seed=3, step=1).float()
    low, high = neighbours(x)
    assert ((rounded == low) | (rounded == high)).all()
    assert (rounded == low).any()
    assert (rounded == high).any()
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_round(exact.float(), 3, 1), exact)


@pytest.mark.parametrize("fraction", [0.0625, 0.3, 0.5, 0.9])
def test_the_mean_is_kept(fraction: float) -> None:
    n = 400_000
    step = 2.0**-7  # of bf16 at 1.0
    x = torch.full((n,), 1.0 + fraction * step)
    up = (stochastic_round(x, seed=1, step=7).float() > 1.0).float().mean().item()
    # Five standard deviations of a binomial share.
    assert up == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / n) ** 0.5 + 2**-16)


def test_the_mean_over_seeds_is_kept_at_each_element() -> None:
    x = torch.randn(64)
    num = 2000
    mean = torch.stack([stochastic_round(x, seed=seed, step=0) for seed in range(num)]).double().mean(0)
    low, high = neighbours(x)
    spread = (high.double() - low.double()).abs()
    # A share of num draws has a deviation of at most 0.5 / sqrt(num); five of them, for 64 elements.
    assert ((mean - x.double()).abs() < 5 * 0.5 / num**0.5 * spread).all()
    # Nearest rounding would be off by up to half the spread.
    assert ((x.bfloat16().double() - x.double()).abs() > 5 * 0.5 / num**0.5 * spread).any()


def test_elements_steps_and_seeds_are_independent() -> None:
    x = torch.full((100_000,), 1.0 + 0.5 * 2.0**-7)
    a, b, c = (stochastic_round(x, *k).float() > 1 for k in ((0, 0), (0, 1), (1, 0)))
    for first, second in ((a, b), (a, c), (a[:-1], a[1:]), (a[:-2], a[2:]), (a[:50_000], a[50_000:])):
        assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("start", [0, 1, 7, 65_535, 65_536, 70_001])
def test_a_slice_rounds_as_the_whole(start: int) -> None:
    x = torch.randn(150_000)
    whole = stochastic_round(x, seed=5, step=2)
    part = stochastic_round(x[start : start + 40_000].clone(), seed=5, step=2, start=start)
    assert torch.equal(part, whole[start : start + 40_000])


def test_small_updates_are_not_lost_on_average() -> None:
    weights = torch.ones(50_000, dtype=torch.bfloat16)
    nearest = weights.clone()
    for step in range(100):
        weights = stochastic_round(weights.float() - 1e-4, seed=0, step=step)
        nearest = (nearest.float() - 1e-4).bfloat16()
    assert nearest.float().mean().item() == 1.0
    assert weights.float().mean().item() == pytest.approx(0.99, abs=5e-4)


def test_the_optimizer_draws_anew_at_every_step() -> None:
    # Were the bits the same at each step, one element in forty would move every time and the others never.
    w = torch.nn.Parameter(torch.ones(50_000, dtype=torch.bfloat16))
    optimizer = APOLLO([w], lr=1e-4)
    for _ in range(100):
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert w.float().mean().item() == pytest.approx(0.99, abs=5e-4)
    assert w.float().min().item() > 1 - 16 * 2.0**-8
