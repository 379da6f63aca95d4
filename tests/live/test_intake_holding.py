"""Feedback can be held back, let go on, and withdrawn, until a job has it; what was decided is kept and counted."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm_fakes
from api_fakes import KEYS, World, chat_tokenizer, lesson, open_world

from insitu.live.records import Feedback, NotQueuedError, WrongStatusError
from insitu.live.store import Store


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path, chat_tokenizer()) as made:
        yield made


@pytest.fixture
def store(world: World) -> Store:
    return world.store


def add(store: Store, word: str, **options: Any) -> str:
    return store.add_feedback("messages", {"messages": [{"role": "user", "content": word}]}, **options)[0].id


def status(item: Feedback | None) -> str:
    assert item is not None
    return item.status


def test_a_held_item_waits_while_others_pass_and_comes_back_to_its_place(store: Store) -> None:
    first, second, third = (add(store, word) for word in ("one", "two", "three"))
    assert status(store.hold(first)) == status(store.hold(first)) == "held"
    assert [item.id for item in store.queued(9)] == [second, third]
    assert status(store.release(first)) == status(store.release(first)) == "queued"
    assert [item.id for item in store.queued(9)] == [first, second, third]
    assert store.counters()["feedback.held"] == store.counters()["feedback.released"] == 1  # the repeats did nothing


def test_held_from_the_start_is_the_same_content_as_queued(store: Store) -> None:
    id = add(store, "one", hold=True)
    assert status(store.feedback(id)) == "held"
    assert store.queued(9) == []
    assert add(store, "one") == id
    assert status(store.feedback(id)) == "held"  # a repeat does not let it go
    store.release(id)
    assert add(store, "one", hold=True) == id
    assert status(store.feedback(id)) == "queued"
    assert store.events(after=0)[-2].kind == "feedback.accepted"
    assert store.events(after=0)[-2].detail == {"held": True}


@pytest.mark.parametrize("hold", [False, True])
def test_what_is_withdrawn_is_never_learned_and_may_be_posted_again(store: Store, hold: bool) -> None:
    id = add(store, "one", id="x", hold=hold)
    assert status(store.withdraw(id)) == status(store.withdraw(id)) == "withdrawn"
    assert store.queued(9) == []
    for move in (store.hold, store.release):
        with pytest.raises(WrongStatusError, match="withdrawn: post it again, under another id"):
            move(id)
    assert add(store, "one", id="x") == id  # the id goes on naming what it named
    assert add(store, "one") != id
    assert len(store.queued(9)) == 1


def test_what_a_job_has_can_neither_be_held_nor_withdrawn(store: Store) -> None:
    id = add(store, "one")
    version = store.reserve("teach", 0, feedback=[id])
    for move in (store.hold, store.withdraw):
        with pytest.raises(WrongStatusError, match="is training: wait until its job ends"):
            move(id)
    assert status(store.release(id)) == "training"  # a release that is repeated after its answer was lost
    store.commit(version, "1" * 64, {})
    for move in (store.hold, store.withdraw):
        with pytest.raises(WrongStatusError, match="is applied: roll back to a version before it"):
            move(id)
    undone = store.reserve("rollback", version, target=0)
    store.commit(undone, "0" * 64, {})
    with pytest.raises(WrongStatusError, match="rolled_back"):
        store.withdraw(id)
    assert store.hold("unknown") is None


def test_a_job_gets_all_it_asked_for_or_does_not_begin(store: Store) -> None:
    first, second = add(store, "one"), add(store, "two")
    wanted = [item.id for item in store.queued(9)]
    store.hold(second)
    with pytest.raises(NotQueuedError, match=second):
        store.reserve("teach", 0, feedback=wanted)
    assert status(store.feedback(first)) == "queued"
    assert [v.id for v in store.versions()] == [0]
    assert "version.reserved" not in {event.kind for event in store.events(after=0)[2:]}


def test_an_item_that_turns_out_impossible_is_not_refused_once_it_is_withdrawn(store: Store) -> None:
    id = add(store, "one")
    store.withdraw(id)
    store.refuse(id, "it cannot be encoded")
    assert status(store.feedback(id)) == "withdrawn"


def test_withdrawing_and_taking_up_at_once_has_one_winner(store: Store) -> None:
    """Whichever came first, the item is either in the job or withdrawn, never both."""
    for i in range(30):
        id = add(store, f"word {i}")
        outcome: list[str] = []

        def withdraw(id: str = id, outcome: list[str] = outcome) -> None:
            try:
                store.withdraw(id)
                outcome.append("withdrawn")
            except WrongStatusError:
                outcome.append("too late")

        thread = threading.Thread(target=withdraw)
        thread.start()
        try:
            store.abandon(store.reserve("teach", 0, feedback=[id]), "refused", "odd", {})
            taken = True
        except NotQueuedError:
            taken = False
        thread.join()
        assert (taken, outcome, status(store.feedback(id))) in (
            (True, ["too late"], "refused"),
            (False, ["withdrawn"], "withdrawn"),
        )


# -- the routes --------------------------------------------------------------------------------------------------------
def test_hold_review_release_and_withdraw_over_http(world: World) -> None:
    http = world.client()
    posted = http.post("/v1/feedback", json={"messages": lesson(), "hold": True})
    item = posted.json()
    assert (posted.status_code, item["status"]) == (202, "held")
    path = f"/v1/feedback/{item['id']}"
    assert http.get(f"{path}?content=true").json() == {**item, "content": {"messages": lesson()}}
    assert http.post(f"{path}/release", content=b"").json()["status"] == "queued"
    assert http.post(f"{path}/hold", json={}).json()["status"] == "held"
    assert http.delete(path).json()["status"] == "withdrawn"
    late = http.post(f"{path}/release")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "wrong_status")
    assert "withdrawn" in late.json()["error"]["message"]
    assert late.headers["x-should-retry"] == "false"


def test_unknown_ids_and_wrong_bodies_are_named(world: World) -> None:
    http = world.client()
    answers = [http.post("/v1/feedback/no/hold"), http.post("/v1/feedback/no/release"), http.delete("/v1/feedback/no")]
    assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [(404, "not_found")] * 3
    assert http.post("/v1/feedback/no/hold", json={"why": 1}).json()["error"]["code"] == "unknown_parameter"
    for query, param in (
        ("status=odd", "status"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("after=no", "after"),
    ):
        answer = http.get(f"/v1/feedback?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (404 if param == "after" else 400, param)


def test_the_list_is_paged_in_order_of_arrival(world: World) -> None:
    http = world.client()
    ids = [http.post("/v1/feedback", json={"messages": lesson(str(i))}).json()["id"] for i in range(5)]
    world.store.hold(ids[1])
    world.store.hold(ids[3])
    first = http.get("/v1/feedback?limit=2").json()
    assert [item["id"] for item in first["data"]] == ids[:2]
    assert (first["object"], first["first_id"], first["last_id"], first["has_more"]) == ("list", ids[0], ids[1], True)
    rest = http.get(f"/v1/feedback?limit=3&after={first['last_id']}").json()
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (ids[2:], False)
    held = http.get("/v1/feedback?status=held").json()
    assert [item["id"] for item in held["data"]] == [ids[1], ids[3]]
    empty = http.get("/v1/feedback?status=applied").json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_the_same_routes_are_under_vllm(tmp_path: Path) -> None:
    under = vllm_fakes.World(tmp_path)
    http = under.http()
    id = http.post("/v1/feedback", json={"messages": lesson(), "hold": True}).json()["id"]
    assert http.get("/v1/feedback?status=held").json()["data"][0]["id"] == id
    assert http.post(f"/v1/feedback/{id}/release").json()["status"] == "queued"
    assert http.delete(f"/v1/feedback/{id}").json()["status"] == "withdrawn"
    under.store.close()


def test_all_of_it_needs_the_learn_key(world: World) -> None:
    id = world.client().post("/v1/feedback", json={"messages": lesson()}).json()["id"]
    http = world.client(KEYS.api)
    answers = [
        http.get("/v1/feedback"),
        http.get(f"/v1/feedback/{id}?content=true"),
        http.post(f"/v1/feedback/{id}/hold"),
        http.post(f"/v1/feedback/{id}/release"),
        http.delete(f"/v1/feedback/{id}"),
    ]
    assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [(403, "learn_key_required")] * 5
    assert status(world.store.feedback(id)) == "queued"
