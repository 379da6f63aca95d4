"""One learner is kept beside a server, never two."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from keeping import Impatient, World, kept
from processes import wait_for

from insitu.live.config import TeachConfig
from insitu.live.keeper import LearnerKeeper, held


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with kept(tmp_path, monkeypatch) as world:
        yield world


@pytest.fixture
def outsider(world: World) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """A learner that an earlier server left behind: it holds the lock and belongs to nobody here."""
    found: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        code = (
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(600)"
        )
        process = subprocess.Popen(
            [sys.executable, "-SE", "-c", code, str(world.state_dir / "learner.lock")], stdout=subprocess.PIPE
        )
        found.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in found:
        process.kill()
        process.__exit__(None, None, None)


# -- starting ----------------------------------------------------------------------------------------------------------
def test_a_learner_is_started_with_its_directory_its_configuration_and_its_threads(world: World) -> None:
    world.keep(threads=3)
    world.await_ready()
    (facts,) = world.started()
    assert facts["argv"][:3] == ["-m", "insitu.live.learner", str(world.state_dir)]
    assert TeachConfig(**json.loads(facts["argv"][3])) == TeachConfig(rank=17, limiter=None)
    assert len(facts["argv"]) == 4
    assert (facts["OMP_NUM_THREADS"], facts["GOMP_SPINCOUNT"]) == ("3", "20000")
    assert facts["HOME"] == os.environ.get("HOME")
    assert facts["session"] == facts["pid"] != os.getsid(0)  # Ctrl-C in a terminal does not reach it
    assert (world.state_dir / "learner.log").read_text() == "a word for the log\n"


def test_the_learner_is_bound_to_its_cores(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[tuple[int, set[int]]] = []
    bind = os.sched_setaffinity
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append((pid, set(cores))) or bind(pid, cores))
    core = max(os.sched_getaffinity(0))
    world.keep(core)
    pid = world.await_ready()
    wait_for(lambda: bound, what="the learner to be bound")
    assert bound == [(pid, {core})]
    assert os.sched_getaffinity(pid) == {core}


def test_without_cores_the_learner_may_run_where_its_server_may(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("bound to nothing"))
    world.keep()
    assert os.sched_getaffinity(world.await_ready()) == os.sched_getaffinity(0)


# -- never two ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("orders", [("lock", "live"), ("live",)], ids=["holds the lock", "has not come to the lock"])
def test_no_second_learner_is_started_while_the_first_lives(world: World, orders: tuple[str, ...]) -> None:
    world.order(*orders)
    keeper = world.keep()
    world.await_ready()
    assert isinstance(keeper._stopping, Impatient)
    turns = threading.Event()
    turns.wait(0.2)  # a hundred looks
    assert len(world.started()) == 1


def test_no_learner_is_started_while_another_one_holds_the_lock(
    world: World, outsider: Callable[[], subprocess.Popen[bytes]]
) -> None:
    other = outsider()
    keeper = world.keep()
    threading.Event().wait(0.2)
    assert world.started() == []
    other.kill()
    other.wait()
    world.await_started(1)
    assert isinstance(keeper._stopping, Impatient)
    assert keeper._stopping.delays == []  # the first of its own is started at once
    assert len(world.started()) == 1


def test_held_tells_whether_somebody_else_holds_the_lock_and_does_not_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "learner.lock"
    assert not held(path)
    assert not held(path)  # it was not kept
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert held(path)
        assert held(path)
    assert not held(path)


def test_close_before_start_and_with_nothing_started_is_harmless(
    world: World, outsider: Callable[[], subprocess.Popen[bytes]]
) -> None:
    LearnerKeeper(world.state_dir, TeachConfig(), 1).close()
    other = outsider()
    world.keep().close()
    assert world.started() == []
    assert other.poll() is None  # a learner that this keeper did not start is left alone
