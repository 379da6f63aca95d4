"""The learner: a process of its own that takes jobs from the store and turns each into a version, or into nothing.

A job is a transaction on the shared weights:

    reserve id -> [prepare -> check -> pause -> write -> gate -> publish -> resume] * steps -> audit -> file -> commit

Whatever fails between the first write and the commit, the weights are restored from the last committed version before anyone
is answered from them again. If this process dies instead, the server notices and restores them (:mod:`insitu.live.server`).
"""

import fcntl
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from insitu.data.batch import collate
from insitu.data.chat import DataError, Example, encode_continuation, encode_messages, encode_prompt
from insitu.data.loss import target_logprobs
from insitu.live import prompts, proof
from insitu.live.config import TeachConfig
from insitu.live.control import EngineClient
from insitu.live.guard import MAX_GAP, MAX_GAP_AT_START, Guard, gap
from insitu.live.records import Feedback, Rollback
from insitu.live.store import Store
from insitu.live.teaching import TeachingRun
from insitu.live.versions import Versions
from insitu.live.weights import attach

log = logging.getLogger("insitu.learner")

_POLL_SECONDS = 0.05
_GATHER_SECONDS = 0.5  # feedback posted one by one within this time is learned together
_MAX_ITEMS = 32  # in one job
_ANCHOR_TOKENS = 24  # of each reply that training holds on to
_CANARY_TOKENS = 12  # of each reply that judges: scored while serving stands still


class RefusedError(Exception):
    """The job must not become a version; the message is the reason shown to the client."""

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


