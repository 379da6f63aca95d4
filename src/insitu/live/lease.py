"""Which process has the weights. One at a time; a lease ends only with its process, and after what it left behind is undone."""

import os
import select
import signal
import threading
from contextlib import suppress

_GRACE_SECONDS = 5.0  # for a learner that closed its connection to end by itself, before it is killed


class Lease:
    """Held by at most one process; ``holder`` is its pid, kept until :meth:`free`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = -1  # pidfd: unlike a pid it cannot come to mean another process
        self.holder: int | None = None

    def take(self, pid: int) -> bool:
        """False while another has it. Raises ConnectionError if the process has ended already."""
        with self._lock:
            if self.holder is not None:
                return False
            try:
                self._process = os.pidfd_open(pid)
            except ProcessLookupError:
                raise ConnectionError(f"process {pid} has ended") from None
            self.holder = pid
            return True

    def outlive(self) -> None:
        """Return when the holder has ended; kill it if it does not within the grace: it must not write again."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        if not poll.poll(_GRACE_SECONDS * 1000):
            with suppress(ProcessLookupError):  # it ended just now
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            poll.poll()

    def free(self) -> None:
        with self._lock:
            os.close(self._process)
            self.holder = None

    def refusal(self) -> str:
        """What another process is told that asked for the weights meanwhile."""
        if (holder := self.holder) is None:
            return "the weights were lent to a process that has just ended; ask again"
        return f"the weights are lent to process {holder}: end it, or wait until what it left behind is undone"
