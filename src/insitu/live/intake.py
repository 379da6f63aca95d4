"""The queue of what is to be learned, and the answers that a correction may name.

    queued or held -> withdrawn
    queued -> training -> applied <-> rolled_back
              training -> refused, or queued again when its job was lost

What a job does to its feedback is in functions over a connection: the store calls them in the transaction of the version.
"""

import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterable
from typing import Any

from insitu.live.database import Database
from insitu.live.events import count, record
from insitu.live.records import (
    Completion,
    Feedback,
    FeedbackKind,
    FeedbackStatus,
    IdInUseError,
    NotQueuedError,
    QueueFullError,
    WrongStatusError,
)

_WAYS_OUT = {
    "training": "wait until its job ends",
    "applied": "roll back to a version before it, which takes back everything learned since",
    "refused": "it is not going to be learned; post it again to try once more",
    "rolled_back": "it was taken back already; post it again to teach it again",
    "withdrawn": "post it again, under another id, to teach it after all",
}


class Intake(Database):
    """The part of the store that takes feedback in."""

    def add_feedback(
        self,
        kind: FeedbackKind,
        payload: dict[str, Any],
        id: str | None = None,
        *,
        hold: bool = False,
        max_queue: int | None = None,
    ) -> tuple[Feedback, bool]:
        """Queue something to learn, or hold it for review. Returns it and whether it is new.

        Clients repeat a POST whose answer was lost, so a known id returns what it named (IdInUseError if the content
        differs), and without an id the same content returns the item that is queued, held, in training or applied. Content
        that was refused, withdrawn or rolled back may be taught again. QueueFullError when ``max_queue`` items wait: nothing
        is then taken, but what is known is still found.
        """
        text = json.dumps(payload, sort_keys=True, ensure_ascii=False)
        digest = digest_of(kind, text)
        with self._transaction() as db:
            if id is not None:
                row = db.execute("SELECT * FROM feedback WHERE id = ?", (id,)).fetchone()
                if row is not None and row["digest"] != digest:
                    raise IdInUseError(f"feedback id {id!r} was used before with other content; choose another id")
            else:
                row = db.execute(
                    "SELECT * FROM feedback "
                    "WHERE digest = ? AND status IN ('queued', 'held', 'training', 'applied') ORDER BY seq",
                    (digest,),
                ).fetchone()
            if row is not None:
                count(db, "feedback.duplicate")
                return Feedback.of(row), False
            waiting = "SELECT COUNT(*) FROM feedback WHERE status IN ('queued', 'held')"
            if max_queue is not None and (n := db.execute(waiting).fetchone()[0]) >= max_queue:
                raise QueueFullError(
                    f"{n} items are queued or held already, and {max_queue} is the limit; post it later"
                )
            name = id if id is not None else f"fb-{uuid.uuid4().hex[:24]}"
            db.execute(
                "INSERT INTO feedback (id, seq, created, kind, payload, digest, status) VALUES "
                "(?, (SELECT COALESCE(MAX(seq), 0) + 1 FROM feedback), ?, ?, ?, ?, ?)",
                (name, time.time(), kind, text, digest, "held" if hold else "queued"),
            )
            record(db, "feedback.accepted", [name], {"held": True} if hold else {})
            return _one(db, name), True

    def hold(self, id: str) -> Feedback | None:
        """No job takes it up until it is released; None for an unknown id. WrongStatusError once a job has it."""
        return self._move(id, "held", "feedback.held", come_from=("queued",), fine=("held",))

    def release(self, id: str) -> Feedback | None:
        """Back to its old place in the queue. A repeated release finds it further on, which is fine."""
        fine = ("queued", "training", "applied")
        return self._move(id, "queued", "feedback.released", come_from=("held",), fine=fine)

    def withdraw(self, id: str) -> Feedback | None:
        """It is never learned. WrongStatusError once a job has it."""
        return self._move(id, "withdrawn", "feedback.withdrawn", come_from=("queued", "held"), fine=("withdrawn",))

    def _move(
        self, id: str, to: FeedbackStatus, kind: str, *, come_from: tuple[str, ...], fine: tuple[str, ...]
    ) -> Feedback | None:
        with self._transaction() as db:
            row = db.execute("SELECT status FROM feedback WHERE id = ?", (id,)).fetchone()
            if row is None:
                return None
            if row["status"] in come_from:
                db.execute("UPDATE feedback SET status = ? WHERE id = ?", (to, id))
                record(db, kind, [id], {})
            elif row["status"] not in fine:
                raise WrongStatusError(f"feedback {id!r} is {row['status']}: {_WAYS_OUT[row['status']]}")
            return _one(db, id)

    def refuse(self, id: str, reason: str) -> None:
        """For what turns out in the queue to be impossible to learn; not if it was taken out of the queue meanwhile."""
        with self._transaction() as db:
            done = db.execute(
                "UPDATE feedback SET status = 'refused', reason = ? WHERE id = ? AND status = 'queued'", (reason, id)
            )
            if done.rowcount:  # the reason may quote what was taught, so it stays with the item
                record(db, "feedback.refused", [id], {"reason": "it cannot be encoded; the item says why"})

    def feedback(self, id: str) -> Feedback | None:
        rows = self._rows("SELECT * FROM feedback WHERE id = ?", id)
        return Feedback.of(rows[0]) if rows else None

    def feedback_of(self, version: int) -> list[Feedback]:
        return [Feedback.of(r) for r in self._rows("SELECT * FROM feedback WHERE version = ? ORDER BY seq", version)]

    def queued(self, limit: int) -> list[Feedback]:
        return self.list_feedback("queued", limit)

    def list_feedback(
        self, status: FeedbackStatus | None = None, limit: int = 100, after: str | None = None
    ) -> list[Feedback]:
        """In order of arrival, those that came after the item ``after``; none if that is unknown."""
        where: list[str] = ["seq > ?"]
        args: list[Any] = [0]
        if after is not None:
            rows = self._rows("SELECT seq FROM feedback WHERE id = ?", after)
            if not rows:
                return []
            args = [rows[0]["seq"]]
        if status is not None:
            where.append("status = ?")
            args.append(status)
        sql = f"SELECT * FROM feedback WHERE {' AND '.join(where)} ORDER BY seq LIMIT ?"  # noqa: S608
        return [Feedback.of(r) for r in self._rows(sql, *args, limit)]

    def counts(self) -> dict[str, int]:
        """Number of feedback items by status."""
        return {r["status"]: r["n"] for r in self._rows("SELECT status, COUNT(*) AS n FROM feedback GROUP BY status")}

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


