"""A learner that is a script, for the tests of who keeps it alive: quick to start, and it does as it is told."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import wait_for

from insitu.live import keeper as module
from insitu.live.config import TeachConfig
from insitu.live.keeper import LearnerKeeper

# What is started in the place of Python with the learner's module: it notes itself, and does what a file says.
_LEARNER = """#!{python} -SE
import fcntl, json, os, signal, sys, time
state_dir = sys.argv[3]
with open(state_dir + "/started", "a") as notes:
    threads = {{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "HOME")}}
    facts = {{"pid": os.getpid(), "argv": sys.argv[1:], "session": os.getsid(0), **threads}}
    notes.write(json.dumps(facts) + chr(10))
print("a word for the log", flush=True)
orders = open(state_dir + "/orders").read()
if "stubborn" in orders:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "lock" in orders:
    lock = open(state_dir + "/learner.lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
if "live" in orders:
    open(state_dir + "/ready", "w").close()
    time.sleep(600)
sys.exit(7)
"""


class Impatient(threading.Event):
    """Waits a hundredth of what it is told, and remembers the waits between two learners."""

    def __init__(self) -> None:
        super().__init__()
        self.delays: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if timeout != 0.2:
            self.delays.append(timeout)
        return super().wait(timeout / 100)


class World:
    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.order("lock", "live")
        self.keepers: list[LearnerKeeper] = []

    def order(self, *words: str) -> None:
        (self.state_dir / "orders").write_text(" ".join(words))

    def keep(self, *cores: int, threads: int = 3) -> LearnerKeeper:
        keeper = LearnerKeeper(self.state_dir, TeachConfig(rank=17, limiter=None), threads, cores)
        keeper._stopping = Impatient()
        self.keepers.append(keeper)
        keeper.start()
        return keeper

    def started(self) -> list[dict[str, Any]]:
        file = self.state_dir / "started"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def await_started(self, count: int) -> list[dict[str, Any]]:
        wait_for(lambda: len(self.started()) >= count, 30, f"{count} learners")
        return self.started()

    def await_ready(self) -> int:
        wait_for((self.state_dir / "ready").exists, 30, "a learner that lives")
        return int(self.started()[-1]["pid"])


@contextmanager
def kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A state directory in which learners are scripts; every keeper is closed at the end."""
    script = directory / "python"
    script.write_text(_LEARNER.format(python=sys.executable))
    script.chmod(0o700)
    monkeypatch.setattr(module, "sys", SimpleNamespace(executable=str(script)))
    (directory / "state").mkdir()
    world = World(directory / "state")
    yield world
    for keeper in world.keepers:
        keeper.close()


def alive(pid: int) -> bool:
    """A zombie, which nobody has reaped, counts as alive."""
    return Path(f"/proc/{pid}").exists()
