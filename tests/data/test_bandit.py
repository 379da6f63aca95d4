"""The reward and UCB1, against oracles that know nothing of the implementation, and by the properties that are promised."""

import math
import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.data.bandit import Bandit, dice, draw, hold_weights, loss_reduction, upper_bounds
from insitu.data.choice import DELAY, BanditChoice

losses = st.floats(min_value=1e-6, max_value=1e6)


@given(losses, losses)
def test_reward_is_the_exact_relative_reduction(previous: float, current: float) -> None:
    exact = (Fraction(previous) - Fraction(current)) / max(Fraction(previous), Fraction(current))
    assert loss_reduction(previous, current) == pytest.approx(float(exact), rel=1e-15, abs=1e-15)
    assert -1 <= loss_reduction(previous, current) <= 1
    assert loss_reduction(previous, current) == -loss_reduction(current, previous)


@given(losses, losses, st.integers(min_value=-20, max_value=20))
def test_reward_does_not_depend_on_the_level_of_the_loss(previous: float, current: float, exponent: int) -> None:
    factor = 2.0**exponent  # a power of two: products are exact
    assert loss_reduction(previous * factor, current * factor) == loss_reduction(previous, current)


def test_reward_of_pure_noise_is_zero_on_average_where_the_plain_ratio_is_not() -> None:
    noise = np.random.default_rng(0).uniform(0.5, 4.0, size=(40_000, 2))
    ours = np.array([loss_reduction(a, b) for a, b in noise])
    plain = (noise[:, 0] - noise[:, 1]) / noise[:, 0]
    error = ours.std() / math.sqrt(len(ours))
    assert abs(ours.mean()) < 4 * error
    assert plain.mean() < -10 * plain.std() / math.sqrt(len(plain)), "the noise is strong enough to show a bias"


def test_reward_at_a_loss_of_zero_is_finite() -> None:
    assert loss_reduction(0.0, 0.0) == 0
    assert loss_reduction(2.0, 0.0) == 1
    assert loss_reduction(0.0, 2.0) == -1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1])
def test_a_loss_that_is_none_is_refused(bad: float) -> None:
    for pair in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(ValueError, match="gives no reward"):
            loss_reduction(*pair)
    bandit = Bandit([0.0], exploration=1.0, hold=[1, 1], seed=0)
    with pytest.raises(ValueError, match="expected a finite number"):
        bandit.credit(0, math.nan)
    assert bandit.known == [0], "nothing of it was kept"


def test_upper_bounds_are_those_of_auer() -> None:
    rewards = [[0.5, 0.25, 0.75], [0.9], [0.1, 0.2]]
    found = upper_bounds([sum(r) for r in rewards], [3, 1, 2], [3, 1, 2], 1.5)
    for bound, arm in zip(found, rewards, strict=True):
        assert bound == pytest.approx(np.mean(arm) + 1.5 * np.sqrt(np.log(6) / len(arm)), rel=1e-14)
    assert upper_bounds([0.5, 0], [1, 0], [1, 0], 1.0) == [0.5, math.inf]
    assert upper_bounds([0, 0], [0, 0], [0, 0], 1.0) == [math.inf, math.inf]


class _Oracle:
    """UCB1 over holds from nothing but the history, computed anew at each choice."""

    def __init__(self, num_sources: int, exploration: float) -> None:
        self.num_sources, self.exploration = num_sources, exploration

    def choose(self, past: list[tuple[int, list[float]]], known: int) -> int:
        """``past``: (source, losses of its steps) of every hold; the rewards of the first ``known`` holds are there."""
        rewards: list[list[float]] = [[] for _ in range(self.num_sources)]
        means: dict[int, float] = {}
        for index, (source, hold) in enumerate(past):
            if index >= known:
                continue
            now = math.fsum(hold) / len(hold)
            if source in means:
                rewards[source].append((means[source] - now) / max(means[source], now))
            means[source] = now
        plays = [sum(source == k for source, _ in past) for k in range(self.num_sources)]
        if min(plays) < 2:
            return plays.index(min(plays))
        everything = [r for arm in rewards for r in arm]
        rms = math.sqrt(math.fsum(r * r for r in everything) / len(everything))
        N = sum(plays) - self.num_sources
        bounds = [
            (math.fsum(arm) / len(arm) if arm else 0.0)
            + self.exploration * rms * math.sqrt(math.log(N) / (plays[k] - 1))
            for k, arm in enumerate(rewards)
        ]
        return bounds.index(max(bounds))


