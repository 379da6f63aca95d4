"""The SQLite file behind the store: its schema, and how it is opened so that a commit survives whatever dies next."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
CREATE TABLE completions (
    id TEXT PRIMARY KEY,
    created REAL NOT NULL,
    key TEXT NOT NULL,              -- digest of the API key that asked
    messages TEXT NOT NULL,
    text TEXT NOT NULL,
    weight_version TEXT NOT NULL
);
"""


def open_database(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode with the schema in place. Outside of an explicit transaction every statement is one.

    Raises:
        ValueError: the file is no insitu store, or one of another schema.
    """
    # What people asked and taught is in it: for the owner only. SQLite gives its -wal and -shm files the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
    try:
        _prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


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
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
            raise
        raise ValueError(f"{path} is not an insitu store; move it away, or choose another state directory") from error
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA foreign_keys=ON")
    with transaction(db):
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found == 0:
            for statement in _SCHEMA.split(";\n"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version={SCHEMA}")
        elif found != SCHEMA:
            raise ValueError(
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
