"""Which weights wrote an answer, told on vLLM's own responses."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State
from starlette.types import Message, Receive, Scope, Send
from vllm_fakes import ID, ChatServing, FakeClient, World, ask, choice, events_of, output

from insitu.live.vllm_plugin.answers import ROUTES, Answers, note_spans

CHAT = "/v1/chat/completions"
TOLD = {
    "weight_versions": ["7", "7+1"],
    "weight_version_spans": [
        {"index": 0, "version": "7", "start": 0, "end": 2},
        {"index": 0, "version": "7+1", "start": 2, "end": 5},
    ],
}
SCRIPT = [
    output(choice(text="an ")),
    output(choice(text="ötter")),
    output(choice(text="!", spans=[("7", 0, 2), ("7+1", 2, 5)])),
]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.client.script = SCRIPT
    yield world
    world.store.close()


# -- plain answers -----------------------------------------------------------------------------------------------------
def test_a_plain_answer_names_the_versions_in_its_header_and_its_spans_in_its_body(world: World) -> None:
    answer = world.http().post(CHAT, json=ask())
    assert answer.status_code == 200
    assert answer.headers["x-weight-version"] == "7,7+1"
    content = {"role": "assistant", "content": "an ötter!"}
    assert answer.json() == {
        "id": ID,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": content}],
        **TOLD,
    }
    assert answer.headers.get_list("content-length") == [str(len(answer.content))]
    assert "ö".encode() in answer.content  # not spelled out as \\u00f6
    assert answer.headers["content-type"] == "application/json"


def test_versions_are_told_once_each_in_the_order_in_which_they_came(world: World) -> None:
    spans = [("9", 0, 1), ("9+1", 1, 2), ("9+2", 2, 3), ("9", 3, 4), ("10", 4, 9)]
    world.client.script = [output(choice(text="x", spans=spans))]
    answer = world.http().post(CHAT, json=ask())
    assert answer.headers["x-weight-version"] == "9,9+1,9+2,10"
    assert answer.json()["weight_versions"] == ["9", "9+1", "9+2", "10"]
    assert [(s["version"], s["start"], s["end"]) for s in answer.json()["weight_version_spans"]] == spans


def test_the_spans_of_several_choices_are_told_apart(world: World) -> None:
    first = [choice(index, text=str(index), spans=[("7", 0, 1)]) for index in (0, 2)]
    world.client.script = [output(*first, choice(1, text="1", spans=[("7", 0, 1), ("8", 1, 4)]))]
    told = world.http().post(CHAT, json=ask(n=3)).json()
    assert [c["message"]["content"] for c in told["choices"]] == ["0", "1", "2"]
    assert told["weight_versions"] == ["7", "8"]
    assert [(s["index"], s["version"]) for s in told["weight_version_spans"]] == [
        (0, "7"),
        (2, "7"),
        (1, "7"),
        (1, "8"),
    ]


@pytest.mark.parametrize("spans", [None, []])
def test_an_answer_of_which_nothing_is_known_has_the_servers_version_and_is_not_touched(
    world: World, spans: Any
) -> None:
    world.client.script = [output(choice(text="x", spans=spans))]
    answer = world.http().post(CHAT, json=ask())
    assert answer.headers["x-weight-version"] == "7"
    assert set(answer.json()) == {"id", "object", "choices"}
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_an_error_is_passed_on_byte_for_byte(world: World) -> None:
    answer = world.http().post(CHAT, json=ask(n=0))
    assert answer.status_code == 400
    assert answer.content == b'{"error":{"message":"n must be at least 1","code":400}}'
    assert "x-weight-version" not in answer.headers
    assert int(answer.headers["content-length"]) == len(answer.content)


# -- streams -----------------------------------------------------------------------------------------------------------
def test_a_stream_names_its_version_at_once_and_its_spans_on_the_last_events(world: World) -> None:
    answer = world.http().post(CHAT, json=ask(stream=True))
    assert answer.headers["x-weight-version"] == "7"  # what was served when it began
    assert "content-length" not in answer.headers
    events = events_of(answer.text)
    plain = {"id": ID, "object": "chat.completion.chunk"}

    def piece(text: str, reason: str | None = None) -> dict[str, Any]:
        return {**plain, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}

    assert events == [
        {**plain, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        piece("an "),
        piece("ötter"),
        {**piece("!", "stop"), **TOLD},
        {**plain, "choices": [], "usage": {"completion_tokens": 3}, **TOLD},
        "[DONE]",
    ]
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")


def test_in_a_stream_of_several_choices_the_last_event_has_the_spans_of_all(world: World) -> None:
    world.client.script = [
        output(choice(1, text="b", spans=[("7", 0, 1)])),
        output(choice(0, text="a")),
        output(choice(0, text="a", spans=[("7", 0, 1), ("8", 1, 2)])),
    ]
    *_, last, done = events_of(world.http().post(CHAT, json=ask(stream=True, n=2)).text)
    assert done == "[DONE]"
    assert last["weight_versions"] == ["7", "8"]
    assert [s["index"] for s in last["weight_version_spans"]] == [1, 0, 0]


def test_events_without_versions_pass_byte_for_byte(world: World) -> None:
    async def dies(prompt: str, i: int) -> None:
        if i == 2:
            raise RuntimeError("the engine died")

    world.client.before = dies
    answer = world.http().post(CHAT, json=ask(stream=True))
    assert answer.status_code == 200
    assert events_of(answer.text)[-2:] == [{"error": {"message": "the engine died", "code": 500}}, "[DONE]"]
    assert "weight_versions" not in answer.text
    assert answer.text.endswith('\n\ndata: {"error": {"message": "the engine died", "code": 500}}\n\ndata: [DONE]\n\n')


def test_what_is_no_event_with_an_object_is_not_touched() -> None:
    """[DONE], the events of /v1/responses (which begin with their name), comments, and nothing at all."""
    pieces = [b"data: [DONE]\n\n", b'event: x\ndata: {"choices": []}\n\n', b": ping\n\n", b"data: 5\n\n", b""]
    sent = asyncio.run(answered(stream_of(pieces)))
    assert sent[0]["headers"] == [(b"content-type", b"text/event-stream"), (b"x-weight-version", b"7")]
    assert [message["body"] for message in sent[1:]] == [*pieces, b""]
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * 5 + [False]


# -- any application inside --------------------------------------------------------------------------------------------
def stream_of(pieces: list[bytes]) -> Callable[[Scope, Receive, Send], Any]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})  # as the standard allows

    return app


async def answered(app: Any, path: str = CHAT, **changes: Any) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}"}

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], **changes}
    await Answers(app, service=None, version=lambda: "7")(scope, receive, send)  # type: ignore[arg-type]
    return sent


def test_an_answer_in_pieces_keeps_its_bytes_and_its_length() -> None:
    whole = json.dumps({"id": "x", "choices": []}).encode()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(whole)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i in range(len(whole)):
            await send({"type": "http.response.body", "body": whole[i : i + 1], "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    start, *pieces = asyncio.run(answered(app))
    assert b"".join(message["body"] for message in pieces) == whole
    assert dict(start["headers"])[b"content-length"] == str(len(whole)).encode()


@pytest.mark.parametrize("status", [199, 201, 204, 400, 500, 503])
def test_a_response_of_any_other_status_is_passed_on_as_it_is(status: int) -> None:
    start = {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]}
    body = {"type": "http.response.body", "body": b"{}"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(dict(start))
        await send(dict(body))

    assert asyncio.run(answered(app)) == [start, body]


@pytest.mark.parametrize(
    ("path", "changes", "named"),
    [
        *((path, {}, True) for path in ROUTES),
        (CHAT, {"method": "GET"}, False),
        ("/v1/embeddings", {}, False),
        ("/v1/live", {}, False),
        ("/v1/chat/completions/", {}, False),
        (CHAT, {"type": "websocket"}, False),
    ],
)
def test_only_the_routes_that_generate_are_named(path: str, changes: dict[str, Any], named: bool) -> None:
    start, *_ = asyncio.run(answered(stream_of([]), path, **changes))
    assert (b"x-weight-version" in dict(start["headers"])) is named


def test_the_version_is_the_one_served_when_the_answer_begins_and_not_when_it_was_asked(world: World) -> None:
    async def later(prompt: str, i: int) -> None:
        world.version = "8"

    world.client.before = later
    world.client.script = [output(choice(text="x"))]
    assert world.http().post(CHAT, json=ask()).headers["x-weight-version"] == "8"


# -- whose client is noted ---------------------------------------------------------------------------------------------
def test_note_spans_replaces_the_client_only_where_it_is_that_client() -> None:
    client, other = FakeClient(), FakeClient()
    state = State()
    state.openai_serving_chat = mine = ChatServing(client)
    state.openai_serving_completion = too = ChatServing(client)
    state.somebody_elses = theirs = ChatServing(other)
    state.none = SimpleNamespace(engine_client=None)
    state.engine_client = client
    state.server_load_metrics = 0
    state.nothing = None
    note_spans(state, client)
    assert mine.engine_client is too.engine_client is not client
    assert theirs.engine_client is other
    assert state.none.engine_client is None
    assert state.engine_client is client  # vLLM's own, which the plugin talks to
    noting = mine.engine_client
    assert noting.model_config == "the model's"
    assert asyncio.run(noting.abort("7")) == "aborted 7"
    client.errored = True
    assert noting.errored is True  # asked each time, not copied
    with pytest.raises(AttributeError, match="unheard_of"):
        noting.unheard_of  # noqa: B018
