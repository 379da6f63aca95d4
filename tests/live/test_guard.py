"""The figures of the guard: what an update did to replies it was not asked to change, since the job's start and in all."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import frozen, make_tiny, on_arena

from insitu.data.chat import Example
from insitu.live.canaries import Frozen
from insitu.live.guard import Guard, gap
from insitu.live.limits import GuardLimits
from insitu.live.verdict import judge
from insitu.live.weights.arena import Arena

LIMITS = GuardLimits()
SAID = [Example([(7 * i + 5 * k) % 237 + 3 for i in range(12 + k)], [False] * 6 + [True] * (6 + k)) for k in range(4)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def attached(tiny: Path) -> Iterator[tuple[Arena, Any]]:
    arena, model = on_arena(tiny, requires_grad=True)
    yield arena, model
    arena.close()


@torch.no_grad()
def add_noise(arena: Arena, share: float) -> None:
    """To every tensor, with ``share`` of its own norm."""
    for view in arena.views().values():
        noise = torch.randn(view.shape)
        view.add_(noise * (share * view.float().norm() / noise.norm()))


def guarding(model: Any, limits: GuardLimits = LIMITS, canaries: list[Frozen] | None = None) -> Guard:
    return Guard(model, canaries or frozen(model, SAID), 0, limits)


# -- the gate ----------------------------------------------------------------------------------------------------------
def test_unchanged_weights_pass_with_a_kl_of_nearly_zero(attached: tuple[Arena, Any]) -> None:
    verdict = guarding(attached[1]).gate()
    assert (verdict.level, verdict.reasons) == ("pass", ())
    assert abs(verdict.figures["canary_kl"]) < 1e-4


def test_a_small_change_passes_with_its_figure(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    guard = guarding(model)
    add_noise(arena, 0.05)
    verdict = guard.gate()
    assert verdict.level == "pass"
    assert 1e-3 < verdict.figures["canary_kl"] < 0.3


def test_noise_of_ten_times_the_norm_is_refused_with_its_figure(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    guard = guarding(model)
    add_noise(arena, 10.0)
    verdict = guard.gate()
    assert verdict.refused
    kl = verdict.figures["canary_kl"]
    assert LIMITS.max_canary_kl < kl < math.inf
    assert f"unrelated replies by {kl:.2f} nats per token; the limit is {LIMITS.max_canary_kl:g}" in verdict.reason


def test_the_gates_limit_is_where_its_verdict_turns_and_it_never_warns(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    canaries = frozen(model, SAID)
    loose = guarding(model, GuardLimits(max_canary_kl=100.0), canaries)
    guards = {share: guarding(model, canaries=canaries) for share in (0.99, 1.01)}
    add_noise(arena, 0.3)
    verdict = loose.gate()
    kl = verdict.figures["canary_kl"]
    assert kl > LIMITS.warn_canary_kl
    assert verdict.level == "pass"  # what comes of it is for the audit to say
    for share, guard in guards.items():
        guard._limits = GuardLimits(max_canary_kl=share * kl)
        assert guard.gate().refused is (share < 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(attached: tuple[Arena, Any], value: float) -> None:
    arena, model = attached
    guard = guarding(model, GuardLimits(max_canary_kl=1e9))
    arena.views()["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    verdict = guard.gate()
    assert verdict.refused
    assert "no finite log-probabilities" in verdict.reason
    assert judge(guard.figures(), LIMITS).refused


def test_judging_changes_no_weight_and_keeps_to_the_jobs_start(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    guard = guarding(model)
    image = {name: view.clone() for name, view in arena.views().items()}
    add_noise(arena, 10.0)
    before = arena.sha256()
    assert guard.gate().refused
    assert guard.figures()["canary_kl"] > LIMITS.max_canary_kl
    assert arena.sha256() == before
    assert all(p.grad is None for p in model.parameters())
    for name, view in arena.views().items():
        view.copy_(image[name])
    assert guard.gate().figures["canary_kl"] < 1e-4  # undone, it is what it was


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (2, 2), (8, 2), (16, 2), (17, 3), (40, 5)])
def test_canaries_take_turns_in_parts_of_at_most_eight(attached: tuple[Arena, Any], count: int, parts: int) -> None:
    model = attached[1]
    canaries = [replace(frozen(model, SAID[:1])[0], name=f"canary-{i}") for i in range(count)]
    guard = guarding(model, canaries=canaries)
    assert len(guard._parts) == parts
    assert max(len(part.canaries) for part in guard._parts) <= 8
    assert [row["name"] for row in guard.figures()["canaries"]] == [f"canary-{i}" for i in range(count)]


def test_the_gate_sees_every_canary_within_two_turns(attached: tuple[Arena, Any]) -> None:
    """Only what the last canary says is changed: the head's row of a token that no other has."""
    _, model = attached
    guard = guarding(model)
    kls = [guard.gate().figures["canary_kl"] for _ in range(2)]
    guard._parts[1].start.copy_(guard._parts[1].start.roll(1, dims=-1))  # other distributions for that part alone
    again = [guard.gate().figures["canary_kl"] for _ in range(2)]
    assert again[0] == kls[0]
    assert again[1] > 1


