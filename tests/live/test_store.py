"""The store: a queue that survives its processes, ids that are never used twice, and marks that follow the served line."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from insitu.live.records import Completion, IdInUseError, NotQueuedError, VersionFile
from insitu.live.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "insitu.db")
    made.commit(made.reserve("base", None), "0" * 64, {"source": "test"})
    yield made
    made.close()


def add(store: Store, word: str, id: str | None = None) -> str:
    return store.add_feedback("messages", {"messages": [{"role": "user", "content": word}]}, id)[0].id


def teach(store: Store, *ids: str) -> int:
    version = store.reserve("teach", store.head(), feedback=list(ids))
    store.commit(version, f"{version:064}", {"loss": 0.1})
    return version


def roll_back(store: Store, target: int) -> int:
    version = store.reserve("rollback", store.head(), target=target)
    store.commit(version, f"{target:064}", {})
    return version


def status(store: Store, id: str) -> str:
    found = store.feedback(id)
    assert found is not None
    return found.status


# -- the queue ---------------------------------------------------------------------------------------------------------
def test_the_queue_is_in_order_of_arrival(store: Store) -> None:
    ids = [add(store, word, id) for word, id in (("one", "z"), ("two", None), ("three", "a"))]
    assert [item.id for item in store.queued(10)] == ids
    assert [item.id for item in store.queued(2)] == ids[:2]
    teach(store, ids[0])
    assert [item.id for item in store.queued(10)] == ids[1:]


def test_what_is_read_back_is_what_was_given(store: Store) -> None:
    payload = {"messages": [{"role": "user", "content": "π 😀 \x00 \n"}]}
    item, is_new = store.add_feedback("messages", payload, "x")
    assert is_new
    assert item == store.feedback("x")
    assert (item.payload, item.kind, item.status, item.version, item.reason) == (
        payload,
        "messages",
        "queued",
        None,
        None,
    )
    assert store.feedback("unknown") is None


def test_the_same_content_is_queued_once(store: Store) -> None:
    first = add(store, "one")
    assert add(store, "one") == first
    teach(store, first)
    assert add(store, "one") == first  # it was learned: nothing to do
    assert store.counts() == {"applied": 1}


def test_the_same_words_of_another_kind_are_other_content(store: Store) -> None:
    payload: dict[str, Any] = {"messages": []}
    store.add_feedback("messages", payload)
    assert store.add_feedback("continuation", payload)[1]


def test_an_id_is_the_same_item_whatever_became_of_it(store: Store) -> None:
    add(store, "one", "x")
    store.refuse("x", "odd")
    item, is_new = store.add_feedback("messages", {"messages": [{"role": "user", "content": "one"}]}, "x")
    assert (item.status, item.reason, is_new) == ("refused", "odd", False)


def test_an_id_with_other_content_is_an_error(store: Store) -> None:
    add(store, "one", "x")
    with pytest.raises(IdInUseError, match="'x'"):
        add(store, "two", "x")
    assert store.counts() == {"queued": 1}


def test_another_id_teaches_the_same_content_again(store: Store) -> None:
    assert add(store, "one", "x") != add(store, "one", "y")
    assert store.counts() == {"queued": 2}


def test_refused_and_rolled_back_content_may_be_taught_again(store: Store) -> None:
    refused = add(store, "one")
    store.refuse(refused, "too odd")
    assert add(store, "one") != refused
    learned = add(store, "two")
    teach(store, learned)
    roll_back(store, 0)
    assert status(store, learned) == "rolled_back"
    again = add(store, "two")
    assert again != learned
    assert status(store, again) == "queued"


# -- versions ----------------------------------------------------------------------------------------------------------
def test_the_head_is_the_last_committed_version(store: Store, tmp_path: Path) -> None:
    assert store.head() == 0
    reserved = store.reserve("teach", 0)
    assert store.head() == 0
    store.commit(reserved, "1" * 64, {"loss": 0.5})
    found = store.version(reserved)
    assert store.head() == reserved
    assert found is not None
    assert (found.kind, found.status, found.parent, found.sha256) == ("teach", "committed", 0, "1" * 64)
    assert found.report == {"loss": 0.5}
    assert store.version(99) is None
    empty = Store(tmp_path / "other.db")
    assert empty.head() is None
    empty.close()


def test_an_id_is_never_used_twice_not_even_after_a_restart(store: Store, tmp_path: Path) -> None:
    used = [store.reserve("teach", 0)]
    store.abandon(used[0], "lost", "killed", {})
    used.append(store.reserve("teach", 0))
    store.abandon(used[1], "refused", "drift", {})
    store.close()
    again = Store(tmp_path / "insitu.db")
    used.append(again.reserve("teach", 0))
    assert again.head() == 0
    assert used == [1, 2, 3]
    again.close()


def test_a_first_start_that_died_before_its_commit_is_done_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "new.db")
    assert store.reserve("base", None) == 0
    store.close()
    store = Store(tmp_path / "new.db")
    assert store.head() is None
    assert store.reserve("base", None) == 0
    store.commit(0, "0" * 64, {})
    with pytest.raises(sqlite3.IntegrityError):
        store.reserve("base", None)
    assert [v.status for v in store.versions()] == ["committed"]
    store.close()


def test_a_refused_job_refuses_its_feedback_with_the_reason(store: Store) -> None:
    ids = [add(store, word) for word in ("one", "two")]
    version = store.reserve("teach", 0, feedback=ids)
    assert [item.id for item in store.feedback_of(version)] == ids
    assert [status(store, id) for id in ids] == ["training", "training"]
    store.abandon(version, "refused", "the canaries changed", {"kl": 3.0})
    items = [store.feedback(id) for id in ids]
    assert [(i.status, i.reason, i.version) for i in items if i] == [("refused", "the canaries changed", version)] * 2
    found = store.version(version)
    assert found is not None
    assert found.report == {"kl": 3.0, "reason": "the canaries changed"}
    assert store.head() == 0


def test_a_lost_job_is_queued_again_in_its_old_place_and_given_up_after_three(store: Store) -> None:
    killer = add(store, "one")
    other = add(store, "two")
    for attempt in range(1, 4):
        version = store.reserve("teach", 0, feedback=[killer])
        store.abandon(version, "lost", "the process died", {})
        item = store.feedback(killer)
        assert item is not None
        if attempt < 3:
            assert (item.status, item.version) == ("queued", None)
            assert [i.id for i in store.queued(9)] == [killer, other]
    assert (item.status, item.version) == ("refused", version)
    assert "three times" in (item.reason or "")
    assert [i.id for i in store.queued(9)] == [other]


def test_a_version_ends_once(store: Store) -> None:
    version = teach(store)
    with pytest.raises(AssertionError, match="not reserved"):
        store.commit(version, "2" * 64, {})
    with pytest.raises(AssertionError, match="not reserved"):
        store.abandon(version, "lost", "late", {})
    assert store.head() == version


def test_feedback_is_in_one_job_only(store: Store) -> None:
    id = add(store, "one")
    first = store.reserve("teach", 0, feedback=[id])
    with pytest.raises(NotQueuedError, match="not queued"):
        store.reserve("teach", 0, feedback=[id])
    assert [v.id for v in store.versions()] == [0, first]  # and nothing of the second was kept
    assert store.reserve("teach", 0) == first + 1


def test_marks_follow_rollbacks_and_the_rollback_of_a_rollback(store: Store) -> None:
    a, b, c = (add(store, word) for word in "abc")

    def marks() -> str:
        return "".join("+" if status(store, id) == "applied" else "-" for id in (a, b, c))

    one = teach(store, a)
    two = teach(store, b)
    assert marks() == "++-"
    undone = roll_back(store, one)
    assert marks() == "+--"
    item = store.feedback(b)
    assert item is not None
    assert (item.status, item.reason, item.version) == ("rolled_back", f"version {undone} took it back", two)
    three = teach(store, c)  # on the line 0 - one - undone
    assert marks() == "+-+"
    redone = roll_back(store, two)
    assert marks() == "++-"
    assert store.feedback(b) is not None
    roll_back(store, undone)  # the bytes of one, by way of the rollback
    assert marks() == "+--"
    roll_back(store, three)
    assert marks() == "+-+"
    roll_back(store, redone)
    assert marks() == "++-"
    roll_back(store, 0)
    assert marks() == "---"
    item = store.feedback(a)
    assert item is not None
    assert item.reason is not None


def test_refused_feedback_stays_refused_through_rollbacks(store: Store) -> None:
    id = add(store, "one")
    version = store.reserve("teach", 0, feedback=[id])
    store.abandon(version, "refused", "drift", {})
    teach(store)
    roll_back(store, 0)
    assert status(store, id) == "refused"


def test_a_long_line_is_still_one_question(store: Store) -> None:
    with store._transaction() as db:
        rows = ((i, i - 1) for i in range(1, 40_001))
        db.executemany(
            "INSERT INTO versions (id, kind, status, parent, created) VALUES (?, 'teach', 'committed', ?, 0)", rows
        )
    id = add(store, "one")
    teach(store, id)
    assert status(store, id) == "applied"
    roll_back(store, 3)
    assert status(store, id) == "rolled_back"


def test_what_is_told_of_a_file_is_kept_with_its_version(store: Store) -> None:
    file = VersionFile("v1.difference", 7, "2" * 64, 0.25)
    version = store.reserve("teach", 0)
    store.commit(version, "1" * 64, {}, file)
    found = store.version(version)
    assert found is not None
    assert (found.file, found.pinned, found.pruned) == (file, False, False)


def test_a_pin_is_for_versions_whose_bytes_are_there(store: Store) -> None:
    one, two = teach(store), teach(store)
    reserved = store.reserve("teach", two)
    store.pin(one)
    assert store.prune([two], [one])
    assert [(v.pinned, v.pruned) for v in store.versions()[1:3]] == [(True, False), (False, True)]
    for unknown in (reserved, 99, -1):
        with pytest.raises(ValueError, match=rf"version {unknown} does not exist; expected one of those"):
            store.pin(unknown)
    with pytest.raises(ValueError, match=rf"version {two} was pruned to save room, its bytes are gone; expected"):
        store.pin(two)
    store.pin(one, False)
    assert not any(v.pinned for v in store.versions())


def test_nothing_is_pruned_that_a_pin_of_this_moment_may_need(store: Store) -> None:
    one, two = teach(store), teach(store)
    store.pin(two)
    assert not store.prune([one], [])
    assert not any(v.pruned for v in store.versions())
    assert store.prune([one], [two])


# -- rollbacks and completions -----------------------------------------------------------------------------------------
def test_a_rollback_that_is_open_is_not_asked_twice(store: Store) -> None:
    first = store.add_rollback(0)
    assert store.add_rollback(0) == first
    store.update_rollback(first.id, "running")
    assert store.add_rollback(0).id == first.id
    other = store.add_rollback(5)
    assert [r.id for r in store.open_rollbacks()] == [first.id, other.id]
    store.update_rollback(first.id, "done", version=7)
    found = store.rollback(first.id)
    assert found is not None
    assert (found.status, found.version) == ("done", 7)
    assert store.add_rollback(0).id != first.id
    assert store.rollback(99) is None


def test_only_the_newest_completions_are_kept(store: Store) -> None:
    for i in range(8):
        messages = [{"role": "user", "content": str(i)}]
        store.add_completion(Completion(f"c{i}", "digest", messages, "text", "0"), keep=3)
    assert [store.completion(f"c{i}") is not None for i in range(8)] == [False] * 5 + [True] * 3
    assert store.completion("c7") == Completion("c7", "digest", [{"role": "user", "content": "7"}], "text", "0")


def test_meta_is_replaced(store: Store) -> None:
    assert store.get_meta("base") is None
    store.set_meta("base", "one")
    store.set_meta("base", "two")
    assert store.get_meta("base") == "two"


# -- the file ----------------------------------------------------------------------------------------------------------
def test_the_file_is_the_owners_alone(store: Store, tmp_path: Path) -> None:
    add(store, "one")
    files = list(tmp_path.iterdir())
    assert {file.name for file in files} == {"insitu.db", "insitu.db-wal", "insitu.db-shm"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_another_schema_is_refused_with_the_way_out(store: Store, tmp_path: Path) -> None:
    store._db.execute("PRAGMA user_version=3")
    store.close()
    with pytest.raises(ValueError, match="schema 3, this insitu knows schema 2; use the insitu that wrote it"):
        Store(tmp_path / "insitu.db")


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "insitu.db").touch(0o600)
    (tmp_path / "insitu.db").write_text("hello " * 1000)
    with pytest.raises(ValueError, match="not an insitu store"):
        Store(tmp_path / "insitu.db")


def test_a_full_disk_leaves_the_store_as_it_was_and_usable(store: Store) -> None:
    id = add(store, "one")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    version = store.reserve("teach", 0, feedback=[id])
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.commit(version, "1" * 64, {"long": "x" * 100_000})
    assert (store.head(), status(store, id)) == (0, "training")
    store._db.execute("PRAGMA max_page_count=100000")
    store.commit(version, "1" * 64, {})
    assert (store.head(), status(store, id)) == (version, "applied")


def test_a_commit_that_fails_at_the_very_end_is_undone(store: Store) -> None:
    """A deferred constraint is checked by COMMIT itself, which then leaves its transaction open."""

    def refer_to_nothing() -> None:
        with store._transaction() as db:
            db.execute("PRAGMA defer_foreign_keys=ON")
            db.execute(
                "INSERT INTO feedback (id, seq, created, kind, payload, digest, status, version) "
                "VALUES ('x', 1, 0, 'messages', '{}', '', 'queued', 99)"
            )

    with pytest.raises(sqlite3.IntegrityError):
        refer_to_nothing()
    assert store.feedback("x") is None
    add(store, "one")


def test_threads_share_a_store(store: Store) -> None:
    def work(name: str) -> None:
        for i in range(20):
            add(store, f"{name}{i}")
            store.queued(3)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts() == {"queued": 80}


_WORKER = """
import sys
from pathlib import Path
from insitu.live.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
"""


def start(path: Path, work: str, *more: str) -> "subprocess.Popen[str]":
    """A process that opens the store, waits for a line, then does ``work``."""
    command = [sys.executable, "-c", _WORKER + work, str(path), *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_processes_that_open_a_new_file_at_once_write_into_one_queue(tmp_path: Path) -> None:
    path = tmp_path / "insitu.db"
    work = """
