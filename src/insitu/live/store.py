"""The durable memory of learning while serving: one SQLite file in WAL mode.

The HTTP routes put feedback and rollback requests in; the learner, in another process, takes them out as jobs. The file is
the queue, so whatever was accepted survives the death of either process. Ids of versions are made durable before anything
is trained under them and are never used twice (AUTOINCREMENT).
"""

import hashlib
import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from insitu.live.database import open_database, transaction
from insitu.live.records import (
    Completion,
    Feedback,
    FeedbackKind,
    IdInUseError,
    JobStatus,
    Rollback,
    Version,
    VersionFile,
    VersionKind,
)

# The versions whose lessons are in version ?: its ancestors, but a rollback continues the line of its target.
_LINE = """
WITH RECURSIVE line(id) AS (
    SELECT ?
    UNION
    SELECT CASE versions.kind WHEN 'rollback' THEN versions.target ELSE versions.parent END AS before
    FROM versions JOIN line ON versions.id = line.id
    WHERE before IS NOT NULL  -- else NOT IN is never true
)
"""


class Store:
    """The store of one state directory. Safe to share between threads; several processes may open the same file."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._db = open_database(path)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable all-or-nothing change, exclusive among threads and processes."""
        with self._lock, transaction(self._db) as db:
            yield db

    def _rows(self, sql: str, *args: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(sql, args).fetchall()

    # -- meta ----------------------------------------------------------------------------------------------------------
    def get_meta(self, name: str) -> str | None:
        rows = self._rows("SELECT value FROM meta WHERE name = ?", name)
        return str(rows[0]["value"]) if rows else None

    def set_meta(self, name: str, value: str) -> None:
        if self.get_meta(name) == value:
            return  # a server must come up on a full disk
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # -- feedback ------------------------------------------------------------------------------------------------------
    def add_feedback(self, kind: FeedbackKind, payload: dict[str, Any], id: str | None = None) -> tuple[Feedback, bool]:
        """Queue something to learn. Returns it and whether it is new.

        Clients repeat a POST whose answer was lost, so a known id returns what it named (:class:`IdInUseError` if the content
        differs), and without an id the same content returns the item that is queued, in training or applied. Content that was
        refused or rolled back may be taught again.
        """
        text = json.dumps(payload, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()
        with self._transaction() as db:
            if id is not None:
                row = db.execute("SELECT * FROM feedback WHERE id = ?", (id,)).fetchone()
                if row is not None and row["digest"] != digest:
                    raise IdInUseError(f"feedback id {id!r} was used before with other content; choose another id")
            else:
                row = db.execute(
                    "SELECT * FROM feedback WHERE digest = ? AND status IN ('queued', 'training', 'applied')", (digest,)
                ).fetchone()
            if row is not None:
                return Feedback.of(row), False
            name = id if id is not None else f"fb-{uuid.uuid4().hex[:24]}"
            db.execute(
                "INSERT INTO feedback (id, seq, created, kind, payload, digest, status) VALUES "
                "(?, (SELECT COALESCE(MAX(seq), 0) + 1 FROM feedback), ?, ?, ?, ?, 'queued')",
                (name, time.time(), kind, text, digest),
            )
            return Feedback.of(db.execute("SELECT * FROM feedback WHERE id = ?", (name,)).fetchone()), True

    def feedback(self, id: str) -> Feedback | None:
        rows = self._rows("SELECT * FROM feedback WHERE id = ?", id)
        return Feedback.of(rows[0]) if rows else None

    def feedback_of(self, version: int) -> list[Feedback]:
        return [Feedback.of(r) for r in self._rows("SELECT * FROM feedback WHERE version = ? ORDER BY seq", version)]

    def queued(self, limit: int) -> list[Feedback]:
        rows = self._rows("SELECT * FROM feedback WHERE status = 'queued' ORDER BY seq LIMIT ?", limit)
        return [Feedback.of(r) for r in rows]

    def counts(self) -> dict[str, int]:
        """Number of feedback items by status."""
        return {r["status"]: r["n"] for r in self._rows("SELECT status, COUNT(*) AS n FROM feedback GROUP BY status")}

    def refuse(self, id: str, reason: str) -> None:
        with self._transaction() as db:
            db.execute("UPDATE feedback SET status = 'refused', reason = ? WHERE id = ?", (reason, id))

    # -- completions ---------------------------------------------------------------------------------------------------
    def add_completion(self, completion: Completion, keep: int = 10_000) -> None:
        """Remember an answer so that a correction can name it; the oldest beyond ``keep`` are dropped."""
        with self._transaction() as db:
            messages = json.dumps(completion.messages, ensure_ascii=False)
            db.execute(
                "INSERT INTO completions VALUES (?, ?, ?, ?, ?, ?)",
                (completion.id, time.time(), completion.key, messages, completion.text, completion.weight_version),
            )
            db.execute("DELETE FROM completions WHERE rowid <= (SELECT MAX(rowid) FROM completions) - ?", (keep,))

    def completion(self, id: str) -> Completion | None:
        rows = self._rows("SELECT * FROM completions WHERE id = ?", id)
        return Completion.of(rows[0]) if rows else None

    # -- versions ------------------------------------------------------------------------------------------------------
    def reserve(
        self, kind: VersionKind, parent: int | None, target: int | None = None, feedback: list[str] | None = None
    ) -> int:
        """Make a version id durable before any weight changes, and mark the feedback it takes up as in training."""
        with self._transaction() as db:
            if kind == "base":
                # The served checkpoint is version 0; a first start that died may have reserved it already.
                db.execute("DELETE FROM versions WHERE id = 0 AND status != 'committed'")
            cursor = db.execute(
                "INSERT INTO versions (id, kind, status, parent, target, created) VALUES (?, ?, 'reserved', ?, ?, ?)",
                (0 if kind == "base" else None, kind, parent, target, time.time()),
            )
            id = 0 if kind == "base" else int(cursor.lastrowid or 0)
            for item in feedback or []:
                taken = db.execute(
                    "UPDATE feedback SET status = 'training', version = ?, attempts = attempts + 1 "
                    "WHERE id = ? AND status = 'queued'",
                    (id, item),
                )
                assert taken.rowcount == 1, f"feedback {item} is not queued"
            return id

    def commit(self, id: int, sha256: str, report: dict[str, Any], file: VersionFile | None = None) -> None:
        """The version's file is complete and durable: from now on it is what a restart serves."""
        with self._transaction() as db:
            done = db.execute(
                "UPDATE versions SET status = 'committed', sha256 = ?, report = ?, file = ? "
                "WHERE id = ? AND status = 'reserved'",
                (sha256, json.dumps(report), None if file is None else json.dumps(asdict(file)), id),
            )
            assert done.rowcount == 1, f"version {id} is not reserved"
            # Of everything that was ever learned, what is in the line of the new head is applied, the rest is rolled back.
            db.execute(
                f"{_LINE} UPDATE feedback SET status = 'applied', reason = NULL "  # noqa: S608
                "WHERE version IN line AND status IN ('training', 'applied', 'rolled_back')",
                (id,),
            )
            db.execute(
                f"{_LINE} UPDATE feedback SET status = 'rolled_back', reason = 'version ' || ? || ' took it back' "  # noqa: S608
                "WHERE version NOT IN line AND status = 'applied'",
                (id, id),
            )

    def abandon(self, id: int, status: Literal["refused", "lost"], reason: str, report: dict[str, Any]) -> None:
        """The version will never be committed. Its feedback is refused with the reason; a lost one's is queued again."""
        with self._transaction() as db:
            ended = db.execute(
                "UPDATE versions SET status = ?, report = ? WHERE id = ? AND status = 'reserved'",
                (status, json.dumps({**report, "reason": reason}), id),
            )
            assert ended.rowcount == 1, f"version {id} is not reserved"
            if status == "refused":
                db.execute(
                    "UPDATE feedback SET status = 'refused', reason = ? WHERE version = ? AND status = 'training'",
                    (reason, id),
                )
            else:  # the learner died; what killed it three times is not tried a fourth time
                db.execute(
                    "UPDATE feedback SET status = 'refused', reason = ? "
                    "WHERE version = ? AND status = 'training' AND attempts >= 3",
                    ("the learner died three times while training this", id),
                )
                db.execute(
                    "UPDATE feedback SET status = 'queued', version = NULL WHERE version = ? AND status = 'training'",
                    (id,),
                )

    def pin(self, id: int, pinned: bool = True) -> None:
        """Never prune this version, or let it be pruned again."""
        with self._transaction() as db:
            db.execute("UPDATE versions SET pinned = ? WHERE id = ?", (int(pinned), id))

    def prune(self, ids: Sequence[int]) -> None:
        """Their bytes are about to be deleted: from now on nobody may ask for them."""
        with self._transaction() as db:
            db.executemany("UPDATE versions SET pruned = 1 WHERE id = ?", [(id,) for id in ids])

    def head(self) -> int | None:
        """The last committed version, or None in a new state directory."""
        rows = self._rows("SELECT MAX(id) AS id FROM versions WHERE status = 'committed'")
        found: int | None = rows[0]["id"]
        return found

    def version(self, id: int) -> Version | None:
        rows = self._rows("SELECT * FROM versions WHERE id = ?", id)
        return Version.of(rows[0]) if rows else None

    def versions(self) -> list[Version]:
        return [Version.of(r) for r in self._rows("SELECT * FROM versions ORDER BY id")]

    # -- rollbacks -----------------------------------------------------------------------------------------------------
    def add_rollback(self, target: int) -> Rollback:
        """Ask for ``target`` again. One such request that is still open is enough: a client that repeats a POST whose answer
        was lost gets that one."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT * FROM rollbacks WHERE target = ? AND status IN ('queued', 'running')", (target,)
            ).fetchone()
            if row is not None:
                return Rollback.of(row)
            cursor = db.execute(
                "INSERT INTO rollbacks (created, target, status) VALUES (?, ?, 'queued')", (time.time(), target)
            )
            return Rollback.of(db.execute("SELECT * FROM rollbacks WHERE id = ?", (cursor.lastrowid,)).fetchone())

    def rollback(self, id: int) -> Rollback | None:
        rows = self._rows("SELECT * FROM rollbacks WHERE id = ?", id)
        return Rollback.of(rows[0]) if rows else None

    def open_rollbacks(self) -> list[Rollback]:
        rows = self._rows("SELECT * FROM rollbacks WHERE status IN ('queued', 'running') ORDER BY id")
        return [Rollback.of(r) for r in rows]

    def update_rollback(
        self, id: int, status: JobStatus, version: int | None = None, reason: str | None = None
    ) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE rollbacks SET status = ?, version = ?, reason = ? WHERE id = ?", (status, version, reason, id)
            )

    def change_counter(self) -> int:
        """Grows whenever another process has committed a change; cheap enough to ask ten times a second."""
        return int(self._rows("PRAGMA data_version")[0][0])