# -- the figures of the audit, against a computation of their own ------------------------------------------------------
def by_hand(model: Any, examples: list[Example]) -> list[torch.Tensor]:
    """Log-probabilities at the targets of each example, float64, one example at a time and without padding."""
    found = []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0].double()
        predicts = [i - 1 for i, target in enumerate(example.loss_mask) if target]
        found.append(logits[predicts].log_softmax(-1))
    return found


def test_every_figure_is_what_its_formula_says(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    canaries = frozen(model, SAID)
    origin = by_hand(model, SAID)
    add_noise(arena, 0.2)  # earlier jobs
    start, guard = by_hand(model, SAID), guarding(model, canaries=canaries)
    add_noise(arena, 0.1)  # this one
    now = by_hand(model, SAID)
    found = guard.figures()

    p0, p, q = torch.cat(origin), torch.cat(start), torch.cat(now)
    targets = torch.tensor([id for e in SAID for id, target in zip(e.input_ids, e.loss_mask, strict=True) if target])
    assert len(targets) == 30  # of different lengths, so that a mean of means would differ

    def kl(reference: torch.Tensor, logprobs: torch.Tensor) -> float:
        return float((reference.exp() * (reference - logprobs)).sum(-1).mean())

    def loss(logprobs: torch.Tensor) -> float:
        return float(-logprobs.gather(-1, targets[:, None]).mean())

    def entropy(logprobs: torch.Tensor) -> float:
        return float(-(logprobs.exp() * logprobs).sum(-1).mean())

    expected = {
        "canary_kl": kl(p, q),
        "drift_kl": kl(p0, q),
        "canary_loss": loss(q) - loss(p),
        "drift_loss": loss(q) - loss(p0),
        "entropy": entropy(q),
        "entropy_before": entropy(p),
        "entropy_change": abs(entropy(q) - entropy(p)),
        "worst_kl": max(kl(a, b) for a, b in zip(start, now, strict=True)),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.02, abs=5e-3)
    assert min(expected["canary_kl"], expected["drift_kl"] - expected["canary_kl"]) > 0.02  # they tell two things
    worst = max(range(4), key=lambda i: kl(start[i], now[i]))
    assert found["worst_canary"] == f"canary-{worst}"
    for i, row in enumerate(found["canaries"]):
        assert row["kl"] == pytest.approx(kl(start[i], now[i]), rel=0.02, abs=5e-3)
        assert row["drift_kl"] == pytest.approx(kl(origin[i], now[i]), rel=0.02, abs=5e-3)


def test_drift_adds_up_over_updates_each_of_which_is_small(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    canaries = frozen(model, SAID)
    kls, drifts = [], []
    for _ in range(12):
        guard = guarding(model, canaries=canaries)
        add_noise(arena, 0.04)
        found = guard.figures()
        kls.append(found["canary_kl"])
        drifts.append(found["drift_kl"])
    limit = GuardLimits(max_canary_kl=2 * max(kls), max_drift_kl=2 * max(kls))
    assert drifts[0] == pytest.approx(kls[0], abs=0.01)
    assert drifts[-1] > 3 * max(kls)  # no single update shows it
    levels = [
        judge({"canary_kl": kl, "drift_kl": d, "since": "0"}, limit).refused for kl, d in zip(kls, drifts, strict=True)
    ]
    assert levels[0] is False
    assert levels[-1] is True


def test_the_figures_say_since_when_each_canary_is_measured(attached: tuple[Arena, Any]) -> None:
    model = attached[1]
    canaries = [replace(c, version=v) for c, v in zip(frozen(model, SAID), (0, 0, 12, 3), strict=True)]
    found = guarding(model, canaries=canaries).figures()
    assert found["since"] == "0, 3, 12"
    assert [row["since"] for row in found["canaries"]] == [0, 0, 12, 3]


def test_one_ruined_canary_shows_although_the_mean_is_calm(attached: tuple[Arena, Any]) -> None:
    model = attached[1]
    guard = guarding(
        model,
        canaries=[
            c for i in range(4) for c in (replace(x, name=f"canary-{x.name[7:]}{i}") for x in frozen(model, SAID))
        ],
    )
    part = guard._parts[0]
    first = part.lengths[0]
    part.start[:first] = part.start[:first].roll(1, dims=-1)
    found = guard.figures()
    assert found["worst_canary"] == part.canaries[0].name
    assert found["worst_kl"] > 10 * found["canary_kl"] > 0
    verdict = judge(
        {**found, "canary_kl": 0.0, "entropy_change": 0.0, "canary_loss": 0.0},
        GuardLimits(max_worst_kl=found["worst_kl"] / 2),
    )
    assert verdict.refused
    assert len(verdict.reasons) == 1


@pytest.mark.parametrize(("scale", "down"), [(3.0, True), (0.2, False)])
def test_entropy_that_falls_and_entropy_that_rises_both_count(
    attached: tuple[Arena, Any], scale: float, down: bool
) -> None:
    arena, model = attached
    guard = guarding(model)
    with torch.no_grad():
        arena.views()["model.norm.weight"].mul_(scale)  # sharper or flatter logits
    found = guard.figures()
    assert (found["entropy"] < found["entropy_before"]) is down
    assert found["entropy_change"] > LIMITS.warn_entropy_change
    only = {name: found[name] for name in ("entropy", "entropy_change")}
    assert judge(only, LIMITS).level != "pass"


def test_canaries_of_another_model_are_an_error(attached: tuple[Arena, Any]) -> None:
    model = attached[1]
    canaries = [replace(c, logprobs=c.logprobs[:, :-1]) for c in frozen(model, SAID)]
    with pytest.raises(ValueError, match="shape"):
        guarding(model, canaries=canaries)


# -- the gap -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("served", "computed", "expected"),
    [
        ([-1.0, -2.0], [-1.0, -2.0], 0.0),
        ([-1.0, -2.0, -3.0], [-1.1, -2.4, -3.1], 0.2),
        ([-1.0, -3.0], [-3.0, -1.0], 2.0),  # differences of either sign do not cancel
        ([-2.5], [-2.0], 0.5),
        ([-1.0] * 9 + [-2.0], [-1.0] * 10, 0.1),  # one token far off counts for one token
        ([math.nan, -2.0], [-1.0, -2.0], math.inf),
        ([-1.0, -9.0], [math.nan, -2.0], math.inf),
        ([-9.0, math.nan, -9.0], [-1.0, -1.0, -1.0], math.inf),
        ([-math.inf], [-1.0], math.inf),
        ([-math.inf], [-math.inf], math.inf),
    ],
)
def test_the_gap_is_the_mean_difference_and_infinite_where_a_number_is_missing(
    served: list[float], computed: list[float], expected: float
) -> None:
    assert gap(served, computed) == pytest.approx(expected)


def test_a_gap_between_lists_of_different_length_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"longer|shorter"):
        gap([-1.0, -2.0], [-1.0])