import os
for i in range(25):
    store.add_feedback("messages", {"n": [os.getpid(), i]})
    store.add_feedback("messages", {"common": i})
print("done", flush=True)
"""
    processes = [start(path, work) for _ in range(3)]
    for process in processes:
        with process:
            assert go(process) == "done\n"
    store = Store(path)
    assert store.counts() == {"queued": 3 * 25 + 25}
    seqs = [row["seq"] for row in store._rows("SELECT seq FROM feedback ORDER BY seq")]
    assert seqs == list(range(1, 101))
    store.close()


def test_another_process_sees_what_was_committed_and_the_counter_tells(store: Store, tmp_path: Path) -> None:
    before = store.change_counter()
    assert store.change_counter() == before
    with start(
        tmp_path / "insitu.db", 'store.add_feedback("messages", {"a": 1}, "x"); print("done", flush=True)'
    ) as other:
        assert go(other) == "done\n"
        assert store.feedback("x") is not None
        assert store.change_counter() != before


@pytest.mark.parametrize("inside", [False, True], ids=["after reserve", "inside commit"])
def test_kill_9_between_reserve_and_commit_leaves_the_head(store: Store, tmp_path: Path, inside: bool) -> None:
    id = add(store, "one")
    work = """
version = store.reserve("teach", 0, feedback=[item.id for item in store.queued(1)])
if sys.argv[2] == "True":
    store._db.execute("BEGIN IMMEDIATE")
    store._db.execute("UPDATE versions SET status = 'committed', sha256 = 'x' WHERE id = ?", (version,))
print(version, flush=True)
sys.stdin.readline()
"""
    with start(tmp_path / "insitu.db", work, str(inside)) as learner:
        version = int(go(learner))
        os.kill(learner.pid, signal.SIGKILL)
    assert learner.returncode == -signal.SIGKILL
    found = store.version(version)
    assert store.head() == 0
    assert found is not None
    assert (found.status, found.sha256) == ("reserved", None)
    assert status(store, id) == "training"
    store.abandon(version, "lost", "the process died", {})
    assert status(store, id) == "queued"
    assert store.reserve("teach", 0, feedback=[id]) == version + 1
