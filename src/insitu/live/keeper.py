"""Keep one learner alive beside a server."""

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from insitu.live.config import TeachConfig

log = logging.getLogger("insitu.server")


class LearnerKeeper:
    """Starts a learner whenever none holds the state directory, and backs off when it keeps dying. One that outlived an
    earlier server attaches by itself.

    Args:
        state_dir: of the server.
        teach: how the learner teaches.
        threads: for its forward and backward passes.
        cores: where it may run; everywhere if empty.
    """

    def __init__(self, state_dir: Path, teach: TeachConfig, threads: int, cores: Iterable[int] = ()) -> None:
        self.state_dir = state_dir
        self._teach = teach
        self._threads = threads
        self._cores = set(cores)
        self._stopping = threading.Event()
        self._learner: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="insitu-supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the learner this keeper started. What it had not committed is lost, and listed as such."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._learner is not None and self._learner.poll() is None:
            self._learner.terminate()
            try:
                self._learner.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._learner.kill()
                self._learner.wait()

    def _keep(self) -> None:
        delay, started = 0.5, 0.0
        while not self._stopping.wait(0.2):
            if (self._learner is not None and self._learner.poll() is None) or held(self.state_dir / "learner.lock"):
                continue
            if self._learner is not None:
                log.warning(
                    "the learner ended (exit code %s); starting another; what it said is in %s",
                    self._learner.returncode,
                    self.state_dir / "learner.log",
                )
                delay = 0.5 if time.monotonic() - started > 60 else min(30.0, delay * 2)
                if self._stopping.wait(delay):
                    return
            started = time.monotonic()
            try:
                self._learner = self._start()
            except OSError as error:  # no memory to fork, no room for its log: tried again, the server goes on
                log.error("a learner could not be started: %s", error)
                self._stopping.wait(5.0)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "insitu.live.learner", str(self.state_dir), json.dumps(asdict(self._teach))]
        # A short spin: the learner's threads find each other quickly in a write, and let go of the cores soon after it.
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "GOMP_SPINCOUNT": "20000"}
        with (self.state_dir / "learner.log").open("ab") as output:
            # A session of its own: Ctrl-C in a terminal ends the server, which then ends the learner in order.
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        if self._cores:
            os.sched_setaffinity(process.pid, self._cores)
        return process


def held(path: Path) -> bool:
    """Whether some process holds the lock file."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
