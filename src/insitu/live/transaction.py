"""One job as a transaction on the shared weights:

    [prepare -> check -> pause -> write -> gate -> publish -> resume] * steps -> audit

Whoever runs it restores the last committed version when it raises.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from insitu.data.chat import Example
from insitu.diagnostics.collapse import repetition
from insitu.live import prompts
from insitu.live.attachment import Attachment
from insitu.live.config import TeachConfig
from insitu.live.guard import Guard
from insitu.live.leak import leak
from insitu.live.replay import replays
from insitu.live.teaching import TeachingRun
from insitu.live.verdict import Verdict, judge

log = logging.getLogger("insitu.learner")

_ANCHOR_TOKENS = 24  # of each reply that training holds on to
_TALK_TOKENS = 24  # of each reply in which repetition and leaks are looked for: a loop wants room to go round


class RefusedError(Exception):
    """The job must not become a version; the message is the reason shown to the client."""


class Transaction:
    """The steps of one job on the weights of ``served``, which are version ``parent``; figures go into ``report``."""

    def __init__(self, served: Attachment, parent: int, config: TeachConfig, report: dict[str, Any]) -> None:
        self.served = served
        self.parent = parent
        self.config = config
        self.report = report

    def run(self, examples: Sequence[Example]) -> None:
        """The steps and the audit; raises RefusedError, with the weights possibly changed."""
        started = time.monotonic()
        anchors = self.served.replies(prompts.ANCHORS, _ANCHOR_TOKENS)
        canaries = self.served.canaries()
        asked = [canary.prompt for canary in canaries]
        guard = Guard(self.served.model, canaries, self.served.pad_token_id, self.config)
        judged = canaries[0].example.input_ids
        self.report["gap_before"] = self.served.gap(judged)
        talk = self.served.replies(asked, _TALK_TOKENS)
        self.report["repetition_before"] = _repetition(talk)
        held = replays(
            self.served.store, self.served.encode, examples, self.config.replay, self.config.seed + self.parent
        )
        self.report["replayed"] = len(held)
        run = TeachingRun(self.served.model, examples, anchors, self.config, self.served.pad_token_id, held)
        try:
            for step in range(1, self.config.max_steps + 1):
                prepared = run.prepare()
                figures: dict[str, Any] = asdict(prepared)
                self.report["steps"].append(figures)
                if not prepared.finite:
                    raise RefusedError("the examples give no finite loss or gradient; the last step was not written")
                if prepared.loss <= self.config.target_loss:
                    break
                self._write(run, guard, step, figures)
            self.report["optimizer_bytes"] = run.optimizer_bytes
            self.report["weight_bytes"] = sum(slot.num_bytes for slot in self.served.arena.slots)
        finally:
            run.close()
        self._audit(guard, judged, asked, talk, examples)
        self.report["seconds"] = round(time.monotonic() - started, 3)

    def _write(self, run: TeachingRun, guard: Guard, step: int, figures: dict[str, Any]) -> None:
        """One step that everybody sees: pause, write, gate, publish, resume."""
        begun = time.monotonic()
        self.served.engine.pause()
        paused = time.monotonic()
        with self.served.all_cores():
            self.served.arena.mark_writing()
            run.write()
            written = time.monotonic()
            verdict = guard.gate()
        judged = time.monotonic()
        figures["canary_kl"] = self.report["canary_kl"] = verdict.figures["canary_kl"]
        self._heed(verdict)
        self.served.arena.stamp(self.parent, step)
        published = self.served.engine.publish()
        self.served.engine.resume()
        figures["stall"] = {
            "pause": paused - begun,
            "write": written - paused,
            "gate": judged - written,
            "publish": published.seconds,
            "total": time.monotonic() - begun,
        }

    def _audit(
        self,
        guard: Guard,
        judged: list[int],
        asked: Sequence[str],
        talk: Sequence[Example],
        lesson: Sequence[Example],
    ) -> None:
        """The verdict on the job: all canaries at once; what the server says of the weights against what the learner says of
        them; and what it now answers by itself, where it said ``talk`` before. The dear figures last: a job that is refused
        needs no more of them."""
        figures = guard.figures()
        self.report["canary_kl"] = figures["canary_kl"]
        steps = self.report["steps"]
        if len(steps) > 1:  # a lesson that was known already was not burnt in by this job
            figures["burn_in"] = math.exp(-steps[-1]["loss"])
        self._heed(judge(figures, self.config))
        self.report["gap"] = figures["gap"] = self.served.gap(judged)
        figures["gap_rise"] = figures["gap"] - self.report["gap_before"]
        self._heed(judge(figures, self.config))
        now = self.served.replies(asked, _TALK_TOKENS)
        figures["leak"] = leak(lesson, talk, now)
        figures["repetition"] = _repetition(now)
        figures["repetition_rise"] = figures["repetition"] - self.report["repetition_before"]
        verdict = judge(figures, self.config)
        self._heed(verdict)
        if verdict.level == "warn":
            log.warning("the job on version %d passes with a warning: %s", self.parent, verdict.reason)

    def _heed(self, verdict: Verdict) -> None:
        self.report["verdict"] = verdict.described()
        if verdict.refused:
            raise RefusedError(verdict.reason)


def _repetition(told: Sequence[Example]) -> float:
    """Mean score of replies."""
    scores = [
        repetition([id for id, said in zip(e.input_ids, e.loss_mask, strict=True) if said])  # the reply alone
        for e in told
    ]
    return sum(scores) / len(scores)
