"""A learner that dies is replaced, ever more rarely if it goes on dying, and it ends with its keeper."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from keeping import World, alive, kept
from processes import wait_for

from insitu.live import keeper as module
from insitu.live.config import TeachConfig
from insitu.live.keeper import LearnerKeeper, held


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with kept(tmp_path, monkeypatch) as world:
        yield world


# -- dying -------------------------------------------------------------------------------------------------------------
def test_a_learner_that_dies_is_replaced_and_its_exit_code_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "insitu.server"):
        world.keep()
        first = world.await_ready()
        os.kill(first, signal.SIGKILL)
        world.await_started(2)
    assert world.started()[0]["pid"] == first
    assert not alive(first)  # reaped
    assert "the learner ended (exit code -9); starting another" in caplog.text


def test_one_that_keeps_dying_is_started_ever_more_rarely(world: World) -> None:
    world.order("die")
    keeper = world.keep(max(os.sched_getaffinity(0)))  # bound though it may be dead already
    wait_for(lambda: len(keeper._stopping.delays) >= 8, what="eight deaths")  # type: ignore[attr-defined]
    keeper.close()
    assert keeper._stopping.delays[:8] == [1, 2, 4, 8, 16, 30, 30, 30]  # type: ignore[attr-defined]
    assert len(world.started()) <= len(keeper._stopping.delays)  # type: ignore[attr-defined]


def test_after_a_minute_of_life_the_wait_is_short_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    world.order("die")
    keeper = world.keep()
    wait_for(lambda: len(keeper._stopping.delays) >= 3, what="three deaths")  # type: ignore[attr-defined]
    world.order("live")
    pid = world.await_ready()
    before = len(keeper._stopping.delays)  # type: ignore[attr-defined]
    assert keeper._stopping.delays[before - 1] >= 4  # type: ignore[attr-defined]
    now[0] += 61
    (world.state_dir / "ready").unlink()
    os.kill(pid, signal.SIGKILL)
    world.await_ready()
    assert keeper._stopping.delays[before:] == [0.5]  # type: ignore[attr-defined]


# -- closing -----------------------------------------------------------------------------------------------------------
def test_close_ends_the_learner_and_reaps_it_and_starts_no_other(world: World) -> None:
    keeper = world.keep()
    pid = world.await_ready()
    keeper.close()
    assert not alive(pid)
    assert keeper._learner is not None
    assert keeper._learner.returncode == -signal.SIGTERM
    assert not keeper._thread.is_alive()
    assert not held(world.state_dir / "learner.lock")
    threading.Event().wait(0.1)
    assert len(world.started()) == 1
    keeper.close()  # idempotent


def test_one_that_does_not_obey_is_killed_and_reaped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = subprocess.Popen.wait
    waits: list[float | None] = []

    def soon(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        waits.append(timeout)
        return wait(self, None if timeout is None else 0.3)

    world.order("stubborn", "live")
    keeper = world.keep()
    pid = world.await_ready()
    monkeypatch.setattr(subprocess.Popen, "wait", soon)
    keeper.close()
    assert waits == [10, None]
    assert not alive(pid)
    assert keeper._learner is not None
    assert keeper._learner.returncode == -signal.SIGKILL


def test_close_between_two_learners_does_not_wait_for_the_next(world: World) -> None:
    world.order("die")
    keeper = LearnerKeeper(world.state_dir, TeachConfig(), 1)
    world.keepers.append(keeper)
    keeper.start()  # with the real waits
    world.await_started(1)
    keeper._learner and keeper._learner.wait()
    closing = threading.Thread(target=keeper.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    assert len(world.started()) == 1
