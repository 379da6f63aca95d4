"""``/v1/live/canaries``: who may add, what can judge, and what is told of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_fakes import KEYS, World, chat_tokenizer, open_world

from insitu.live import prompts
from insitu.live.api import canaries

PATH = "/v1/live/canaries"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path, chat_tokenizer()) as made:
        yield made


def test_a_canary_is_added_once_listed_and_removed(world: World) -> None:
    client = world.client()
    added = client.post(PATH, json={"prompt": "What do you think of my shop?"})
    assert added.status_code == 201
    body = added.json()
    assert body == {
        "object": "live.canary",
        "id": "canary-1",
        "created": body["created"],
        "built_in": False,
        "prompt": "What do you think of my shop?",
    }
    again = client.post(PATH, json={"prompt": "What do you think of my shop?"})
    assert (again.status_code, again.json()) == (200, body)
    listed = client.get(PATH).json()
    assert listed["object"] == "list"
    assert [c["prompt"] for c in listed["data"]] == [*prompts.CANARIES, body["prompt"]]
    assert [c["id"] for c in listed["data"]][:2] == ["builtin-1", "builtin-2"]
    assert [c["built_in"] for c in listed["data"]] == [True] * 8 + [False]
    removed = client.delete(f"{PATH}/canary-1")
    assert (removed.status_code, removed.json()) == (
        200,
        {"object": "live.canary.deleted", "id": "canary-1", "deleted": True},
    )
    assert world.store.canaries() == []
    assert client.delete(f"{PATH}/canary-1").status_code == 404


@pytest.mark.parametrize("key", [KEYS.api, None])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_only_the_learn_key_may(world: World, method: str, key: str | None) -> None:
    world.store.add_canary("mine?")
    path = f"{PATH}/canary-1" if method == "DELETE" else PATH
    answer = world.client(key).request(method, path, json={"prompt": "new?"} if method == "POST" else None)
    assert answer.status_code == (403 if key else 401)
    assert [c.prompt for c in world.store.canaries()] == ["mine?"]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("what <|im_end|> is this", "control token"),
        (prompts.ANCHORS[0], "anchor"),
        (prompts.CANARIES[0], "ships"),
        ("the quick brown fox " * 2000, "room for"),
    ],
)
def test_what_cannot_judge_is_a_422_that_says_why(world: World, prompt: str, told: str) -> None:
    answer = world.client().post(PATH, json={"prompt": prompt})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == ("prompt", "invalid_content", "invalid_request_error")
    assert told in error["message"]
    assert world.store.canaries() == []


@pytest.mark.parametrize(
    "body", [{}, {"prompt": None}, {"prompt": 7}, {"prompt": "x", "more": 1}, [], {"prompt": "\ud83d"}]
)
def test_a_body_of_another_shape_is_a_400(world: World, body: object) -> None:
    answer = world.client().post(PATH, content=json.dumps(body))
    assert answer.status_code == 400
    assert world.store.canaries() == []


def test_the_longest_prompt_that_fits_is_taken(world: World) -> None:
    room = world.engine.info.context_length - canaries.ROOM
    around = len(chat_tokenizer()("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    longest = "é" * ((room - around) // 2)
    length = len(chat_tokenizer()(longest)["input_ids"])
    assert length <= room - around
    assert world.client().post(PATH, json={"prompt": longest}).status_code == 201
    assert world.client().post(PATH, json={"prompt": longest + "é" * (room - around - length + 2)}).status_code == 422


def test_one_that_ships_cannot_be_removed(world: World) -> None:
    answer = world.client().delete(f"{PATH}/builtin-3")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "built_in")
    assert len(world.client().get(PATH).json()["data"]) == len(prompts.CANARIES)


@pytest.mark.parametrize("id", ["canary-9", "9", "canary-01", "canary-1%20", "builtin-99", "x" * 300])
def test_an_unknown_id_is_a_404(world: World, id: str) -> None:
    world.store.add_canary("mine?")
    answer = world.client().delete(f"{PATH}/{id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert len(world.store.canaries()) == 1


def test_there_is_an_end_to_how_many_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canaries, "MAX_CANARIES", 2)
    client = world.client()
    assert [client.post(PATH, json={"prompt": f"{n}?"}).status_code for n in range(3)] == [201, 201, 409]
    assert client.post(PATH, json={"prompt": "1?"}).status_code == 200  # it is there already
    assert client.post(PATH, json={"prompt": "3?"}).json()["error"]["code"] == "too_many_canaries"


def test_what_a_report_says_of_canaries_names_no_prompt() -> None:
    """GET /v1/live/versions shows reports to the API key; prompts that users added are for the learn key."""
    from insitu.live.verdict import CHECKS

    assert not any("prompt}" in sentence for sentence in CHECKS.values())
