"""The durable memory of learning while serving: one SQLite file in WAL mode.

The HTTP routes put feedback and rollback requests in; the learner, in another process, takes them out as jobs. The file is
the queue, so whatever was accepted survives the death of either process. Ids of versions are made durable before anything
is trained under them and are never used twice (AUTOINCREMENT).
"""

import hashlib
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FeedbackStatus = Literal["queued", "training", "applied", "refused", "rolled_back"]
VersionStatus = Literal["reserved", "committed", "refused", "lost"]
JobStatus = Literal["queued", "running", "done", "failed"]

# Schema 1. A change of schema gets a new number in user_version and a step in _open.
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE versions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,             -- base | teach | rollback
    status TEXT NOT NULL,           -- reserved | committed | refused | lost
    parent INTEGER,                 -- the committed version it started from
    target INTEGER,                 -- of a rollback: the version whose bytes it repeats
    created REAL NOT NULL,
    sha256 TEXT,                    -- of all weights, see weights/arena.py
    report TEXT NOT NULL DEFAULT '{}'
);
CREATE TABLE feedback (
    id TEXT PRIMARY KEY,
    seq INTEGER NOT NULL UNIQUE,    -- order of arrival
    created REAL NOT NULL,
    kind TEXT NOT NULL,             -- messages | continuation
    payload TEXT NOT NULL,
    digest TEXT NOT NULL,           -- of the payload, to recognise a repeated post
    status TEXT NOT NULL,
    reason TEXT,
    version INTEGER REFERENCES versions(id),
    attempts INTEGER NOT NULL DEFAULT 0  -- jobs that took it up
);
CREATE INDEX feedback_by_status ON feedback(status, seq);
CREATE INDEX feedback_by_digest ON feedback(digest, status);
CREATE TABLE rollbacks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    created REAL NOT NULL,
    target INTEGER NOT NULL,
    status TEXT NOT NULL,           -- queued | running | done | failed
    version INTEGER,
    reason TEXT
);
CREATE TABLE completions (
    id TEXT PRIMARY KEY,
    created REAL NOT NULL,
    key TEXT NOT NULL,              -- digest of the API key that asked
    messages TEXT NOT NULL,
    text TEXT NOT NULL,
    weight_version TEXT NOT NULL
);
"""

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


@dataclass(frozen=True, slots=True)
class Feedback:
    """One thing to learn from. ``kind`` is ``messages`` (payload ``{"messages": [...]}``) or ``continuation`` (payload
    ``{"context_ids": [...], "continuation_ids": [...]}``). ``version`` is set once a job has taken it up."""

    id: str
    created: float
    kind: Literal["messages", "continuation"]
    payload: dict[str, Any]
    status: FeedbackStatus
    reason: str | None
    version: int | None


@dataclass(frozen=True, slots=True)
class Version:
    """One version of the weights; ``report`` holds the figures of the job that made (or failed to make) it."""

    id: int
    kind: Literal["base", "teach", "rollback"]
    status: VersionStatus
    parent: int | None
    target: int | None
    created: float
    sha256: str | None
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rollback:
    """A request to serve the bytes of ``target`` again; ``version`` is the version that came of it."""

    id: int
    created: float
    target: int
    status: JobStatus
    version: int | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Completion:
    """What was answered, so that a correction can name it. ``key`` is a digest, never the key."""

    id: str
    key: str
    messages: list[dict[str, Any]]
    text: str
    weight_version: str


class IdInUseError(ValueError):
    """A feedback id was used before with other content."""


class Store:
    """The store of one state directory. Safe to share between threads; several processes may open the same file."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        # What people asked and taught is in it: for the owner only. SQLite gives its -wal and -shm files the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        try:
            self._open(path)
        except BaseException:
            self._db.close()
            raise

    def _open(self, path: Path) -> None:
        self._db.row_factory = sqlite3.Row
        try:
            self._to_wal()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
                raise
            raise ValueError(
                f"{path} is not an insitu store; move it away, or choose another state directory"
            ) from error
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")
        with self._transaction():
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                for statement in _SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self._db.execute("PRAGMA user_version=1")
            elif found != 1:
                raise ValueError(f"{path} has schema {found}, this insitu knows schema 1; use the insitu that wrote it")

    def _to_wal(self) -> None:
        """Two processes that open a new file at once: the change to WAL does not wait for the other's lock by itself."""
        until = time.monotonic() + 30
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable all-or-nothing change, exclusive among threads and processes."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # Also when the COMMIT failed; on a full disk SQLite may have rolled back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, *args: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(sql, args).fetchall()

    # -- meta ----------------------------------------------------------------------------------------------------------
    def get_meta(self, name: str) -> str | None:
        rows = self._rows("SELECT value FROM meta WHERE name = ?", name)
        return str(rows[0]["value"]) if rows else None

    def set_meta(self, name: str, value: str) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # -- feedback ------------------------------------------------------------------------------------------------------
    def add_feedback(
        self, kind: Literal["messages", "continuation"], payload: dict[str, Any], id: str | None = None
    ) -> tuple[Feedback, bool]:
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
                return _feedback(row), False
            name = id if id is not None else f"fb-{uuid.uuid4().hex[:24]}"
            db.execute(
                "INSERT INTO feedback (id, seq, created, kind, payload, digest, status) VALUES "
                "(?, (SELECT COALESCE(MAX(seq), 0) + 1 FROM feedback), ?, ?, ?, ?, 'queued')",
                (name, time.time(), kind, text, digest),
            )
            return _feedback(db.execute("SELECT * FROM feedback WHERE id = ?", (name,)).fetchone()), True

    def feedback(self, id: str) -> Feedback | None:
        rows = self._rows("SELECT * FROM feedback WHERE id = ?", id)
        return _feedback(rows[0]) if rows else None

    def feedback_of(self, version: int) -> list[Feedback]:
        return [_feedback(r) for r in self._rows("SELECT * FROM feedback WHERE version = ? ORDER BY seq", version)]

    def queued(self, limit: int) -> list[Feedback]:
        rows = self._rows("SELECT * FROM feedback WHERE status = 'queued' ORDER BY seq LIMIT ?", limit)
        return [_feedback(r) for r in rows]

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
            db.execute(
                "INSERT INTO completions VALUES (?, ?, ?, ?, ?, ?)",
                (
                    completion.id,
                    time.time(),
                    completion.key,
                    json.dumps(completion.messages, ensure_ascii=False),
                    completion.text,
                    completion.weight_version,
                ),
            )
            db.execute(
                "DELETE FROM completions WHERE rowid <= (SELECT MAX(rowid) FROM completions) - ?",
                (keep,),
            )

    def completion(self, id: str) -> Completion | None:
        rows = self._rows("SELECT * FROM completions WHERE id = ?", id)
        if not rows:
            return None
        r = rows[0]
        return Completion(r["id"], r["key"], json.loads(r["messages"]), r["text"], r["weight_version"])

    # -- versions ------------------------------------------------------------------------------------------------------
    def reserve(
        self,
        kind: Literal["base", "teach", "rollback"],
        parent: int | None,
        target: int | None = None,
        feedback: list[str] | None = None,
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

    def commit(self, id: int, sha256: str, report: dict[str, Any]) -> None:
        """The version's file is complete and durable: from now on it is what a restart serves."""
        with self._transaction() as db:
            done = db.execute(
                "UPDATE versions SET status = 'committed', sha256 = ?, report = ? WHERE id = ? AND status = 'reserved'",
                (sha256, json.dumps(report), id),
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

    def head(self) -> int | None:
        """The last committed version, or None in a new state directory."""
        rows = self._rows("SELECT MAX(id) AS id FROM versions WHERE status = 'committed'")
        found: int | None = rows[0]["id"]
        return found

    def version(self, id: int) -> Version | None:
        rows = self._rows("SELECT * FROM versions WHERE id = ?", id)
        return _version(rows[0]) if rows else None

    def versions(self) -> list[Version]:
        return [_version(r) for r in self._rows("SELECT * FROM versions ORDER BY id")]

    # -- rollbacks -----------------------------------------------------------------------------------------------------
    def add_rollback(self, target: int) -> Rollback:
        """Ask for ``target`` again. One such request that is still open is enough: a client that repeats a POST whose answer
        was lost gets that one."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT * FROM rollbacks WHERE target = ? AND status IN ('queued', 'running')", (target,)
            ).fetchone()
            if row is not None:
                return _rollback(row)
            cursor = db.execute(
                "INSERT INTO rollbacks (created, target, status) VALUES (?, ?, 'queued')", (time.time(), target)
            )
            return _rollback(db.execute("SELECT * FROM rollbacks WHERE id = ?", (cursor.lastrowid,)).fetchone())

    def rollback(self, id: int) -> Rollback | None:
        rows = self._rows("SELECT * FROM rollbacks WHERE id = ?", id)
        return _rollback(rows[0]) if rows else None

    def open_rollbacks(self) -> list[Rollback]:
        rows = self._rows("SELECT * FROM rollbacks WHERE status IN ('queued', 'running') ORDER BY id")
        return [_rollback(r) for r in rows]

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


def _feedback(r: sqlite3.Row) -> Feedback:
    return Feedback(r["id"], r["created"], r["kind"], json.loads(r["payload"]), r["status"], r["reason"], r["version"])


def _version(r: sqlite3.Row) -> Version:
    return Version(
        r["id"], r["kind"], r["status"], r["parent"], r["target"], r["created"], r["sha256"], json.loads(r["report"])
    )


def _rollback(r: sqlite3.Row) -> Rollback:
    return Rollback(r["id"], r["created"], r["target"], r["status"], r["version"], r["reason"])
