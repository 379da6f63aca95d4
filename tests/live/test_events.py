"""Every accepted, refused, rolled back, repaired or lost thing is an event with its reason, and is counted for ever."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import KEYS, World, chat_tokenizer, lesson, open_world

from insitu.live import events
from insitu.live.events import figures, note
from insitu.live.records import Event
from insitu.live.store import Store


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path, chat_tokenizer()) as made:
        yield made


@pytest.fixture
def store(world: World) -> Store:
    return world.store


def add(store: Store, word: str) -> str:
    return store.add_feedback("messages", {"messages": [{"role": "user", "content": word}]}, word)[0].id


def teach(store: Store, *ids: str) -> int:
    version = store.reserve("teach", store.head(), feedback=list(ids))
    store.commit(version, f"{version:064}", {})
    return version


def told(store: Store, after: int) -> list[tuple[str, str]]:
    return [(event.kind, event.subject) for event in store.events(after)]


def last(store: Store) -> int:
    return store.events()[-1].id


REPORT: dict[str, Any] = {
    "examples": 2,
    "seconds": 3.5,
    "gap": 0.01,
    "canary_kl": 0.2,
    "update_norm_ratio": 0.004,
    "steps": [{"loss": 1.0, "stall": {"total": t, "write": t / 2}} for t in (0.1, 0.4, 0.2)] + [{"loss": 0.01}],
}


def test_a_job_is_told_from_its_posts_to_its_commit_with_its_figures(store: Store) -> None:
    start = last(store)
    add(store, "a"), add(store, "b"), add(store, "a")
    version = store.reserve("teach", 0, feedback=["a", "b"])
    store.commit(version, "1" * 64, REPORT)
    assert told(store, start) == [
        ("feedback.accepted", "a"),
        ("feedback.accepted", "b"),
        ("version.reserved", "version 1"),
        ("version.committed", "version 1"),
        ("feedback.applied", "a"),
        ("feedback.applied", "b"),
    ]
    reserved, committed = store.events(start)[2:4]
    assert reserved.detail == {"kind": "teach", "parent": 0, "feedback": ["a", "b"]}
    assert committed.detail == {
        "kind": "teach",
        "examples": 2,
        "seconds": 3.5,
        "gap": 0.01,
        "canary_kl": 0.2,
        "update_norm_ratio": 0.004,
        "steps": 4,
        "stall": {"max": 0.4, "median": 0.2},
    }
    assert store.counters()["feedback.duplicate"] == 1


def test_a_report_without_figures_has_none() -> None:
    assert figures({}) == {}
    assert figures({"steps": [], "verdict": "ok"}) == {"verdict": "ok", "steps": 0}


def test_what_is_refused_or_lost_says_why(store: Store) -> None:
    start = last(store)
    add(store, "a"), add(store, "b")
    store.abandon(store.reserve("teach", 0, feedback=["a"]), "refused", "the canaries changed", {"canary_kl": 9.0})
    for _ in range(3):
        store.abandon(store.reserve("teach", 0, feedback=["b"]), "lost", "the process died", {})
    found = [(e.kind, e.subject, e.detail.get("reason")) for e in store.events(start) if e.kind != "version.reserved"]
    assert found[2:] == [
        ("version.refused", "version 1", "the canaries changed"),
        ("feedback.refused", "a", "the canaries changed"),
        ("version.lost", "version 2", "the process died"),
        ("feedback.requeued", "b", "version 2 was lost"),
        ("version.lost", "version 3", "the process died"),
        ("feedback.requeued", "b", "version 3 was lost"),
        ("version.lost", "version 4", "the process died"),
        ("feedback.refused", "b", "the learner died three times while training this"),
    ]


def test_a_rollback_tells_what_it_took_back_and_what_it_brought_again(store: Store) -> None:
    for name in "abc":
        teach(store, add(store, name))
    start = last(store)
    store.commit(store.reserve("rollback", 3, target=1), "1" * 64, {"seconds": 0.1})
    assert told(store, start) == [
        ("version.reserved", "version 4"),
        ("version.committed", "version 4"),
        ("version.rolled_back", "version 2"),
        ("version.rolled_back", "version 3"),
        ("feedback.rolled_back", "b"),
        ("feedback.rolled_back", "c"),
    ]
    assert {e.detail["reason"] for e in store.events(start)[2:4]} == {"version 4 repeats version 1"}
    start = last(store)
    store.commit(store.reserve("rollback", 4, target=2), "2" * 64, {})
    assert told(store, start)[2:] == [("version.restored", "version 2"), ("feedback.applied", "b")]
    counters = store.counters()
    assert (counters["version.rolled_back"], counters["feedback.applied"]) == (2, 4)


def test_an_event_is_there_exactly_if_what_it_tells_of_is(store: Store) -> None:
    start, counters = last(store), store.counters()
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")

    def fill() -> None:
        for i in range(1000):
            add(store, f"{i} " + "x" * 500)

    with pytest.raises(sqlite3.OperationalError, match="full"):
        fill()
    accepted = store.counts().get("queued", 0)
    assert len(told(store, start)) == accepted
    assert store.counters().get("feedback.accepted", 0) - counters.get("feedback.accepted", 0) == accepted


def test_what_has_happened_anyway_is_logged_when_it_cannot_be_stored(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    note(store, "learner.died", "learner", found="1+2")
    assert store.events()[-1].detail == {"found": "1+2"}
    store.close()
    note(store, "learner.died", "learner")
    assert "learner.died of learner could not be stored" in caplog.text


def test_the_oldest_are_dropped_and_counted_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP", 10)
    for i in range(25):
        add(store, f"{i}")
    found = store.events(after=0, limit=1000)
    assert [e.subject for e in found] == [str(i) for i in range(15, 25)]
    assert store.counters()["feedback.accepted"] == 25
    before = last(store)
    store._db.execute("DELETE FROM events")
    add(store, "more")
    assert last(store) == before + 1  # an id is never used twice, so whoever follows misses nothing


# -- the route ---------------------------------------------------------------------------------------------------------
def test_events_can_be_followed_with_either_key(world: World) -> None:
    for i in range(5):
        add(world.store, f"w{i}")
    http = world.client(KEYS.api)
    newest = http.get("/v1/live/events?limit=2").json()
    assert [e["subject"] for e in newest["data"]] == ["w3", "w4"]
    assert (newest["object"], newest["has_more"], newest["last_id"]) == ("list", True, last(world.store))
    first = http.get("/v1/live/events?after=0&limit=4").json()
    assert [e["id"] for e in first["data"]] == [1, 2, 3, 4]
    assert first["has_more"]
    rest = http.get(f"/v1/live/events?after={first['last_id']}").json()
    assert ([e["id"] for e in rest["data"]], rest["has_more"]) == ([5, 6, 7], False)
    assert http.get(f"/v1/live/events?after={rest['last_id']}").json()["data"] == []
    assert set(rest["data"][0]) == {"object", "id", "created", "kind", "subject", "detail"}
    assert http.get("/v1/live/events?after=x").status_code == 400
    assert world.client(None).get("/v1/live/events").status_code == 401


def test_a_figure_that_is_not_finite_is_null(world: World) -> None:
    world.store.abandon(world.store.reserve("teach", 0), "refused", "odd", {"canary_kl": float("nan")})
    assert world.client().get("/v1/live/events?limit=1").json()["data"][0]["detail"]["canary_kl"] is None


def test_neither_keys_nor_what_was_taught_is_in_any_event_or_log(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    secret = "xyzzy plugh"
    http = world.client()
    asked = http.post("/v1/chat/completions", json={"model": "org/tiny", "messages": lesson(secret)[:1]}).json()
    http.post("/v1/feedback", json={"completion_id": asked["id"], "correction": secret})
    ids = [http.post("/v1/feedback", json={"messages": lesson(secret, str(i))}).json()["id"] for i in range(4)]
    http.post("/v1/feedback", json={"messages": [{"role": secret, "content": secret}]})
    http.delete(f"/v1/feedback/{ids[0]}")
    store = world.store
    store.refuse(ids[1], f"this quotes {secret}")
    store.abandon(store.reserve("teach", 0, feedback=[ids[2]]), "refused", "drift", {})
    store.commit(store.reserve("teach", 0, feedback=[ids[3]]), "1" * 64, {})
    for key in ("wrong", KEYS.learn + "x"):
        assert world.client(key).get("/v1/live").status_code == 401
    found: list[Event] = store.events(after=0, limit=1000)
    assert len(found) > 10
    everything = json.dumps([[e.kind, e.subject, e.detail] for e in found])
    logged = caplog.text + "".join(str(record.args) for record in caplog.records)
    raw = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret.split()[0].encode() in raw  # what was taught is in the store, once
    for key in (KEYS.api, KEYS.learn):
        assert key.encode() not in raw
        assert key not in logged
    for word in secret.split():
        assert word not in everything
        assert word not in logged
