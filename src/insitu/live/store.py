"""The durable memory of learning while serving: one SQLite file in WAL mode.

The HTTP routes put feedback and rollback requests in; the learner, in another process, takes them out as jobs. The file is
the queue, so whatever was accepted survives the death of either process. Ids of versions are made durable before anything
is trained under them and are never used twice (AUTOINCREMENT).
"""

import json
import sqlite3
import time
from collections.abc import Collection
from dataclasses import asdict
from typing import Any, Literal, get_args

from insitu.live import intake
from insitu.live.database import damaged, is_damage
from insitu.live.events import Events, figures, record
from insitu.live.intake import Intake
from insitu.live.records import (
    Canary,
    FeedbackStatus,
    JobStatus,
    Rollback,
    Version,
    VersionFile,
    VersionKind,
    VersionStatus,
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
SELECT id FROM line
"""


class Store(Intake, Events):
    """The store of one state directory. Safe to share between threads; several processes may open the same file."""

    def check(self) -> None:
        """Read all of it and compare what can be compared; StateError for a damaged file. For the start of a server: SQLite
        itself notices damage only on the pages that it comes by."""
        try:
            found = [str(r[0]) for r in self._rows("PRAGMA integrity_check(3)")]
            if found != ["ok"]:
                raise damaged(self._path, "; ".join(found))
            for name, known in (("versions", get_args(VersionStatus)), ("feedback", get_args(FeedbackStatus))):
                for row in self._rows(f"SELECT id, status FROM {name}"):  # noqa: S608
                    if row["status"] not in known:
                        raise damaged(self._path, f"{name} {row['id']!r} has the status {row['status']!r}")
            self.versions()
            for row in self._rows("SELECT id, kind, payload, digest FROM feedback WHERE status IN ('queued', 'held')"):
                if intake.digest_of(row["kind"], row["payload"]) != row["digest"]:
                    raise damaged(self._path, f"feedback {row['id']!r} is not what was posted")
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            raise damaged(self._path, str(error)) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise damaged(self._path, f"a row of it cannot be read: {error}") from error

    # -- meta ----------------------------------------------------------------------------------------------------------
    def get_meta(self, name: str) -> str | None:
        rows = self._rows("SELECT value FROM meta WHERE name = ?", name)
        return str(rows[0]["value"]) if rows else None

    def set_meta(self, name: str, value: str) -> None:
        if self.get_meta(name) == value:
            return  # a server must come up on a full disk
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # -- versions ------------------------------------------------------------------------------------------------------
    def reserve(
        self, kind: VersionKind, parent: int | None, target: int | None = None, feedback: list[str] | None = None
    ) -> int:
        """Make a version id durable before any weight changes, and mark the feedback it takes up as in training.

        NotQueuedError, and nothing is reserved, if some of it was held or withdrawn meanwhile.
        """
        with self._transaction() as db:
            if kind == "base":
                # The served checkpoint is version 0; a first start that died may have reserved it already.
                db.execute("DELETE FROM versions WHERE id = 0 AND status != 'committed'")
            cursor = db.execute(
                "INSERT INTO versions (id, kind, status, parent, target, created) VALUES (?, ?, 'reserved', ?, ?, ?)",
                (0 if kind == "base" else None, kind, parent, target, time.time()),
            )
            id = 0 if kind == "base" else int(cursor.lastrowid or 0)
            intake.take_up(db, id, feedback or [])
            detail = {"kind": kind, "parent": parent, "target": target, "feedback": feedback}
            record(db, "version.reserved", [f"version {id}"], {k: v for k, v in detail.items() if v is not None})
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
            row = db.execute("SELECT * FROM versions WHERE id = ?", (id,)).fetchone()
            record(db, "version.committed", [f"version {id}"], {"kind": row["kind"], **figures(report)})
            if row["kind"] == "rollback":
                _tell_of_rollback(db, row)
            intake.follow_line(db, id, _LINE)

    def abandon(
        self,
        id: int,
        status: Literal["refused", "lost"],
        reason: str,
        report: dict[str, Any],
        *,
        counted: bool = True,
    ) -> None:
        """The version will never be committed. Its feedback is refused with the reason; a lost one's is queued again, three
        times at most if it is ``counted``."""
        with self._transaction() as db:
            ended = db.execute(
                "UPDATE versions SET status = ?, report = ? WHERE id = ? AND status = 'reserved'",
                (status, json.dumps({**report, "reason": reason}), id),
            )
            assert ended.rowcount == 1, f"version {id} is not reserved"
            record(db, f"version.{status}", [f"version {id}"], {"reason": reason, **figures(report)})
            if status == "refused":
                intake.refuse_all(db, id, reason)
            else:
                intake.queue_again(db, id, counted=counted)

    def pin(self, id: int, pinned: bool = True) -> None:
        """Never prune this version, or let it be pruned again. Raises ValueError for one whose bytes are not there."""
        with self._transaction() as db:
            done = db.execute(
                "UPDATE versions SET pinned = ? WHERE id = ? AND status = 'committed' AND pruned = 0", (int(pinned), id)
            )
            if done.rowcount != 1:
                found = db.execute(
                    "SELECT pruned FROM versions WHERE id = ? AND status = 'committed'", (id,)
                ).fetchone()
                why = "does not exist" if found is None else "was pruned to save room, its bytes are gone"
                raise ValueError(f"version {id} {why}; expected one of those that /v1/live/versions lists as committed")

    def prune(self, ids: Collection[int], pinned: Collection[int]) -> bool:
        """Their bytes are about to be deleted: from now on nobody may ask for them. Does nothing, and returns False, when by
        now other versions are pinned than ``pinned``, for which they may be needed."""
        with self._transaction() as db:
            if {row["id"] for row in db.execute("SELECT id FROM versions WHERE pinned")} != set(pinned):
                return False
            db.executemany("UPDATE versions SET pruned = 1 WHERE id = ?", [(id,) for id in ids])
            return True

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
                "INSERT INTO rollbacks (created, target, after, status) VALUES "
                "(?, ?, (SELECT COALESCE(MAX(id), -1) FROM versions WHERE status = 'committed'), 'queued')",
                (time.time(), target),
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

    # -- canaries ------------------------------------------------------------------------------------------------------
    def add_canary(self, prompt: str) -> tuple[Canary, bool]:
        """Judge updates by this prompt too. Returns it and whether it is new: a client may repeat a POST."""
        with self._transaction() as db:
            added = db.execute(
                "INSERT INTO canaries (created, prompt) VALUES (?, ?) ON CONFLICT (prompt) DO NOTHING",
                (time.time(), prompt),
            )
            row = db.execute("SELECT * FROM canaries WHERE prompt = ?", (prompt,)).fetchone()
            return Canary.of(row), added.rowcount == 1

    def canaries(self) -> list[Canary]:
        return [Canary.of(r) for r in self._rows("SELECT * FROM canaries ORDER BY id")]

    def remove_canary(self, id: int) -> bool:
        """Whether there was one of this id."""
        with self._transaction() as db:
            return db.execute("DELETE FROM canaries WHERE id = ?", (id,)).rowcount == 1

    # -- replay --------------------------------------------------------------------------------------------------------
    def applied_ids(self) -> list[str]:
        """The feedback whose lessons are in the served weights (commit() keeps the marks), in order of arrival."""
        return [r["id"] for r in self._rows("SELECT id FROM feedback WHERE status = 'applied' ORDER BY seq")]


def _tell_of_rollback(db: sqlite3.Connection, rollback: sqlite3.Row) -> None:
    """Which jobs are no longer in what is served, and which are again."""
    before, now = ({r["id"] for r in db.execute(_LINE, (id,))} for id in (rollback["parent"], rollback["id"]))
    jobs = {r["id"] for r in db.execute("SELECT id FROM versions WHERE kind = 'teach'")}
    for kind, found in (("rolled_back", before - now), ("restored", now - before)):
        names = [f"version {id}" for id in sorted(found & jobs)]
        record(
            db, f"version.{kind}", names, {"reason": f"version {rollback['id']} repeats version {rollback['target']}"}
        )
