"""What happened, in order, and how often: every accepted, refused, rolled back, repaired or lost thing, with its reason.

An event is written in the transaction of what it tells of, so neither is there without the other. It names feedback by id
only: whoever may ask may read events, and what was taught is for those who may teach.
"""

import json
import logging
import sqlite3
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

from insitu.live.database import Database
from insitu.live.records import Event

log = logging.getLogger("insitu.events")

KEEP = 100_000  # the newest; counters go on counting


class Events(Database):
    """The part of the store that tells what happened."""

    def add_event(self, kind: str, subject: str, /, **detail: Any) -> None:
        with self._transaction() as db:
            record(db, kind, [subject], detail)

    def events(self, after: int | None = None, limit: int = 100) -> list[Event]:
        """Oldest first: those after the event ``after``, or else the last ones."""
        if after is not None:
            rows = self._rows("SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?", after, limit)
        else:
            rows = self._rows("SELECT * FROM events ORDER BY id DESC LIMIT ?", limit)[::-1]
        return [Event.of(r) for r in rows]

    def counters(self) -> dict[str, int]:
        """Number of events by kind since the directory was made, also of those that are no longer kept."""
        return {r["kind"]: r["n"] for r in self._rows("SELECT kind, n FROM counters ORDER BY kind")}


def record(db: sqlite3.Connection, kind: str, subjects: Iterable[str], detail: Mapping[str, Any]) -> None:
    """The same event for each subject, inside the transaction that ``db`` is in."""
    text, now = json.dumps(detail), time.time()
    rows = [(now, kind, subject, text) for subject in subjects]
    db.executemany("INSERT INTO events (created, kind, subject, detail) VALUES (?, ?, ?, ?)", rows)
    count(db, kind, len(rows))
    db.execute("DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?", (KEEP,))


def count(db: sqlite3.Connection, kind: str, n: int = 1) -> None:
    """Only count it."""
    if n:
        db.execute("INSERT INTO counters VALUES (?, ?) ON CONFLICT(kind) DO UPDATE SET n = n + excluded.n", (kind, n))


def note(store: Events, kind: str, subject: str, /, **detail: Any) -> None:
    """For what has happened whether or not it can be written down: a store that fails is logged, and the work goes on."""
    try:
        store.add_event(kind, subject, **detail)
    except sqlite3.Error:
        log.exception("the event %s of %s could not be stored", kind, subject)


def figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """What an event repeats of a job's report. Stalls are in seconds."""
    names = ("verdict", "examples", "seconds", "gap", "canary_kl", "update_norm_ratio")
    told: dict[str, Any] = {name: report[name] for name in names if name in report}
    if "steps" in report:
        told["steps"] = len(report["steps"])
        if stalls := [step["stall"]["total"] for step in report["steps"] if "stall" in step]:
            told["stall"] = {"max": round(max(stalls), 4), "median": round(statistics.median(stalls), 4)}
    return told