class Learner:
    """One attachment to one server: the model on its arena, and the jobs done there."""

    def __init__(self, engine: EngineClient, store: Store, base: Path, state_dir: Path, config: TeachConfig) -> None:
        from transformers import AutoTokenizer

        self.engine = engine
        self.store = store
        self.config = config
        self.versions = Versions(state_dir, base, store)
        self.arena = engine.arena
        self.views = self.arena.views()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = attach.build(base, self.arena, requires_grad=True)
        self.aliases = attach.tied(self.model)
        self.context_length = int(self.model.config.max_position_embeddings)
        self.pad_token_id = int(self.tokenizer.pad_token_id or 0)
        self._threads = torch.get_num_threads()
        try:
            self._verify()
            if not engine.proven:
                self._prove()
            self._agree()
        except attach.AttachError as error:
            engine.refuse(str(error))
            raise
        engine.ready()

    def _verify(self) -> None:
        """What lies in the arena must be, bit for bit, the version that the store says was committed last."""
        head = self._head()
        recorded = self.store.version(head)
        if recorded is None or self.arena.sha256() != recorded.sha256:
            raise attach.AttachError(
                f"the weights in memory are not version {head} (sha256 differs); refusing to train them"
            )

    def _prove(self) -> None:
        """This server has not answered anybody yet: show that it reads what lies in the arena."""
        head = self._head()
        speed = proof.compare(self.views, self.versions.iter_version(head), self.aliases)
        ids = encode_prompt(self.tokenizer, [{"role": "user", "content": prompts.CANARIES[0]}])
        last = [name for name, parameter in self.model.named_parameters() if parameter.dim() == 1][-1]

        def expose() -> None:
            self.engine.publish()
            self.engine.resume()

        moved = proof.probe(self.arena, last, lambda: self.engine.score(ids), expose, self.engine.pause)
        log.info("compared at %.2f GB/s; one element of %s moves the server by %.2g nats", speed / 1e9, last, moved)

    def _agree(self) -> None:
        """Server and learner say the same of the same text, as far as their kernels allow."""
        ids = encode_prompt(self.tokenizer, [{"role": "user", "content": prompts.CANARIES[0]}])
        if not (found := self._gap(ids)) <= MAX_GAP_AT_START:
            raise attach.AttachError(
                f"server and learner disagree by {found:.2f} nats per token on the same text; the limit is {MAX_GAP_AT_START}"
            )

    def _head(self) -> int:
        head = self.store.head()
        if head is None:
            raise attach.AttachError("the state directory has no committed version; start the server first")
        return head

    # -- jobs ----------------------------------------------------------------------------------------------------------
    def work(self) -> None:
        """Do jobs until the server is gone (ConnectionError)."""
        waiting_since: float | None = None
        while True:
            for request in self.store.open_rollbacks():
                self.roll_back(request)
            items = self.store.queued(_MAX_ITEMS)
            if items:
                # A file of examples arrives as many posts: wait for a short silence, or a full job.
                waiting_since = waiting_since or time.monotonic()
                silent = time.time() - items[-1].created > _GATHER_SECONDS
                if silent or len(items) == _MAX_ITEMS or time.monotonic() - waiting_since > 10 * _GATHER_SECONDS:
                    waiting_since = None
                    self.teach(items)
                    continue
            if self.engine.server_gone():
                raise ConnectionError("the server is gone")
            time.sleep(_POLL_SECONDS)

    def teach(self, items: Sequence[Feedback]) -> None:
        """Learn from these items as one version; items that cannot be encoded are refused one by one."""
        encoded: list[tuple[Feedback, Example]] = []
        for item in items:
            try:
                encoded.append((item, self._encode(item)))
            except DataError as error:
                self.store.refuse(item.id, str(error))
        if not encoded:
            return
        parent = self._head()
        version = self.store.reserve("teach", parent, feedback=[item.id for item, _ in encoded])
        log.info("version %d: learning from %d examples", version, len(encoded))
        report: dict[str, Any] = {"examples": len(encoded), "config": asdict(self.config), "steps": []}
        try:
            self._run(parent, [example for _, example in encoded], report)
            self.versions.write(version, self.views)
            self.store.commit(version, self.arena.sha256(), report)
        except ConnectionError:
            self.store.abandon(version, "lost", "the server went away during the job", report)
            raise
        except RefusedError as error:
            self._undo(parent)
            self.store.abandon(version, "refused", str(error), {**report, **error.figures})
            log.warning("version %d refused: %s", version, error)
        except Exception as error:
            # Anything that goes wrong in a job (a full disk, memory, our own bug) ends the job and not the service; the
            # reason goes to whoever asked, the traceback to the log.
            self._undo(parent)
            reason = f"{type(error).__name__}: {error}"
            self.store.abandon(version, "refused", reason, report)
            log.exception("version %d failed", version)
        else:
            # Outside the try: a committed version is never taken back, whatever becomes of this process now.
            log.info("version %d committed", version)
            self._serve_as(version)

    def _encode(self, item: Feedback) -> Example:
        payload = item.payload
        frozen = bool(payload.get("freeze_context", False))
        if item.kind == "messages":
            return encode_messages(
                self.tokenizer, payload["messages"], max_length=self.context_length, freeze_context=frozen
            )
        return encode_continuation(
            payload["context_ids"],
            payload["continuation_ids"],
            vocab_size=self.model.config.vocab_size,
            max_length=self.context_length,
            freeze_context=frozen,
        )

    def _run(self, parent: int, examples: list[Example], report: dict[str, Any]) -> None:
        """The steps and the audit; raises RefusedError, with the weights possibly changed."""
        started = time.monotonic()
        anchors = self._replies(prompts.ANCHORS, _ANCHOR_TOKENS)
        canaries = self._replies(prompts.CANARIES, _CANARY_TOKENS)
        guard = Guard(self.model, canaries, self.pad_token_id, self.config.max_canary_kl)
        report["gap_before"] = self._gap(canaries[0].input_ids)
        run = TeachingRun(self.model, examples, anchors, self.config, self.pad_token_id)
        try:
            for step in range(1, self.config.max_steps + 1):
                prepared = run.prepare()
                figures: dict[str, Any] = asdict(prepared)
                report["steps"].append(figures)
                if not prepared.finite:
                    raise RefusedError("the examples give no finite loss or gradient; nothing was changed")
                if prepared.loss <= self.config.target_loss:
                    break
                self._write(run, guard, parent, step, figures)
            report["optimizer_bytes"] = run.optimizer_bytes
            report["weight_bytes"] = sum(slot.num_bytes for slot in self.arena.slots)
        finally:
            run.close()
        self._audit(guard, canaries[0], report)
        report["seconds"] = round(time.monotonic() - started, 3)

    def _write(self, run: TeachingRun, guard: Guard, parent: int, step: int, figures: dict[str, Any]) -> None:
        """One step that everybody sees: pause, write, gate, publish, resume."""
        begun = time.monotonic()
        self.engine.pause()
        paused = time.monotonic()
        with self._all_cores():
            self.arena.mark_writing()
            run.write()
            written = time.monotonic()
            verdict = guard.judge()
        judged = time.monotonic()
        figures["canary_kl"] = verdict.kl
        if not verdict.ok:
            raise RefusedError(str(verdict.reason), canary_kl=verdict.kl)
        self.arena.stamp(parent, step)
        published = self.engine.publish()
        self.engine.resume()
        figures["stall"] = {
            "pause": paused - begun,
            "write": written - paused,
            "gate": judged - written,
            "publish": published.seconds,
            "total": time.monotonic() - begun,
        }

    def _audit(self, guard: Guard, canary: Example, report: dict[str, Any]) -> None:
        """All canaries at once; and what the server says of the weights must be what the learner says of them."""
        verdict = guard.judge(whole=True)
        report["canary_kl"] = verdict.kl
        if not verdict.ok:
            raise RefusedError(str(verdict.reason), canary_kl=verdict.kl)
        report["gap"] = found = self._gap(canary.input_ids)
        allowed = report["gap_before"] + MAX_GAP
        if not (math.isfinite(found) and found <= allowed):
            raise RefusedError(
                f"server and learner disagree by {found:.2f} nats per token on the same text; the limit is {allowed:.2f}",
                gap=found,
            )

    def _gap(self, ids: list[int]) -> float:
        """Between what the server says of these tokens and what the learner computes, see :func:`insitu.live.guard.gap`."""
        whole = Example(ids, [False] + [True] * (len(ids) - 1))
        batch = collate([whole], self.pad_token_id, device=self.model.device)
        return gap(self.engine.score(ids), target_logprobs(self.model, batch)[0].tolist())

    def _serve_as(self, version: int) -> None:
        """The bytes already are this version's: let every answer from now on say so."""
        self.engine.pause()
        self.arena.stamp(version)
        self.engine.publish()
        self.engine.resume()

    def _undo(self, parent: int) -> None:
        """Put the last committed version back, and serve it; nothing to do if no weight was written yet."""
        header = self.arena.header
        if header.step or header.writer:
            self.engine.pause()
            self.versions.restore(parent, self.arena, self.aliases)
            self.engine.publish()
        if self.engine.paused:
            self.engine.resume()

    def roll_back(self, request: Rollback) -> None:
        """Serve the bytes of an older version again, as a new version."""
        parent = self._head()
        done = self.store.version(parent)
        if request.status == "running" and done and done.target == request.target and done.created >= request.created:
            # An earlier learner died between the commit and this note of it.
            self.store.update_rollback(request.id, "done", version=parent)
            return
        self.store.update_rollback(request.id, "running")
        started = time.monotonic()
        try:
            self.versions.content(request.target)  # refuses an unknown version before an id is spent on it
        except ValueError as error:
            self.store.update_rollback(request.id, "failed", reason=str(error))
            return
        version = self.store.reserve("rollback", parent, target=request.target)
        self.engine.pause()
        try:
            self.versions.restore(request.target, self.arena, self.aliases)
        except Exception as error:
            self.versions.restore(parent, self.arena, self.aliases)
            self.engine.publish()
            self.engine.resume()
            self.store.abandon(version, "refused", str(error), {})
            self.store.update_rollback(request.id, "failed", reason=str(error))
            return
        self.store.commit(version, self.arena.sha256(), {"seconds": round(time.monotonic() - started, 3)})
        self.arena.stamp(version)
        self.engine.publish()
        self.engine.resume()
        self.store.update_rollback(request.id, "done", version=version)
        log.info("version %d: rolled back to version %d", version, request.target)

    # -- helpers -------------------------------------------------------------------------------------------------------
    def _replies(self, questions: Sequence[str], max_tokens: int) -> list[Example]:
        """The served model's own greedy replies to these questions, as examples."""
        asked = [encode_prompt(self.tokenizer, [{"role": "user", "content": question}]) for question in questions]
        told = self.engine.generate(asked, max_tokens)
        return [
            Example([*prompt, *reply], [False] * len(prompt) + [True] * len(reply))
            for prompt, reply in zip(asked, told, strict=True)
        ]

    @contextmanager
    def _all_cores(self) -> Iterator[None]:
        """Serving stands still, so its cores are free."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)


def run(state_dir: Path, config: TeachConfig, linger: float = 60.0) -> None:
    """The learner process: attach to the server of ``state_dir``, work, and attach again when the server was replaced.

    Ends by itself when no server has been there for ``linger`` seconds. Only one learner may hold a state directory.
    """
    with (state_dir / "learner.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another learner already works on {state_dir}") from None
        store = Store(state_dir / "insitu.db")
        last_seen = time.monotonic()
        while time.monotonic() - last_seen < linger:
            try:
                engine = EngineClient(state_dir / "run" / "engine.sock")
            except OSError:
                time.sleep(0.2)
                continue
            try:
                _forget_the_dead(store)
                Learner(engine, store, Path(str(store.get_meta("base"))), state_dir, config).work()
            except ConnectionError:
                log.warning("the server is gone; waiting up to %.0f s for another", linger)
            finally:
                engine.close()
            last_seen = time.monotonic()
    log.warning("no server for %.0f s; the learner ends", linger)


def _forget_the_dead(store: Store) -> None:
    """Versions that an earlier learner had begun when it died will never be committed; rollbacks are simply done again."""
    for version in store.versions():
        if version.status == "reserved" and version.kind != "base":
            store.abandon(version.id, "lost", "the process that trained it died", version.report)
            log.warning("version %d is lost: the process that trained it died", version.id)


def main() -> None:
    """``python -m insitu.live.learner STATE_DIR CONFIG_JSON``: started by the server, not by hand."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    state_dir, config = sys.argv[1:]
    run(Path(state_dir), TeachConfig(**json.loads(config)))


if __name__ == "__main__":
    main()
