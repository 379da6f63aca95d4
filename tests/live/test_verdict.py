"""From figures to a verdict: each limit can be what refuses, nothing else moves it, and more is never milder."""

import json
import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.live.config import TeachConfig
from insitu.live.limits import GuardLimits
from insitu.live.verdict import CHECKS, judge

ORDER = ("pass", "warn", "refuse")
LIMITS = GuardLimits()
# What the sentences name beside the figures.
BESIDE: dict[str, Any] = {"worst_canary": "canary-7", "since": "0", "entropy": 1.0, "repetition": 0.5, "gap": 0.2}
CALM = {**dict.fromkeys(CHECKS, 0.0), **BESIDE}


def test_every_figure_has_its_two_limits_and_every_limit_its_figure() -> None:
    assert {f.name for f in fields(GuardLimits)} == {f"{kind}_{name}" for name in CHECKS for kind in ("warn", "max")}


def test_calm_figures_pass_and_are_kept() -> None:
    verdict = judge(CALM, LIMITS)
    assert (verdict.level, verdict.reasons, verdict.reason) == ("pass", (), "")
    assert verdict.figures == CALM
    assert not verdict.refused


@pytest.mark.parametrize("name", CHECKS)
def test_each_figure_alone_warns_and_refuses_at_its_own_limit(name: str) -> None:
    warn, most = getattr(LIMITS, f"warn_{name}"), getattr(LIMITS, f"max_{name}")
    assert 0 < warn < most
    for value, level in ((warn, "pass"), (warn * 1.01, "warn"), (most, "warn"), (most * 1.01, "refuse")):
        verdict = judge({**CALM, name: value}, LIMITS)
        assert verdict.level == level, value
        assert len(verdict.reasons) == (level != "pass")
    assert f"{most * 1.01:.2f}" in verdict.reason  # to three places where that matters
    assert f"limit is {most:g}" in verdict.reason
    assert f"--teach.max-{name.replace('_', '-')}" in verdict.reason
    assert verdict.refused


@pytest.mark.parametrize("name", CHECKS)
def test_each_limit_can_be_moved_and_moves_nothing_else(name: str) -> None:
    strict = TeachConfig(**{f"warn_{name}": 0.0, f"max_{name}": 0.0})
    loose = TeachConfig(**{f"warn_{name}": 1e6, f"max_{name}": 1e6})
    assert judge(CALM, strict).level == "pass"  # nothing is over nothing
    for other in CHECKS:
        assert judge({**CALM, other: 1e-3}, strict).level == ("refuse" if other == name else "pass")
        assert judge({**CALM, other: 1e3}, loose).level == ("pass" if other == name else "refuse")


def test_a_warn_limit_over_the_other_never_warns() -> None:
    limits = GuardLimits(warn_canary_kl=9.0, max_canary_kl=1.0)
    assert judge({"canary_kl": 0.9}, limits).level == "pass"
    assert judge({"canary_kl": 1.1}, limits).level == "refuse"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*CHECKS, "entropy", "gap", "a figure without a limit"])
def test_a_figure_that_is_not_finite_is_refused_whatever_the_limits(name: str, value: float) -> None:
    limits = GuardLimits(**{f.name: 1e300 for f in fields(GuardLimits)})
    verdict = judge({**CALM, name: value}, limits)
    assert verdict.level == "refuse"
    assert f"{name} is {value}" in verdict.reason
    assert "no finite log-probabilities" in verdict.reason


def test_refusals_come_before_warnings_and_all_are_told() -> None:
    verdict = judge({**CALM, "canary_kl": 0.5, "drift_kl": 9.0, "gap_rise": 0.07}, LIMITS)
    assert verdict.level == "refuse"
    assert [reason.split(" by ")[0] for reason in verdict.reasons] == [
        "unrelated replies have drifted",
        "the update changed unrelated replies",
        "server and learner came to disagree",
    ]
    assert "since version 0" in verdict.reasons[0]
    assert "roll back" in verdict.reasons[0]


def test_what_a_report_keeps_can_be_written_as_json() -> None:
    described = judge({**CALM, "worst_kl": 2.0}, LIMITS).described()
    assert json.loads(json.dumps(described)) == described
    assert described["level"] == "warn"
    assert "canary-7" in described["reasons"][0]
    assert described["figures"]["worst_kl"] == 2.0


FIGURES = st.dictionaries(st.sampled_from(sorted(CHECKS)), st.floats(-1, 12, allow_nan=False), max_size=len(CHECKS))


@given(FIGURES, FIGURES)
def test_the_verdict_is_monotone(figures: dict[str, float], more: dict[str, float]) -> None:
    """No figure that grows, and no further figure, makes it milder."""
    larger = {**figures, **{name: max(value, figures.get(name, value)) for name, value in more.items()}}
    before, after = (ORDER.index(judge({**BESIDE, **f}, LIMITS).level) for f in (figures, larger))
    assert before <= after


@given(FIGURES, st.sampled_from([f.name for f in fields(GuardLimits)]), st.floats(0, 12))
def test_a_lower_limit_is_never_milder(figures: dict[str, float], limit: str, value: float) -> None:
    lower = GuardLimits(**{limit: min(value, getattr(LIMITS, limit))})
    default, stricter = (ORDER.index(judge({**BESIDE, **figures}, limits).level) for limits in (LIMITS, lower))
    assert default <= stricter


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, "1", True, None])
@pytest.mark.parametrize("name", [f.name for f in fields(GuardLimits)])
def test_a_bad_limit_is_refused_by_name(name: str, value: Any) -> None:
    for kind in (GuardLimits, TeachConfig):
        with pytest.raises(ValueError, match=rf"^{name}=.*expected a finite number"):
            kind(**{name: value})


def test_the_teaching_configuration_holds_the_same_defaults() -> None:
    config = TeachConfig()
    for field in fields(GuardLimits):
        assert getattr(config, field.name) == getattr(LIMITS, field.name)
