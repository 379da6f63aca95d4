"""The state of the server, its versions, and the way back."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_fakes import KEYS, MODEL, World, chat_tokenizer, lesson, open_world

from insitu.live.records import VersionFile


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path, chat_tokenizer()) as made:
        yield made


def test_live_tells_what_is_served_and_what_is_waiting(world: World) -> None:
    world.engine.versions[-1] = "0+1"
    world.status = {"learner": {"state": "attached", "pid": 7}, "arena": {"bytes": 10, "odd": float("inf")}}
    world.client().post("/v1/feedback", json={"messages": lesson()})
    assert world.client(KEYS.api).get("/v1/live").json() == {
        "object": "live",
        "model": MODEL,
        "state": "serving",
        "weight_version": "0+1",
        "head": 0,
        "feedback": {"queued": 1},
        "counters": {"feedback.accepted": 1, "version.committed": 1, "version.reserved": 1},
        "intake": {"max_queue": 10_000, "feedback_per_minute": 3000, "queue_full": 0, "rate_limited": 0},
        "learner": {"state": "attached", "pid": 7},
        "arena": {"bytes": 10, "odd": None},
    }


def test_the_state_is_learning_paused_or_degraded(world: World) -> None:
    def state() -> str:
        found: str = world.client().get("/v1/live").json()["state"]
        return found

    world.status = {"trial": True}
    assert state() == "learning"
    world.status = {"trial": True, "paused": True}
    assert state() == "paused"
    world.status = {"learner": {"state": "ready", "problem": "no room"}}
    assert state() == "degraded"
    world.status = {"learner": {"state": "absent"}}
    assert state() == "degraded"
    world.status = {"state": "odd"}
    assert state() == "odd"
    world.status = {}
    assert state() == "serving"
    id = world.client().post("/v1/feedback", json={"messages": lesson()}).json()["id"]
    world.store.reserve("teach", 0, feedback=[id])
    assert state() == "learning"
    world.engine.dead = True
    assert state() == "degraded"


def test_health_is_public_and_says_when_nobody_can_be_answered(world: World) -> None:
    assert world.client(None).get("/health").json() == {"status": "ok"}
    world.engine.dead = True
    answer = world.client(None).get("/health")
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")


def test_versions_are_listed_newest_last(world: World) -> None:
    refused = world.store.reserve("teach", 0)
    world.store.abandon(refused, "refused", "drift", {"kl": float("nan")})
    listed = world.client(KEYS.api).get("/v1/live/versions").json()
    assert listed["object"] == "list"
    assert [v["id"] for v in listed["data"]] == [0, refused]
    assert set(listed["data"][1]) >= {"id", "kind", "status", "parent", "target", "created", "sha256", "report"}
    assert listed["data"][1]["report"] == {"kl": None, "reason": "drift"}


def do_rollbacks(world: World, stop: threading.Event, fail: str | None) -> None:
    """The learner's part."""
    while not stop.is_set():
        for request in world.store.open_rollbacks():
            world.store.update_rollback(request.id, "running")
            time.sleep(0.15)
            if fail is not None:
                world.store.update_rollback(request.id, "failed", reason=fail)
                continue
            version = world.store.reserve("rollback", world.store.head(), target=request.target)
            world.store.commit(version, "0" * 64, {})
            world.store.update_rollback(request.id, "done", version=version)
        time.sleep(0.02)


@pytest.fixture
def learner(world: World, request: pytest.FixtureRequest) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=do_rollbacks, args=(world, stop, getattr(request, "param", None)))
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("learner")
@pytest.mark.parametrize("body", [b"", b"{}"])
def test_a_rollback_waits_until_it_is_done(world: World, body: bytes) -> None:
    world.store.commit(world.store.reserve("teach", 0), "1" * 64, {})
    answer = world.client().post("/v1/live/versions/0/rollback", content=body)
    assert answer.status_code == 200
    expected = {"object": "rollback", "id": 1, "status": "done", "target": 0, "version": 2, "reason": None}
    assert answer.json() == expected
    assert world.client().get("/v1/live/rollbacks/1").json() == expected
    assert world.store.head() == 2


@pytest.mark.usefixtures("learner")
@pytest.mark.parametrize("learner", ["the file of version 0 is gone"], indirect=True)
def test_a_rollback_that_fails_says_why_and_is_not_repeated(world: World) -> None:
    answer = world.client().post("/v1/live/versions/0/rollback")
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == "the file of version 0 is gone"
    assert answer.headers["x-should-retry"] == "false"


def test_a_rollback_that_nobody_does_stays_queued_once(world: World) -> None:
    for _ in range(2):  # a client that gave up waiting and asks again
        answer = world.client().post("/v1/live/versions/0/rollback?timeout=0.2")
        assert (answer.status_code, answer.json()["status"], answer.json()["id"]) == (202, "queued", 1)
    assert len(world.store.open_rollbacks()) == 1


def test_only_committed_versions_can_be_rolled_back_to(world: World) -> None:
    lost = world.store.reserve("teach", 0)
    world.store.abandon(lost, "lost", "killed", {})
    for id in (str(lost), "99", "-1", "x", "1" * 30, "٣"):
        answer = world.client().post(f"/v1/live/versions/{id}/rollback")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "version_not_found"), id
    assert world.store.open_rollbacks() == []
    assert world.client().get("/v1/live/rollbacks/1").status_code == 404


def test_a_version_can_be_pinned_and_let_go(world: World) -> None:
    version = world.store.reserve("teach", 0)
    world.store.commit(version, "1" * 64, {}, VersionFile("v1.difference", 1234, "2" * 64, 0.01))
    for verb, pinned in (("pin", True), ("pin", True), ("unpin", False)):
        answer = world.client().post(f"/v1/live/versions/{version}/{verb}")
        assert (answer.status_code, answer.json()["pinned"], answer.json()["bytes"]) == (200, pinned, 1234)
        assert world.client().get("/v1/live/versions").json()["data"][-1]["pinned"] is pinned
    assert world.client().post(f"/v1/live/versions/{version}/pin", json={"days": 3}).status_code == 400
    assert world.client().get("/v1/live/versions").json()["data"][-1]["pinned"] is False
    assert world.client(KEYS.api).post(f"/v1/live/versions/{version}/pin").status_code == 403
    assert world.client().post("/v1/live/versions/7/pin").status_code == 404


@pytest.mark.parametrize("verb", ["pin", "unpin", "rollback"])
def test_what_was_pruned_cannot_be_pinned_or_served(world: World, verb: str) -> None:
    version = world.store.reserve("teach", 0)
    world.store.commit(version, "1" * 64, {})
    assert world.store.prune([version], [])
    answer = world.client().post(f"/v1/live/versions/{version}/{verb}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "version_pruned")
    assert world.store.open_rollbacks() == []


def test_models_are_listed_and_retrieved_by_their_slashed_id(world: World) -> None:
    (model,) = world.client(KEYS.api).get("/v1/models").json()["data"]
    assert model["id"] == MODEL
    assert world.client(KEYS.api).get(f"/v1/models/{MODEL}").json() == model
    assert world.client(KEYS.api).get("/v1/models/other").json()["error"]["code"] == "model_not_found"
