"""One job as a transaction on the shared weights:

    [prepare -> check -> pause -> write -> gate -> publish -> resume] * steps -> audit

Whoever runs it restores the last committed version when it raises.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from insitu.data.chat import Example
from insitu.live import prompts
from insitu.live.attachment import Attachment
from insitu.live.config import TeachConfig
from insitu.live.guard import MAX_GAP, Guard
from insitu.live.teaching import TeachingRun

_ANCHOR_TOKENS = 24  # of each reply that training holds on to
_CANARY_TOKENS = 12  # of each reply that judges: scored while serving stands still


class RefusedError(Exception):
    """The job must not become a version; the message is the reason shown to the client."""

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


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
        canaries = self.served.replies(prompts.CANARIES, _CANARY_TOKENS)
        guard = Guard(self.served.model, canaries, self.served.pad_token_id, self.config.max_canary_kl)
        self.report["gap_before"] = self.served.gap(canaries[0].input_ids)
        run = TeachingRun(self.served.model, examples, anchors, self.config, self.served.pad_token_id)
        try:
            for step in range(1, self.config.max_steps + 1):
                prepared = run.prepare()
                figures: dict[str, Any] = asdict(prepared)
                self.report["steps"].append(figures)
                if not prepared.finite:
                    raise RefusedError("the examples give no finite loss or gradient; nothing was changed")
                if prepared.loss <= self.config.target_loss:
                    break
                self._write(run, guard, step, figures)
            self.report["optimizer_bytes"] = run.optimizer_bytes
            self.report["weight_bytes"] = sum(slot.num_bytes for slot in self.served.arena.slots)
        finally:
            run.close()
        self._audit(guard, canaries[0])
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
            verdict = guard.judge()
        judged = time.monotonic()
        figures["canary_kl"] = verdict.kl
        if not verdict.ok:
            raise RefusedError(str(verdict.reason), canary_kl=verdict.kl)
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

    def _audit(self, guard: Guard, canary: Example) -> None:
        """All canaries at once; and what the server says of the weights must be what the learner says of them."""
        verdict = guard.judge(whole=True)
        self.report["canary_kl"] = verdict.kl
        if not verdict.ok:
            raise RefusedError(str(verdict.reason), canary_kl=verdict.kl)
        self.report["gap"] = found = self.served.gap(canary.input_ids)
        allowed = self.report["gap_before"] + MAX_GAP
        if not (math.isfinite(found) and found <= allowed):
            raise RefusedError(
                f"server and learner disagree by {found:.2f} nats per token on the same text; the limit is {allowed:.2f}",
                gap=found,
            )