def digest_of(kind: str, text: str) -> str:
    """Of the payload as it is stored."""
    return hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()


def take_up(db: sqlite3.Connection, version: int, ids: Iterable[str]) -> None:
    """A job begins with these; NotQueuedError if one is no longer queued."""
    for id in ids:
        taken = db.execute(
            "UPDATE feedback SET status = 'training', version = ?, attempts = attempts + 1 "
            "WHERE id = ? AND status = 'queued'",
            (version, id),
        )
        if taken.rowcount != 1:
            raise NotQueuedError(f"feedback {id} is not queued")


def refuse_all(db: sqlite3.Connection, version: int, reason: str, *, least_attempts: int = 0) -> None:
    """The job will never be committed, and what it was to teach is refused with it."""
    where = "version = ? AND status = 'training' AND attempts >= ?"
    ids = _ids(db, where, version, least_attempts)
    db.execute(f"UPDATE feedback SET status = 'refused', reason = ? WHERE {where}", (reason, version, least_attempts))  # noqa: S608
    record(db, "feedback.refused", ids, {"reason": reason, "version": version})


def queue_again(db: sqlite3.Connection, version: int, *, counted: bool) -> None:
    """The job was lost. What killed the learner three times is refused; what had no room (not ``counted``) may go on trying."""
    if not counted:
        db.execute("UPDATE feedback SET attempts = attempts - 1 WHERE version = ? AND status = 'training'", (version,))
    refuse_all(db, version, "the learner died three times while training this", least_attempts=3)
    where = "version = ? AND status = 'training'"
    ids = _ids(db, where, version)
    db.execute(f"UPDATE feedback SET status = 'queued', version = NULL WHERE {where}", (version,))  # noqa: S608
    record(db, "feedback.requeued", ids, {"reason": f"version {version} was lost"})


def follow_line(db: sqlite3.Connection, head: int, line: str) -> None:
    """Of everything that was ever learned, what is in the line of the new head is applied, the rest is rolled back.

    ``line`` is SQL that selects the ids of the versions in that line, with one parameter, the head.
    """
    where = f"version IN ({line}) AND status IN ('training', 'rolled_back')"
    ids = _ids(db, where, head)
    db.execute(f"UPDATE feedback SET status = 'applied', reason = NULL WHERE {where}", (head,))  # noqa: S608
    record(db, "feedback.applied", ids, {"version": head})
    where, reason = f"version NOT IN ({line}) AND status = 'applied'", f"version {head} took it back"
    ids = _ids(db, where, head)
    db.execute(f"UPDATE feedback SET status = 'rolled_back', reason = ? WHERE {where}", (reason, head))  # noqa: S608
    record(db, "feedback.rolled_back", ids, {"reason": reason})


def _ids(db: sqlite3.Connection, where: str, *args: Any) -> list[str]:
    return [r["id"] for r in db.execute(f"SELECT id FROM feedback WHERE {where} ORDER BY seq", args)]  # noqa: S608


def _one(db: sqlite3.Connection, id: str) -> Feedback:
    return Feedback.of(db.execute("SELECT * FROM feedback WHERE id = ?", (id,)).fetchone())
