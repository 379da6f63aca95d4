"""The learner: a process of its own that takes jobs from the store and turns each into a version, or into nothing.

A job is a transaction on the shared weights:

    reserve id -> [prepare -> check -> pause -> write -> gate -> publish -> resume] * steps -> audit -> file -> commit

Whatever fails between the first write and the commit, the weights are restored from the last committed version before anyone
is answered from them again. If this process dies instead, the server notices and restores them (:mod:`insitu.live.server`).
"""

import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from insitu.data.chat import DataError, Example
from insitu.live import disk, retention
from insitu.live.attachment import Attachment
from insitu.live.checkpoint import VersionError
from insitu.live.config import TeachConfig
from insitu.live.control import EngineClient, HeldError
from insitu.live.degenerate import refuse_degenerate
from insitu.live.events import note
from insitu.live.gathering import MAX_ITEMS, Gathering
from insitu.live.records import Feedback, NotQueuedError, Rollback
from insitu.live.store import Store
from insitu.live.transaction import RefusedError, Transaction
from insitu.live.versions import Versions

log = logging.getLogger("insitu.learner")

_POLL_SECONDS = 0.05
_FULL = "the disk was full"
_ROOM_SECONDS = 1.0  # between two looks whether a full disk has room again


class Learner:
    """The jobs done at one server."""

    def __init__(self, engine: EngineClient, store: Store, base: Path, state_dir: Path, config: TeachConfig) -> None:
        self.engine = engine
        self.store = store
        self.config = config
        self.versions = Versions(state_dir, base, store)
        self.served = Attachment(engine, store, self.versions, base)
        self.arena = engine.arena
        self._tidy(self.served.head())

    def work(self) -> None:
        """Do jobs until the server is gone (ConnectionError)."""
        gathered = Gathering()
        ended = "the process that trained it died"
        note(self.store, "learner.attached", "learner", pid=os.getpid(), head=self.store.head())
        while True:
            try:
                if ended:
                    _give_up_reserved(self.store, ended, counted=ended != _FULL)
                    self.versions.discard_uncommitted()
                    ended = ""
                self._next(gathered)
            except Exception as error:
                if not disk.is_full(error):
                    raise
                log.error("the disk is full: %s", error)
                ended = _FULL
                self._await_room(error)
            if self.engine.server_gone():
                raise ConnectionError("the server is gone")
            time.sleep(_POLL_SECONDS)

    def _next(self, gathered: Gathering) -> None:
        """What is to be done now, if anything."""
        for request in self.store.open_rollbacks():
            self.roll_back(request)
        items = self.store.queued(MAX_ITEMS)
        if gathered.complete(items):
            with suppress(NotQueuedError):  # held or withdrawn just now: the others are taken next time
                self.teach(items)

    def _await_room(self, error: Exception) -> None:
        """Serve the last committed version, say why nothing is learned, and return when a version would fit again."""
        head = self.served.head()
        if self.arena.header.version != head:  # a rollback that could not be committed
            self.engine.pause()
            self.arena.mark_writing()
        self._undo(head)
        self.versions.discard_uncommitted()  # the file of a version that could not be committed takes up room
        known = isinstance(error, retention.NoRoomError)
        self.engine.degraded(str(error) if known else disk.describe(self.versions.directory, error))
        while not self._has_room():
            if self.engine.server_gone():
                raise ConnectionError("the server is gone")
            time.sleep(_ROOM_SECONDS)
        time.sleep(_ROOM_SECONDS)  # the store may have a limit of its own: not as often as it can be tried
        self.engine.degraded(None)

    def teach(self, items: Sequence[Feedback]) -> None:
        """Learn from these items as one version; items that cannot be encoded are refused one by one."""
        encoded: list[tuple[Feedback, Example]] = []
        for item in items:
            try:
                example = self.served.encode(item)
                refuse_degenerate(example, self.config.max_lesson_repetition)
                encoded.append((item, example))
            except DataError as error:
                self.store.refuse(item.id, str(error))
        if not encoded:
            return
        # Before anything is begun: what is queued stays queued until there is room.
        retention.require_room(self.versions, self.arena.num_bytes, self.config.disk_limit_gb)
        parent = self.served.head()
        version = self.store.reserve("teach", parent, feedback=[item.id for item, _ in encoded])
        log.info("version %d: learning from %d examples", version, len(encoded))
        report: dict[str, Any] = {"examples": len(encoded), "config": asdict(self.config), "steps": []}
        try:
            Transaction(self.served, parent, self.config, report).run([example for _, example in encoded])
            file = self.versions.write(version, self.served.views)
            report["update_norm_ratio"] = file.norm_ratio
            self.store.commit(version, self.arena.sha256(), report, file)
        except ConnectionError:
            self.store.abandon(version, "lost", "the server went away during the job", report)
            raise
        except RefusedError as error:
            self._undo(parent)
            self.store.abandon(version, "refused", str(error), report)
            log.warning("version %d refused: %s", version, error)
        except Exception as error:
            # Anything that goes wrong in a job (memory, our own bug) ends the job and not the service; the
            # reason goes to whoever asked, the traceback to the log.
            self._undo(parent)
            if disk.is_full(error):
                raise  # the lesson is not at fault: it is taken up again when there is room
            reason = f"{type(error).__name__}: {error}"
            self.store.abandon(version, "refused", reason, report)
            log.exception("version %d failed", version)
        else:
            # Outside the try: a committed version is never taken back, whatever becomes of this process now.
            log.info("version %d committed", version)
            self._serve_as(version)
            self._tidy(version)

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
            self.versions.restore(parent, self.arena, self.served.aliases)
            self.engine.publish()
        if self.engine.paused:
            self.engine.resume()

    def roll_back(self, request: Rollback) -> None:
        """Serve the bytes of an older version again, as a new version."""
        parent = self.served.head()
        done = self.store.version(parent)
        if request.status == "running" and done and done.target == request.target and parent > request.after:
            # An earlier learner died between the commit and this note of it.
            self.store.update_rollback(request.id, "done", version=parent)
            return
        self.store.update_rollback(request.id, "running")
        started = time.monotonic()
        try:
            self._bring_near(request.target)  # refuses one that is unknown or damaged before an id is spent on it
        except VersionError as error:
            self.store.update_rollback(request.id, "failed", reason=str(error))
            return
        version = self.store.reserve("rollback", parent, target=request.target)
        self.engine.pause()
        try:
            self.versions.restore(request.target, self.arena, self.served.aliases)
        except Exception as error:
            self.versions.restore(parent, self.arena, self.served.aliases)
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
        self._tidy(version)

    def _bring_near(self, version: int) -> None:
        """Rebuild it beside serving, so that serving stands still for a copy only. Raises VersionError when that cannot be."""
        self.versions.content(version)
        try:
            retention.require_room(self.versions, self.arena.num_bytes, self.config.disk_limit_gb)
            self.versions.bring_near(version)
        except OSError as error:
            log.warning("version %d is rebuilt while serving stands still: %s", version, error)

    def _has_room(self) -> bool:
        """Whether another version fits, by what the disk says of itself and by taking it for a moment."""
        try:
            retention.require_room(self.versions, self.arena.num_bytes, self.config.disk_limit_gb)
        except retention.NoRoomError:
            return False
        return disk.shortage(self.versions.directory, self.arena.num_bytes) is None

    def _tidy(self, head: int) -> None:
        """What keeps the disk from filling, and makes the next job and an undo quick; a job never fails for it. On a full
        disk the first makes room for the second; if an old version is damaged, the second is needed all the more."""
        for work in (
            lambda: retention.tidy(self.versions, self.config.keep_versions),
            lambda: self.versions.keep_image(head, self.served.views),
        ):
            try:
                work()
            except (OSError, VersionError) as error:
                log.warning("after version %d: %s", head, error)


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
            except (OSError, HeldError):  # nobody is there, or still cleans up after the learner before this one
                time.sleep(0.2)
                continue
            try:
                Learner(engine, store, Path(str(store.get_meta("base"))), state_dir, config).work()
            except ConnectionError:
                log.warning("the server is gone; waiting up to %.0f s for another", linger)
            finally:
                engine.close()
            last_seen = time.monotonic()
    log.warning("no server for %.0f s; the learner ends", linger)


def _give_up_reserved(store: Store, reason: str, *, counted: bool) -> None:
    """Versions that were begun and will never be committed; their lessons are queued again, rollbacks are simply done again."""
    for version in store.versions():
        if version.status == "reserved" and version.kind != "base":
            store.abandon(version.id, "lost", reason, version.report, counted=counted)
            log.warning("version %d is lost: %s", version.id, reason)


def main() -> None:
    """``python -m insitu.live.learner STATE_DIR CONFIG_JSON``: started by the server, not by hand."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    state_dir, config = sys.argv[1:]
    run(Path(state_dir), TeachConfig(**json.loads(config)))


if __name__ == "__main__":
    main()
