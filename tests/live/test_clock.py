"""Clocks jump. Nothing is ordered by one, waited for by one, or lost by one."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from insitu.live import gathering
from insitu.live.checkpoint import VersionError
from insitu.live.learner import Learner
from insitu.live.records import Feedback, NotQueuedError, Rollback
from insitu.live.store import Store

HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "insitu.db")
    made.commit(made.reserve("base", None), "0" * 64, {})
    yield made
    made.close()


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour earlier each time it is asked."""
    now = [time.time()]

    def tell() -> float:
        now[0] -= HOUR
        return now[0]

    monkeypatch.setattr(time, "time", tell)


def add(store: Store, word: str) -> Feedback:
    return store.add_feedback("messages", {"messages": [{"role": "user", "content": word}]}, word)[0]


@pytest.mark.usefixtures("backwards")
def test_everything_is_in_the_order_in_which_it_came(store: Store) -> None:
    items = [add(store, word) for word in "abcdef"]
    assert items[0].created > items[1].created
    assert [item.id for item in store.queued(9)] == list("abcdef")
    assert [item.id for item in store.list_feedback(after="c")] == list("def")
    for name in "abc":
        store.commit(store.reserve("teach", store.head(), feedback=[name]), "1" * 64, {})
    assert store.head() == 3
    assert [version.id for version in store.versions()] == [0, 1, 2, 3]
    store.commit(store.reserve("rollback", 3, target=1), "1" * 64, {})
    assert [store.feedback(name).status for name in "abc"] == ["applied", "rolled_back", "rolled_back"]  # type: ignore[union-attr]
    assert [event.id for event in store.events(after=0, limit=100)] == list(range(1, len(store.events(after=0)) + 1))
    first, second = store.add_rollback(0), store.add_rollback(1)
    assert first.created > second.created
    assert [request.id for request in store.open_rollbacks()] == [first.id, second.id]


def test_a_process_whose_clock_is_behind_writes_at_the_end(store: Store, tmp_path: Path) -> None:
    add(store, "here")
    code = """
import sys, time
from pathlib import Path
real = time.time
time.time = lambda: real() - 3600
from insitu.live.store import Store
store = Store(Path(sys.argv[1]))
store.add_feedback("messages", {"n": 1}, "there")
store.close()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "insitu.db")], check=True)
    add(store, "again")
    found = store.queued(9)
    assert [item.id for item in found] == ["here", "there", "again"]
    assert found[1].created < found[0].created - HOUR / 2
    assert [event.subject for event in store.events()[-3:]] == ["here", "there", "again"]


# -- the learner -------------------------------------------------------------------------------------------------------
class Idle(Learner):
    """A learner whose jobs only note what they were given, at a server that goes away after ``seconds``."""

    def __init__(self, store: Store, seconds: float = 30.0) -> None:
        until = time.monotonic() + seconds
        self.store = store
        self.engine: Any = SimpleNamespace(server_gone=lambda: time.monotonic() > until)
        self.versions: Any = SimpleNamespace(discard_uncommitted=list)
        self.jobs: list[tuple[float, list[str]]] = []
        self.on_teach: Callable[[], None] = lambda: None

    def teach(self, items: Any) -> None:
        self.on_teach()
        ids = [item.id for item in items]
        self.store.commit(self.store.reserve("teach", self.store.head(), feedback=ids), "1" * 64, {})
        self.jobs.append((time.monotonic(), ids))


def work(learner: Idle, store: Store, done: Callable[[], bool]) -> None:
    """Let it work until ``done``."""
    learner.engine = SimpleNamespace(server_gone=done)
    with pytest.raises(ConnectionError):
        learner.work()


@pytest.mark.parametrize("stamp", [-HOUR, HOUR], ids=["in the past", "in the future"])
def test_a_stamp_that_is_off_neither_delays_a_job_nor_splits_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, stamp: float
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + stamp)
    add(store, "a")
    monkeypatch.setattr(time, "time", real)
    learner = Idle(store)
    started = time.monotonic()
    late = threading.Timer(0.2, lambda: (monkeypatch.setattr(time, "time", lambda: real() + stamp), add(store, "b")))
    late.start()
    work(learner, store, lambda: bool(learner.jobs) or time.monotonic() - started > 20)
    late.join()
    assert [ids for _, ids in learner.jobs] == [["a", "b"]]
    assert learner.jobs[0][0] - started < 4  # a short silence after the second, whatever the stamps say


def test_posts_that_never_pause_are_not_waited_for_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "SILENCE_SECONDS", 0.2)
    learner, n = Idle(store), [0]
    started = time.monotonic()

    def post_and_look() -> bool:
        n[0] += n[0] < 25
        add(store, str(n[0]))
        return bool(learner.jobs) or time.monotonic() - started > 20

    work(learner, store, post_and_look)
    assert len(learner.jobs) == 1
    assert learner.jobs[0][0] - started < 10


def test_a_job_whose_item_was_withdrawn_at_the_last_moment_is_made_of_the_others(store: Store) -> None:
    add(store, "a"), add(store, "b")
    learner = Idle(store)

    def withdraw() -> None:
        learner.on_teach = lambda: None
        store.withdraw("b")

    learner.on_teach = withdraw
    started = time.monotonic()
    work(learner, store, lambda: bool(learner.jobs) or time.monotonic() - started > 20)
    assert [ids for _, ids in learner.jobs] == [["a"]]
    with pytest.raises(NotQueuedError):
        store.reserve("teach", 0, feedback=["b"])


# -- rollbacks ---------------------------------------------------------------------------------------------------------
class Rolling(Idle):
    """Far enough for the first lines of a rollback; what comes after them is counted."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.begun = 0
        self.served: Any = SimpleNamespace(head=store.head)
        self.versions: Any = SimpleNamespace(content=self._begin)

    def _begin(self, target: int) -> None:
        self.begun += 1
        raise VersionError("not in this test")


def test_a_rollback_that_was_committed_before_its_learner_died_is_known_by_ids(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit(store.reserve("teach", 0), "1" * 64, {})
    request = store.add_rollback(0)
    assert request.after == 1
    store.update_rollback(request.id, "running")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - HOUR)  # the commit is stamped before the request
    store.commit(store.reserve("rollback", 1, target=0), "0" * 64, {})
    learner = Rolling(store)
    learner.roll_back(reread(store, request))
    found = reread(store, request)
    assert (found.status, found.version, learner.begun) == ("done", 2, 0)


def test_an_older_rollback_to_the_same_version_is_not_taken_for_this_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + HOUR)
    store.commit(store.reserve("rollback", 0, target=0), "0" * 64, {})  # stamped after the request
    monkeypatch.setattr(time, "time", real)
    request = store.add_rollback(0)
    store.update_rollback(request.id, "running")
    learner = Rolling(store)
    learner.roll_back(reread(store, request))
    assert learner.begun == 1


def reread(store: Store, request: Rollback) -> Rollback:
    found = store.rollback(request.id)
    assert found is not None
    return found
