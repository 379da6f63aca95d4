"""The audit of a job: what the server says of the weights, what it answers by itself, and how the lesson sits."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import frozen, make_tiny, on_arena

from insitu.data.chat import Example
from insitu.live.attachment import Attachment
from insitu.live.config import TeachConfig
from insitu.live.guard import Guard
from insitu.live.transaction import RefusedError, Transaction
from insitu.live.weights.arena import Arena

SAID = [Example([(7 * i + 5 * k) % 237 + 3 for i in range(12 + k)], [False] * 6 + [True] * (6 + k)) for k in range(4)]
JUDGED = SAID[0].input_ids
CONFIG = TeachConfig()
ASKED = ["one", "two", "three", "four"]
CALM = list(range(10, 34))  # a reply of 24 tokens that repeats nothing
LOOP = [10, 11] * 12


def reply(ids: Sequence[int]) -> Example:
    return Example([1, 2, *ids], [False, False] + [True] * len(ids))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def attached(tiny: Path) -> Iterator[tuple[Arena, Any]]:
    arena, model = on_arena(tiny, requires_grad=True)
    yield arena, model
    arena.close()


class Served(Attachment):
    """A server that reads the learner's own weights, is off by ``off`` nats in every token, and answers with ``told``."""

    def __init__(self, model: Any) -> None:
        self.model, self.pad_token_id = model, 0
        self.engine = self  # type: ignore[assignment]
        self.off = 0.0
        self.told: Sequence[Sequence[int]] = [CALM] * len(ASKED)
        self.asked: list[int] = []

    def score(self, ids: Sequence[int]) -> list[float]:
        with torch.no_grad():
            said = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return [float(said[at, id]) + self.off for at, id in enumerate(ids[1:])]

    def replies(self, questions: Sequence[str], max_tokens: int) -> list[Example]:
        self.asked.append(max_tokens)
        assert list(questions) == ASKED
        return [reply(ids) for ids in self.told]


class Audit:
    """As much of a transaction as an audit needs, at the end of a calm job."""

    def __init__(self, model: Any, config: TeachConfig = CONFIG) -> None:
        self.report: dict[str, Any] = {
            "gap_before": 0.0,
            "repetition_before": 0.0,
            "steps": [{"loss": 2.0}, {"loss": 0.04}],
        }
        self.lesson = [reply([50, 51, 52, 53])]
        self.served = Served(model)
        self.guard = Guard(model, frozen(model, SAID), 0, config)
        self.job = Transaction(self.served, 0, config, self.report)

    def __call__(self) -> str:
        self.job._audit(self.guard, JUDGED, ASKED, [reply(CALM)] * len(ASKED), self.lesson)
        return self.verdict["level"]

    @property
    def verdict(self) -> dict[str, Any]:
        found: dict[str, Any] = self.report["verdict"]
        return found


def test_a_calm_job_passes_with_every_figure(attached: tuple[Arena, Any]) -> None:
    audit = Audit(attached[1])
    assert audit() == "pass"
    assert audit.verdict["reasons"] == []
    figures = audit.verdict["figures"]
    for name in (
        "canary_kl",
        "drift_kl",
        "canary_loss",
        "drift_loss",
        "entropy_change",
        "gap_rise",
        "repetition_rise",
        "leak",
    ):
        assert figures[name] == pytest.approx(0, abs=1e-2), name
    assert figures["burn_in"] == pytest.approx(math.exp(-0.04))
    assert audit.served.asked == [24]


def test_the_gap_is_none_on_the_same_weights_and_what_the_server_is_off_otherwise(attached: tuple[Arena, Any]) -> None:
    served = Served(attached[1])
    assert served.gap(JUDGED) < 1e-3
    for served.off in (0.4, -0.4):
        assert served.gap(JUDGED) == pytest.approx(0.4, abs=1e-3)
    served.off = math.nan
    assert served.gap(JUDGED) == math.inf


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [
        (0.0, 0.0, "pass"),
        (0.0, 0.04, "pass"),
        (0.0, 0.06, "warn"),
        (0.0, 0.09, "warn"),
        (0.0, 0.11, "refuse"),
        (0.08, 0.12, "pass"),  # what it was before is allowed, and a little on top
        (0.08, 0.17, "warn"),
        (0.08, 0.19, "refuse"),
        (2.0, 2.04, "pass"),  # the job is judged for what it adds
        (2.0, -0.5, "pass"),
        (0.0, math.nan, "refuse"),
        (0.0, math.inf, "refuse"),
        (math.inf, math.inf, "refuse"),  # a server that said nothing before is not allowed to say nothing now
    ],
)
def test_server_and_learner_may_differ_by_what_they_did_before_the_job_and_a_little_more(
    attached: tuple[Arena, Any], before: float, after: float, level: str
) -> None:
    audit = Audit(attached[1])
    audit.report["gap_before"] = before
    audit.served.off = after
    if level == "refuse":
        with pytest.raises(RefusedError, match=r"came to disagree by .* nats per token|gap is inf"):
            audit()
        assert audit.served.asked == []  # refused already: nothing more is asked
    else:
        audit()
    assert audit.verdict["level"] == level
    assert audit.report["gap"] == pytest.approx(abs(after) if math.isfinite(after) else math.inf, abs=1e-3)
    assert abs(audit.report["canary_kl"]) < 1e-3