@pytest.mark.parametrize("seed", range(5))
def test_choices_over_holds_are_the_oracles(seed: int) -> None:
    rng, K = random.Random(seed), 5
    choice = _choice(K, exploration=0.7, hold=[1, 6], seed=seed)
    oracle, past, told = _Oracle(K, 0.7), [], {}
    level = [rng.uniform(1, 8) for _ in range(K)]
    compared = 0
    for step in range(1, 600):
        holds = len(choice.choices)
        (source,) = choice.sources(step, 1, [None] * K)
        if len(choice.choices) > holds:
            known = sum(first + length - 1 <= step - DELAY for first, _, length in choice.choices[:-1])
            past = [(s, [told[t] for t in range(f, f + n)]) for f, s, n in choice.choices[:-1]]
            assert source == oracle.choose(past, known)
            compared += 1
        level[source] *= rng.uniform(0.96, 1.01)
        told[step] = level[source] * rng.uniform(0.95, 1.05)
        choice.observe(step, told[step])
    assert compared > 100
    assert len({source for _, source, _ in choice.choices[20:]}) > 1


def _choice(
    num_sources: int, *, exploration: float = 1.0, hold: list[int], seed: int = 0, floors: list[float] | None = None
) -> BanditChoice:
    bandit = Bandit(floors or [0.0] * num_sources, exploration=exploration, hold=hold, seed=seed)
    return BanditChoice(bandit, [False] * num_sources, 0, [f"s{k}" for k in range(num_sources)])


def _play(choice: BanditChoice, steps: int, loss: Callable[[int, int], float]) -> list[int]:
    """The source of each step; ``loss(source, step)`` is what training on it shows."""
    sources = []
    for step in range(1, steps + 1):
        (source,) = choice.sources(step, 1, [None] * len(choice.names))
        choice.observe(step, loss(source, step))
        sources.append(source)
    return sources


def test_every_source_is_held_twice_before_one_is_preferred() -> None:
    choice = _choice(7, hold=[2, 5])
    _play(choice, 200, lambda source, step: 3.0 / (1 + source))
    first = [source for _, source, _ in choice.choices[:14]]
    assert first == [*range(7), *range(7)]


def test_choices_are_the_same_at_another_level_of_one_sources_loss() -> None:
    def run(factor: float) -> list[int]:
        rng = random.Random(5)
        return _play(
            _choice(4, hold=[2, 5]), 600, lambda k, t: (factor if k == 2 else 1) * rng.uniform(2, 3) / (1 + k * t / 500)
        )

    assert run(64.0) == run(1.0)
    assert len(set(run(1.0)[200:])) == 4


def _regret(seed: int, horizons: list[int], means: list[float], *, uniform: bool = False) -> list[float]:
    """Expected regret after each horizon on arms of stationary Bernoulli rewards, holds of one step."""
    bandit = Bandit([0.0] * len(means), exploration=math.sqrt(2), hold=[1, 1], seed=seed)
    rng, regret, found = random.Random(seed), 0.0, []
    for play in range(1, horizons[-1] + 1):
        source = rng.randrange(len(means)) if uniform else bandit.choose([True] * len(means))[0]
        if not uniform and bandit.holds[source] > 1:
            bandit.credit(source, float(rng.random() < means[source]))
        regret += max(means) - means[source]
        if play in horizons:
            found.append(regret)
    return found


def test_regret_grows_like_the_logarithm_beside_uniform_choice() -> None:
    means, horizons, seeds = [0.9, 0.7, 0.5, 0.3], [1000, 4000, 16_000], range(12)
    ucb = np.array([_regret(seed, horizons, means) for seed in seeds])
    uniform = np.array([_regret(seed, horizons, means, uniform=True) for seed in seeds])
    # Between 4,000 and 16,000 plays a logarithm grows as much as between 1,000 and 4,000, a straight line four times as much.
    assert 0.7 < np.diff(ucb)[:, 1].mean() / np.diff(ucb)[:, 0].mean() < 1.5
    assert 3.8 < np.diff(uniform)[:, 1].mean() / np.diff(uniform)[:, 0].mean() < 4.2
    assert ucb[:, -1].max() < 0.05 * uniform[:, -1].min()
    gaps = [max(means) - mean for mean in means if mean < max(means)]
    bound = sum(8 * math.log(horizons[-1]) / gap for gap in gaps) + (1 + math.pi**2 / 3) * sum(gaps)  # Auer's Theorem 1
    assert ucb[:, -1].max() < bound


