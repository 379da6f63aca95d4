"""What the store remembers, as the rest of the program sees it, and how a row of the database becomes that."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any, Literal, Self

FeedbackKind = Literal["messages", "continuation"]
FeedbackStatus = Literal["queued", "held", "withdrawn", "training", "applied", "refused", "rolled_back"]
VersionKind = Literal["base", "teach", "rollback"]
VersionStatus = Literal["reserved", "committed", "refused", "lost"]
JobStatus = Literal["queued", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Feedback:
    """One thing to learn from. ``kind`` is ``messages`` (payload ``{"messages": [...]}``) or ``continuation`` (payload
    ``{"context_ids": [...], "continuation_ids": [...]}``). ``version`` is set once a job has taken it up."""

    id: str
    created: float
    kind: FeedbackKind
    payload: dict[str, Any]
    status: FeedbackStatus
    reason: str | None
    version: int | None

    @classmethod
    def of(cls, r: sqlite3.Row) -> Self:
        return cls(r["id"], r["created"], r["kind"], json.loads(r["payload"]), r["status"], r["reason"], r["version"])


@dataclass(frozen=True, slots=True)
class VersionFile:
    """What was made durable: its name in the directory of versions, bytes, and the sha256 of its content; and how far the
    update went, |after - before| / |before| over all weights."""

    name: str
    bytes: int
    sha256: str
    norm_ratio: float


@dataclass(frozen=True, slots=True)
class Version:
    """One version of the weights; ``report`` holds the figures of the job that made (or failed to make) it. ``pinned`` ones
    are never pruned; the bytes of a ``pruned`` one are gone."""

    id: int
    kind: VersionKind
    status: VersionStatus
    parent: int | None
    target: int | None
    created: float
    sha256: str | None
    report: dict[str, Any]
    file: VersionFile | None
    pinned: bool
    pruned: bool

    @classmethod
    def of(cls, r: sqlite3.Row) -> Self:
        return cls(
            r["id"],
            r["kind"],
            r["status"],
            r["parent"],
            r["target"],
            r["created"],
            r["sha256"],
            json.loads(r["report"]),
            None if r["file"] is None else VersionFile(**json.loads(r["file"])),
            bool(r["pinned"]),
            bool(r["pruned"]),
        )


@dataclass(frozen=True, slots=True)
class Rollback:
    """A request to serve the bytes of ``target`` again, made when ``after`` was the head; ``version`` is what came of it."""

    id: int
    created: float
    target: int
    after: int
    status: JobStatus
    version: int | None
    reason: str | None

    @classmethod
    def of(cls, r: sqlite3.Row) -> Self:
        return cls(r["id"], r["created"], r["target"], r["after"], r["status"], r["version"], r["reason"])


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to ``subject``: a feedback id, ``version 3``, ``server``. ``detail`` says why, with figures."""

    id: int
    created: float
    kind: str
    subject: str
    detail: dict[str, Any]

    @classmethod
    def of(cls, r: sqlite3.Row) -> Self:
        return cls(r["id"], r["created"], r["kind"], r["subject"], json.loads(r["detail"]))


@dataclass(frozen=True, slots=True)
class Completion:
    """What was answered, so that a correction can name it. ``key`` is a digest, never the key."""

    id: str
    key: str
    messages: list[dict[str, Any]]
    text: str
    weight_version: str

    @classmethod
    def of(cls, r: sqlite3.Row) -> Self:
        return cls(r["id"], r["key"], json.loads(r["messages"]), r["text"], r["weight_version"])


@dataclass(frozen=True, slots=True)
class Canary:
    """A prompt that a user added to those by which updates are judged."""

    id: int
    created: float
    prompt: str

    @property
    def name(self) -> str:
        """How it is listed and reported; its prompt may be private."""
        return f"canary-{self.id}"

    @classmethod
    def of(cls, r: sqlite3.Row) -> Self:
        return cls(r["id"], r["created"], r["prompt"])


class IdInUseError(ValueError):
    """A feedback id was used before with other content."""


class QueueFullError(RuntimeError):
    """So much is queued and held that nothing new is taken until some of it is done."""


class WrongStatusError(ValueError):
    """What was asked cannot be done to feedback in this status; the message says the status and the way out."""


class NotQueuedError(RuntimeError):
    """Feedback was held or withdrawn before the job that wanted it began."""


class StateError(ValueError):
    """The state directory, a file in it, or a key cannot be used; the message names it and the way out."""
