"""The SQLite file behind the store: its schema, and how it is opened so that a commit survives whatever dies next.

Nothing in it is ordered by ``created``: clocks jump. Ids and ``seq`` only grow.
"""

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from insitu.live.records import StateError

# Schema 2. Another schema gets another number in user_version; nothing is converted before the first release.
SCHEMA = 2
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
    file TEXT,                      -- JSON: name, bytes and sha256 of its difference's file; none for a base or a rollback
    pinned INTEGER NOT NULL DEFAULT 0,
    pruned INTEGER NOT NULL DEFAULT 0,  -- its bytes were given up to save room
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
    after INTEGER NOT NULL,         -- the head when it was asked for
    status TEXT NOT NULL,           -- queued | running | done | failed
    version INTEGER,
    reason TEXT
);
CREATE TABLE canaries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    created REAL NOT NULL,
    prompt TEXT NOT NULL UNIQUE
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    created REAL NOT NULL,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,          -- what it happened to: a feedback id, "version 3", "server"
    detail TEXT NOT NULL            -- JSON: reason and figures
);
CREATE TABLE counters (
    kind TEXT PRIMARY KEY,          -- of event
    n INTEGER NOT NULL              -- how many there ever were
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


class Database:
    """One connection to the file. Safe to share between threads; several processes may open the same file.

    Raises StateError: the file is no insitu store, damaged, one of another schema, or open to others.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
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


def open_database(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode with the schema in place. Outside of an explicit transaction every statement is one."""
    try:
        # What people asked and taught is in it: for the owner only. SQLite gives its -wal and -shm files the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
            _refuse_shared(file)
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from error
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
    try:
        _prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


def damaged(path: Path, finding: str) -> StateError:
    """Nothing is ever deleted or made anew here: what can still be read is worth more than a server that starts."""
    return StateError(
        f"{path} is damaged ({finding}); nothing was changed. Put a copy of the whole state directory back, or move the "
        "directory away to start anew; the versions that it holds are lost with the store"
    )


def _unusable(path: Path, why: str) -> StateError:
    return StateError(f"{path} cannot be opened ({why}); mend that, or choose another state directory")


def is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _refuse_shared(file: Path) -> None:
    try:
        found = file.lstat()
    except FileNotFoundError:
        return
    if found.st_uid != os.geteuid():
        raise StateError(f"{file} belongs to another user (uid {found.st_uid}); choose another state directory")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StateError(f"{file} is open to other users (mode {stat.S_IMODE(found.st_mode):o}); run: chmod 600 {file}")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """One durable all-or-nothing change, exclusive among processes."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        # Also when the COMMIT failed; on a full disk SQLite may have rolled back by itself.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    db.row_factory = sqlite3.Row
    try:
        _to_wal(db)
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
        with transaction(db):
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version={SCHEMA}")
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
            raise StateError(
                f"{path} is not an insitu store; move it away, or choose another state directory"
            ) from error
        raise damaged(path, str(error)) if is_damage(error) else _unusable(path, str(error)) from error
    if found not in (0, SCHEMA):
        raise StateError(
            f"{path} has schema {found}, this insitu knows schema {SCHEMA}; use the insitu that wrote it, or choose "
            "another state directory"
        )


def _to_wal(db: sqlite3.Connection) -> None:
    """Two processes that open a new file at once: the change to WAL does not wait for the other's lock by itself."""
    until = time.monotonic() + 30
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