@pytest.mark.parametrize("seed", range(4))
def test_the_source_that_still_learns_is_preferred_to_noise_and_to_one_that_only_relearns(seed: int) -> None:
    """Source 0 keeps what it learns. Source 1 falls by half in each hold and is forgotten after it. 2 and 3 are noise."""
    rng, learned, last = random.Random(seed), [0], [0, 0]

    def loss(source: int, step: int) -> float:
        if source == 0:
            learned[0] += 1
            return 6.0 * (1 + learned[0]) ** -0.4 * rng.uniform(0.95, 1.05)
        if source == 1:
            last[1] = last[1] + 1 if last[0] == step - 1 else 0
            last[0] = step
            return 5.0 * 0.93 ** last[1] * rng.uniform(0.95, 1.05)
        return rng.uniform(2.4, 2.6)

    sources = _play(_choice(4, hold=[7, 13], exploration=0.5, seed=seed), 1500, loss)
    counts = [sources.count(k) for k in range(4)]
    assert counts[0] > 1.5 * max(counts[1:]), counts


def _floor_run(floors: list[float], seed: int) -> list[int]:
    """Counts of holds where source 0 has the only rewards; 3,000 holds of one step."""
    learned = [0]

    def loss(source: int, step: int) -> float:
        learned[0] += source == 0
        return 0.999 ** learned[0] if source == 0 else 1.0

    sources = _play(_choice(4, hold=[1, 1], floors=floors, exploration=0.1, seed=seed), 3000, loss)
    return [sources.count(k) for k in range(4)]


@pytest.mark.parametrize("seed", range(3))
def test_a_floor_keeps_its_share_whatever_the_reward(seed: int) -> None:
    without = _floor_run([0.0, 0.0, 0.0, 0.0], seed)
    with_floors = _floor_run([0.0, 0.8, 0.0, 0.2], seed)
    for source, floor in ((1, 0.8), (3, 0.2)):
        share = floor / (1 + 0.8 + 0.2)
        spread = math.sqrt(share * (1 - share) * 3000)
        assert with_floors[source] > 3000 * share - 4 * spread
        assert without[source] < 3000 * share / 2, "it would not have had it anyway"
    assert with_floors[0] > with_floors[3]


def test_a_hold_is_drawn_with_the_larger_of_choice_and_floor() -> None:
    floors, allowed = [0.5, 0.25, 0.0, 1.0], [True, True, True, False]
    assert hold_weights(0, floors, allowed) == [1.0, 0.25, 0.0, 0.0]
    assert hold_weights(2, floors, allowed) == [0.5, 0.25, 1.0, 0.0]


def test_draw_lays_weights_end_to_end() -> None:
    weights = [0.0, 1.0, 0.0, 3.0]
    assert [draw(weights, u) for u in (0.0, 0.2499, 0.25, 0.9999999999999999)] == [1, 1, 3, 3]
    assert {draw([0.1] * 10, dice(0, "d", i)) for i in range(500)} == set(range(10))


def test_dice_are_the_same_for_ever() -> None:
    # Written down: a resumed run must throw what it would have thrown, also with other versions of everything.
    assert [dice(7, "hold", n) for n in range(3)] == [0.1492545224792554, 0.530594074544914, 0.5315787226957727]
    throws = np.array([dice(3, "x", n) for n in range(20_000)])
    assert abs(throws.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(throws))
    assert throws.min() >= 0
    assert throws.max() < 1


def test_holds_have_every_length_in_their_range_equally() -> None:
    bandit = Bandit([0.0], exploration=1.0, hold=[7, 42], seed=0)
    lengths = [bandit.choose([True])[1] for _ in range(7200)]
    counts = np.bincount(lengths, minlength=43)
    assert counts[:7].sum() == 0
    assert len(counts) == 43
    expected = len(lengths) / 36
    assert (np.abs(counts[7:] - expected) < 5 * math.sqrt(expected)).all()
