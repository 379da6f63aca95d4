"""When the posts in the queue are a whole job."""

import time
from collections.abc import Sequence

from insitu.live.records import Feedback

SILENCE_SECONDS = 0.5  # feedback posted one by one within this time is learned together
MAX_ITEMS = 32  # in one job


class Gathering:
    """Decides when a job is whole. A file of examples arrives as many posts: wait for a short silence, or a full job.

    Timed here, by a clock that only goes forward: the one by which posts are stamped may have jumped since.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._newest, self._newest_since = "", 0.0

    def complete(self, items: Sequence[Feedback]) -> bool:
        now = time.monotonic()
        if not items:
            self._since = None
            return False
        self._since = self._since or now
        if items[-1].id != self._newest:
            self._newest, self._newest_since = items[-1].id, now
        silent = now - self._newest_since > SILENCE_SECONDS
        if silent or len(items) == MAX_ITEMS or now - self._since > 10 * SILENCE_SECONDS:
            self._since = None
            return True
        return False
