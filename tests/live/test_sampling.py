"""Draws against the exact distribution, and what makes them repeatable."""

import math
from collections import Counter

import pytest
import torch

from insitu.live.engines.sampling import Draw, describe, nucleus, pick, uniform

DRAWS = 5_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.9, -torch.inf, 0.0, 1.0, -3.0])


def expected(logits: torch.Tensor, temperature: float, top_p: float) -> list[float]:
    """The distribution in plain words: temper, sort, keep until the sum reaches top_p, renormalize."""
    probs = (logits.double() / temperature).softmax(0).tolist()
    kept, total = set(), 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if total >= top_p:
            break
        kept.add(token)
        total += probs[token]
    return [p / total if token in kept else 0.0 for token, p in enumerate(probs)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (1.7, 0.9), (1.0, 0.5), (1.0, 0.01)])
def test_draws_have_the_exact_distribution(temperature: float, top_p: float) -> None:
    counts = Counter(pick(LOGITS, Draw(temperature, top_p, 99, position)) for position in range(DRAWS))
    exact = expected(LOGITS, temperature, top_p)
    assert all(exact[token] > 0 for token in counts)
    for token, p in enumerate(exact):
        # Five standard deviations: wrong once in a million, and the draws are always the same.
        assert counts[token] / DRAWS == pytest.approx(p, abs=5 * (p * (1 - p) / DRAWS) ** 0.5 + 1e-12)


def test_seeds_and_positions_are_independent_and_always_the_same() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    assert uniform(7, 0) == pytest.approx(0.8658075582976756)
    grid = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert grid.min() >= 0
    assert grid.max() < 1
    assert grid.mean().item() == pytest.approx(0.5, abs=0.01)
    assert grid.var().item() == pytest.approx(1 / 12, abs=0.003)
    for shifted in (grid[1:] * grid[:-1], grid[:, 1:] * grid[:, :-1]):
        assert shifted.mean().item() == pytest.approx(0.25, abs=0.01)


def test_greedy_and_almost_greedy_take_the_best() -> None:
    for temperature in (0.0, 1e-9, 1e-4):
        assert {pick(LOGITS, Draw(temperature, 1.0, 1, position)) for position in range(50)} == {0}


def test_the_nucleus_of_a_large_flat_vocabulary_is_exact() -> None:
    # Flat enough that the first guesses at its size are too small.
    probs = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.3).softmax(0)
    kept = nucleus(probs, 0.9)
    inside = kept > 0
    assert torch.equal(kept[inside], probs[inside])
    assert kept.double().sum() >= 0.9
    assert kept.double().sum() - kept[inside].min() < 0.9
    assert probs[~inside].max() <= kept[inside].min()


def test_broken_logits_do_not_raise_and_show_as_nan() -> None:
    for value in (torch.nan, torch.inf):
        broken = torch.tensor([0.0, 1.0, value, 2.0])
        for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9)):
            token = pick(broken, Draw(temperature, top_p, 1, 0))
            assert 0 <= token < 4
            assert math.isnan(describe(broken[None], [token], [0])[0].logprob)


def test_alternatives_are_per_row_and_best_first() -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0)])
    plain, wide = describe(rows, [1, 2], [0, 3])
    logprobs = LOGITS.log_softmax(0)
    assert plain.top == ()
    assert plain.logprob == pytest.approx(logprobs[1].item())
    assert wide.logprob == pytest.approx(logprobs[5].item())
    assert [token for token, _ in wide.top] == [7, 4, 1]
    assert describe(rows, [0, 0], [20, 20])[0].top[0][0] == 0  # more than the vocabulary holds is all of it
