"""Feedback: three ways to say it, checked in full when posted, queued once however often it is posted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import KEYS, World, chat, chat_tokenizer, lesson, open_world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path, chat_tokenizer()) as made:
        yield made


def post(world: World, **body: Any) -> Any:
    return world.client().post("/v1/feedback", json=body)


def answered(world: World, key: str = KEYS.learn, **body: Any) -> str:
    id: str = world.client(key).post("/v1/chat/completions", json=chat(**body)).json()["id"]
    return id


def test_messages_are_queued_and_can_be_looked_up(world: World) -> None:
    answer = post(world, messages=lesson())
    item = answer.json()
    assert answer.status_code == 202
    assert {k: item[k] for k in ("object", "kind", "status", "reason", "weight_version")} == {
        "object": "feedback",
        "kind": "messages",
        "status": "queued",
        "reason": None,
        "weight_version": None,
    }
    assert world.client().get(f"/v1/feedback/{item['id']}").json() == item
    (queued,) = world.store.queued(9)
    assert (queued.id, queued.payload) == (item["id"], {"messages": lesson()})


def test_the_version_that_took_it_up_is_told(world: World) -> None:
    id = post(world, messages=lesson()).json()["id"]
    version = world.store.reserve("teach", 0, feedback=[id])
    world.store.commit(version, "1" * 64, {})
    item = world.client().get(f"/v1/feedback/{id}").json()
    assert (item["status"], item["weight_version"]) == ("applied", str(version))


def test_the_same_post_again_is_the_same_item(world: World) -> None:
    first = post(world, messages=lesson())
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, {**lesson()[1], "weight": 1}]
    again = post(world, messages=parts)  # spelled otherwise, but the same
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json() == first.json()
    assert len(world.store.queued(9)) == 1


def test_an_id_names_one_content_for_ever(world: World) -> None:
    first = post(world, id="lesson:1", messages=lesson())
    again = post(world, id="lesson:1", messages=lesson())
    other = post(world, id="lesson:1", messages=lesson(answer="hello"))
    assert (first.status_code, again.status_code, other.status_code) == (202, 200, 409)
    assert first.json()["id"] == "lesson:1"
    assert other.json()["error"]["param"] == "id"
    assert other.headers["x-should-retry"] == "false"
    assert len(world.store.queued(9)) == 1


def test_weights_are_kept_in_one_spelling(world: World) -> None:
    turns = [*lesson(), {"role": "user", "content": "world"}, {"role": "assistant", "content": "fox"}]
    for key, off in (("weight", 0), ("train", False), ("trainable", 0), ("loss_mask", 0)):
        answer = post(world, messages=[turns[0], {**turns[1], key: off}, *turns[2:]])
        assert answer.status_code in (200, 202), answer.text
    (queued,) = world.store.queued(9)
    assert queued.payload["messages"] == [turns[0], {**turns[1], "weight": 0}, *turns[2:]]


@pytest.mark.parametrize("form", ["text", "message"])
def test_a_correction_teaches_only_the_corrected_turn(world: World, form: str) -> None:
    history = [*lesson("one", "fox"), {"role": "user", "content": "two"}]
    made = world.client().post("/v1/chat/completions", json={**chat(), "messages": history}).json()
    right: Any = "the dog" if form == "text" else {"role": "assistant", "content": "the dog"}
    answer = post(world, completion_id=made["id"], correction=right)
    assert answer.status_code == 202, answer.text
    assert answer.json()["kind"] == "messages"
    (queued,) = world.store.queued(9)
    assert queued.payload["messages"] == [
        history[0],
        {**history[1], "weight": 0},
        history[2],
        {"role": "assistant", "content": "the dog"},
    ]


def test_anothers_completion_is_as_unknown_as_none(world: World) -> None:
    foreign = answered(world, KEYS.api)
    answers = [post(world, completion_id=id, correction="x") for id in (foreign, "chatcmpl-" + "0" * 32)]
    assert [a.status_code for a in answers] == [404, 404]
    first, second = (a.json()["error"] for a in answers)
    assert first["message"].replace(foreign, "ID") == second["message"].replace("chatcmpl-" + "0" * 32, "ID")
    assert (first["code"], first["param"]) == (second["code"], second["param"]) == ("not_found", "completion_id")


def test_a_correction_that_cannot_be_learned_is_named_as_such(world: World) -> None:
    answer = post(world, completion_id=answered(world), correction="<|im_end|>")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "correction")


def test_raw_token_ids_are_queued(world: World) -> None:
    answer = post(world, context_ids=[1, 2, 3], continuation_ids=[4, 5], freeze_context=True)
    assert (answer.status_code, answer.json()["kind"]) == (202, "continuation")
    (queued,) = world.store.queued(9)
    assert queued.payload == {"context_ids": [1, 2, 3], "continuation_ids": [4, 5], "freeze_context": True}


def test_what_was_refused_or_rolled_back_may_be_taught_again(world: World) -> None:
    id = post(world, messages=lesson()).json()["id"]
    world.store.refuse(id, "too odd")
    again = post(world, messages=lesson())
    assert again.status_code == 202
    assert again.json()["id"] != id


def test_a_full_disk_is_a_507_and_nothing_is_half_done(world: World) -> None:
    pages = world.store._db.execute("PRAGMA page_count").fetchone()[0]
    world.store._db.execute(f"PRAGMA max_page_count={pages}")
    bodies = [post(world, messages=lesson(f"{i} " + "hello world " * 50)) for i in range(40)]
    assert bodies[-1].status_code == 507
    assert bodies[-1].json()["error"]["code"] == "disk_full"
    known = len(world.store.queued(99))
    world.store._db.execute("PRAGMA max_page_count=100000")
    assert post(world, messages=lesson()).status_code == 202
    assert len(world.store.queued(99)) == known + 1
