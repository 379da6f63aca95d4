"""How much feedback is taken: so many items may wait, and so many posts in a minute.

A runaway client must not fill the disk or keep the server from answering. Both refusals are 429 with Retry-After, which the
openai client and ours obey.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from insitu.live.api.errors import ApiError
from insitu.live.config import DEFAULT_FEEDBACK_PER_MINUTE, DEFAULT_MAX_QUEUE, FEEDBACK_PER_MINUTE, MAX_QUEUE
from insitu.live.records import QueueFullError, StateError

_FULL_SECONDS = 10  # about the time of a job, which makes room for the items it takes


class Limits:
    """One token bucket for one server process: there is one learn key. Used from the event loop alone.

    Args:
        max_queue: items queued or held at once.
        per_minute: posts taken in a minute, on average; an idle minute is saved up, no more.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        max_queue: int = DEFAULT_MAX_QUEUE,
        per_minute: int = DEFAULT_FEEDBACK_PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_queue = max_queue
        self.per_minute = per_minute
        self._clock = clock
        self._tokens, self._since = float(per_minute), clock()
        self._refused = {"queue_full": 0, "rate_limited": 0}

    def admit(self) -> None:
        """Count one post, or raise its 429."""
        now = self._clock()
        self._tokens = min(self.per_minute, self._tokens + (now - self._since) * self.per_minute / 60)
        self._since = now
        if self._tokens < 1:
            self._refused["rate_limited"] += 1
            wait = math.ceil((1 - self._tokens) * 60 / self.per_minute)
            message = f"more than {self.per_minute} posts of feedback in a minute; wait {wait} s"
            raise _too_many(message, "rate_limit_exceeded", wait)
        self._tokens -= 1

    def full(self, error: QueueFullError) -> ApiError:
        """The 429 of a queue that takes nothing new."""
        self._refused["queue_full"] += 1
        return _too_many(str(error), "queue_full", _FULL_SECONDS)

    def status(self) -> dict[str, Any]:
        """For GET /v1/live; what was refused is counted from the start of this process: it left no trace in the store."""
        return {"max_queue": self.max_queue, "feedback_per_minute": self.per_minute, **self._refused}


def limits_of_environment(environ: Mapping[str, str] = os.environ) -> Limits:
    """For a process that is configured through its environment; StateError names a variable that is no number."""
    defaults = {MAX_QUEUE: DEFAULT_MAX_QUEUE, FEEDBACK_PER_MINUTE: DEFAULT_FEEDBACK_PER_MINUTE}
    found: list[int] = []
    for name, default in defaults.items():
        text = environ.get(name) or str(default)
        if not (text.isascii() and text.isdigit() and int(text) > 0):
            raise StateError(f"{name}={text!r}; expected an integer, 1 or more")
        found.append(int(text))
    return Limits(found[0], found[1])


def _too_many(message: str, code: str, seconds: int) -> ApiError:
    return ApiError(429, message, code=code, headers={"retry-after": str(seconds)})
