"""The verdict on an update: unrelated replies may move a little, and not more."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny, on_arena

from insitu.data.chat import Example
from insitu.live.attachment import Attachment
from insitu.live.config import TeachConfig
from insitu.live.guard import MAX_GAP, Guard, gap
from insitu.live.transaction import RefusedError, Transaction
from insitu.live.weights.arena import Arena

LIMIT = 1.5
CANARIES = [
    Example([(7 * i + 5 * k) % 237 + 3 for i in range(12 + k)], [False] * 6 + [True] * (6 + k)) for k in range(4)
]


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


def test_unchanged_weights_pass_with_a_kl_of_nearly_zero(attached: tuple[Arena, Any]) -> None:
    _, model = attached
    verdict = Guard(model, CANARIES, 0, LIMIT).judge()
    assert verdict.ok
    assert verdict.reason is None
    assert 0 <= verdict.kl < 1e-3


def test_a_small_change_passes_with_its_figure(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    guard = Guard(model, CANARIES, 0, LIMIT)
    add_noise(arena, 0.05)
    verdict = guard.judge()
    assert verdict.ok
    assert 1e-3 < verdict.kl < 0.3


def test_noise_of_ten_times_the_norm_is_refused_with_its_figure(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    guard = Guard(model, CANARIES, 0, LIMIT)
    add_noise(arena, 10.0)
    verdict = guard.judge()
    assert not verdict.ok
    assert LIMIT < verdict.kl < math.inf
    assert verdict.reason is not None
    assert re.search(rf"by {verdict.kl:.2f} nats per token.*limit is {LIMIT}", verdict.reason)


def test_the_limit_is_where_the_verdict_turns(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    guards = {limit: Guard(model, CANARIES, 0, limit) for limit in (0.0, 1.0)}
    add_noise(arena, 0.3)
    kl = guards[1.0].judge().kl
    assert guards[0.0].judge() != guards[1.0].judge()
    for limit, ok in ((kl * 0.99, False), (kl * 1.01, True)):
        guard = guards[0.0]
        guard._max_kl = limit
        assert guard.judge().ok is ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(attached: tuple[Arena, Any], value: float) -> None:
    arena, model = attached
    guard = Guard(model, CANARIES, 0, max_kl=1e9)
    arena.views()["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    verdict = guard.judge()
    assert not verdict.ok
    assert verdict.reason is not None
    assert "no finite log-probabilities" in verdict.reason


def test_judging_changes_no_weight_and_keeps_to_the_jobs_start(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    guard = Guard(model, CANARIES, 0, LIMIT)
    image = {name: view.clone() for name, view in arena.views().items()}
    add_noise(arena, 10.0)
    before = arena.sha256()
    assert not guard.judge().ok
    assert arena.sha256() == before
    assert all(p.grad is None for p in model.parameters())
    for name, view in arena.views().items():
        view.copy_(image[name])
    assert guard.judge().kl < 1e-3  # undone, it is what it was


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


# -- the audit: server and learner must go on saying the same ----------------------------------------------------------
class Served:
    """A server that reads the learner's own weights, and is off by ``off`` nats in every token."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.off = 0.0

    def score(self, ids: Sequence[int]) -> list[float]:
        with torch.no_grad():
            said = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return [float(said[at, id]) + self.off for at, id in enumerate(ids[1:])]


def auditor(model: Any, report: dict[str, Any] | None = None) -> tuple[Transaction, Served]:
    """As much of a transaction as an audit needs."""
    attachment = object.__new__(Attachment)
    served = Served(model)
    attachment.model, attachment.engine, attachment.pad_token_id = model, served, 0  # type: ignore[assignment]
    return Transaction(attachment, 0, TeachConfig(), {} if report is None else report), served


def test_the_gap_is_none_on_the_same_weights_and_what_the_server_is_off_otherwise(attached: tuple[Arena, Any]) -> None:
    job, served = auditor(attached[1])
    assert job.served.gap(CANARIES[0].input_ids) < 1e-3
    for served.off in (0.4, -0.4):
        assert job.served.gap(CANARIES[0].input_ids) == pytest.approx(0.4, abs=1e-3)
    served.off = math.nan
    assert job.served.gap(CANARIES[0].input_ids) == math.inf


@pytest.mark.parametrize(
    ("before", "after", "ok"),
    [
        (0.0, 0.0, True),
        (0.0, 0.09, True),
        (0.0, 0.11, False),
        (0.08, 0.17, True),  # what it was before is allowed, and as much again on top
        (0.08, 0.19, False),
        (2.0, 2.05, True),  # the job is judged for what it adds
        (2.0, -0.5, True),
        (0.0, math.nan, False),
        (0.0, math.inf, False),
        (math.inf, math.inf, False),  # a server that said nothing before is not allowed to say nothing now
    ],
)
def test_the_audit_allows_what_server_and_learner_differed_by_before_the_job_and_a_little_more(
    attached: tuple[Arena, Any], before: float, after: float, ok: bool
) -> None:
    assert MAX_GAP == 0.1
    _, model = attached
    report = {"gap_before": before}
    job, served = auditor(model, report)
    guard = Guard(model, CANARIES, 0, LIMIT)
    served.off = after
    if ok:
        job._audit(guard, CANARIES[0])
    else:
        said = rf"disagree by .* nats per token.*limit is {before + MAX_GAP:.2f}"
        with pytest.raises(RefusedError, match=said) as refused:
            job._audit(guard, CANARIES[0])
        assert refused.value.figures == {"gap": report["gap"]}
    expected = abs(after) if math.isfinite(after) else math.inf
    assert report["gap"] == pytest.approx(expected, abs=1e-3)
    assert 0 <= report["canary_kl"] < 1e-3


def test_the_audit_asks_all_canaries_before_it_asks_the_server(attached: tuple[Arena, Any]) -> None:
    arena, model = attached
    report = {"gap_before": 0.0}
    job, _ = auditor(model, report)
    guard = Guard(model, CANARIES, 0, LIMIT)
    add_noise(arena, 10.0)
    with pytest.raises(RefusedError, match="changed unrelated replies") as refused:
        job._audit(guard, CANARIES[0])
    assert refused.value.figures == {"canary_kl": report["canary_kl"]}
    assert report["canary_kl"] > LIMIT
    assert "gap" not in report