@pytest.mark.parametrize(
    ("looping", "before", "level"),
    [(0, 0.0, "pass"), (1, 0.0, "warn"), (2, 0.0, "refuse"), (4, 0.0, "refuse"), (2, 0.5, "pass"), (4, 0.5, "refuse")],
)
def test_replies_that_begin_to_loop_are_noticed_against_those_before(
    attached: tuple[Arena, Any], looping: int, before: float, level: str
) -> None:
    audit = Audit(attached[1])
    audit.report["repetition_before"] = before
    audit.served.told = [LOOP] * looping + [CALM] * (4 - looping)
    if level == "refuse":
        with pytest.raises(RefusedError, match=r"repeat themselves more: the score rose by"):
            audit()
    else:
        audit()
    assert audit.verdict["level"] == level
    assert audit.verdict["figures"]["repetition"] == looping / 4


@pytest.mark.parametrize(("leaking", "level"), [(0, "pass"), (1, "warn"), (4, "warn")])
def test_words_of_the_lesson_where_they_were_not_asked_for_are_a_warning(
    attached: tuple[Arena, Any], leaking: int, level: str
) -> None:
    audit = Audit(attached[1])
    audit.served.told = [[50, 51, *CALM]] * leaking + [CALM] * (4 - leaking)
    assert audit() == level
    assert audit.verdict["figures"]["leak"] == leaking / 4
    if leaking:
        assert audit.verdict["reasons"] == [
            f"words of the lesson came into replies that it was not about: a share of {leaking / 4:.2f} of the canaries; a "
            "warning is given over 0.2"
        ]


@pytest.mark.parametrize(("loss", "level"), [(0.05, "pass"), (0.011, "pass"), (0.009, "warn"), (0.0, "warn")])
def test_a_lesson_learned_by_heart_is_a_warning(attached: tuple[Arena, Any], loss: float, level: str) -> None:
    audit = Audit(attached[1])
    audit.report["steps"][-1]["loss"] = loss
    assert audit() == level


def test_a_lesson_that_was_known_before_is_none(attached: tuple[Arena, Any]) -> None:
    audit = Audit(attached[1])
    audit.report["steps"] = [{"loss": 0.001}]
    assert audit() == "pass"
    assert "burn_in" not in audit.verdict["figures"]


def test_the_audit_asks_all_canaries_before_it_asks_the_server(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    audit = Audit(model)
    with torch.no_grad():
        for view in arena.views().values():
            noise = torch.randn(view.shape)
            view.add_(noise * (10 * view.float().norm() / noise.norm()))
    with pytest.raises(RefusedError, match="changed unrelated replies"):
        audit()
    assert audit.report["canary_kl"] > CONFIG.max_canary_kl
    assert audit.verdict["figures"]["canary_kl"] == audit.report["canary_kl"]
    assert "gap" not in audit.report
    assert audit.served.asked == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_job_before_the_write(
    attached: tuple[Arena, Any], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the third step, when two are written: the job is refused, and whoever runs it restores the version."""
    from insitu.live import teaching

    arena, model = attached
    served = Working(model, arena)
    losses = iter([1.0, 1.0, value])
    real = teaching.example_loss
    monkeypatch.setattr(teaching, "example_loss", lambda *args: real(*args) * next(losses))
    report: dict[str, Any] = {"steps": []}
    job = Transaction(served, 0, TeachConfig(learning_rate=1e-4, max_canary_kl=1e6), report)
    with pytest.raises(RefusedError, match="no finite loss or gradient"):
        job.run([SAID[1]])
    assert len(report["steps"]) == 3
    assert served.writes == 2
    assert arena.header.label == "0+2"


class Working(Served):
    """A server through a whole job: it pauses, publishes and resumes, and notes how often."""

    def __init__(self, model: Any, arena: Arena) -> None:
        super().__init__(model)
        self.arena, self._threads, self.store = arena, 1, None  # type: ignore[assignment]
        self.writes = 0

    def canaries(self) -> list[Any]:
        return frozen(self.model, SAID)

    def replies(self, questions: Sequence[str], max_tokens: int) -> list[Example]:
        return [Example([1, 2, 3, 4 + i], [False, False, True, True]) for i, _ in enumerate(questions)]

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def publish(self) -> Any:
        self.writes += 1

        class Report:
            seconds = 0.0

        return Report
