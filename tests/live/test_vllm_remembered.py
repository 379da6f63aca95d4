"""What vLLM answered is remembered under the asker's key, so that it can be corrected, and no two requests are mixed up."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import KEYS
from starlette.requests import Request
from starlette.types import Message
from vllm_fakes import ID, FakeClient, World, ask, choice, events_of, output

from insitu.live.api.service import LocalService
from insitu.live.keys import digest
from insitu.live.vllm_plugin.answers import _NOTE, Answers, _NotingClient

CHAT = "/v1/chat/completions"
SCRIPT = [output(choice(text="an ")), output(choice(text="ötter", spans=[("7", 0, 2), ("7+1", 2, 5)]))]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.client.script = SCRIPT
    yield world
    world.store.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("key", [KEYS.api, KEYS.learn])
def test_an_answer_is_remembered_with_its_conversation_its_versions_and_the_digest_of_its_key(
    world: World, stream: bool, key: str
) -> None:
    asked = ask("who lives here", stream=stream)
    asked["messages"].insert(0, {"role": "system", "content": "Sei kurz, bitte — 你好"})
    assert world.http(key).post(CHAT, json=asked).status_code == 200
    found = world.store.completion(ID)
    assert found is not None
    assert (found.id, found.text, found.weight_version) == (ID, "an ötter", "7,7+1")
    assert found.messages == asked["messages"]
    assert found.key == digest(key.encode())
    assert key not in repr(found)


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_answered_can_be_corrected_by_the_key_that_asked_and_by_no_other(world: World, stream: bool) -> None:
    correction = {"completion_id": ID, "correction": "a badger"}
    with world.http() as http:
        assert http.post("/v1/feedback", json=correction).status_code == 404
        http.post(CHAT, json=ask("who lives here", stream=stream))
        answer = http.post("/v1/feedback", json=correction)
    assert answer.status_code == 202, answer.text
    (item,) = world.store.queued(5)
    assert item.payload == {
        "messages": [{"role": "user", "content": "who lives here"}, {"role": "assistant", "content": "a badger"}]
    }
    assert world.http(KEYS.api).post("/v1/feedback", json=correction).status_code == 403


def test_the_answer_to_another_key_cannot_be_corrected(world: World) -> None:
    world.http(KEYS.api).post(CHAT, json=ask())
    answer = world.http(KEYS.learn).post("/v1/feedback", json={"completion_id": ID, "correction": "no"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_of_several_choices_the_first_is_remembered(world: World, stream: bool) -> None:
    second = choice(1, text="the wrong one", spans=[("7", 0, 3)])
    world.client.script = [output(second), output(choice(0, text="the first", spans=[("7", 0, 2)]))]
    world.http().post(CHAT, json=ask(n=2, stream=stream))
    found = world.store.completion(ID)
    assert found is not None
    assert (found.text, found.weight_version) == ("the first", "7")


@pytest.mark.parametrize(
    ("asked", "script"),
    [
        (ask(n=0), SCRIPT),  # an error
        (ask(), [output(choice(text="", spans=[("7", 0, 1)]))]),  # nothing was said
        (ask(stream=True), []),
    ],
)
def test_errors_and_empty_answers_are_not_remembered(world: World, asked: dict[str, Any], script: list[Any]) -> None:
    world.client.script = script
    world.http().post(CHAT, json=asked)
    assert world.store.completion(ID) is None


def test_other_routes_are_named_and_not_remembered(world: World) -> None:
    world.app.post("/v1/completions")(world.serving.answer)
    answer = world.http().post("/v1/completions", json=ask())
    assert answer.headers["x-weight-version"] == "7,7+1"
    assert world.store.completion(ID) is None


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_stored_is_given_all_the_same(
    world: World, stream: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(completion: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.store, "add_completion", full)
    with caplog.at_level(logging.ERROR, "insitu.vllm"):
        answer = world.http().post(CHAT, json=ask(stream=stream))
    assert answer.status_code == 200
    assert "ötter" in (str(events_of(answer.text)) if stream else answer.json()["choices"][0]["message"]["content"])
    assert f"{ID} was answered but not stored" in caplog.text
    assert KEYS.learn not in caplog.text


def test_a_conversation_that_arrives_in_pieces_is_remembered_whole(world: World) -> None:
    raw = json.dumps(ask("who lives here")).encode()
    pieces = [raw[i : i + 5] for i in range(0, len(raw), 5)]
    key = f"Bearer  {KEYS.api} ".encode()  # as it may be spelled

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        answer = await world.serving.answer(Request(scope, receive_again))
        await answer(scope, receive, send)

    async def receive_again() -> Message:
        return {"type": "http.request", "body": raw}

    async def receive() -> Message:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"authorization", key)]}
    asyncio.run(Answers(app, service=LocalService(world.store), version=lambda: "7")(scope, receive, send))
    found = world.store.completion(ID)
    assert found is not None
    assert found.messages == [{"role": "user", "content": "who lives here"}]
    assert found.key == digest(KEYS.api.encode())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_can_be_corrected_by_whoever_has_just_read_its_end(world: World, stream: bool) -> None:
    stored_before: list[tuple[bytes, bool]] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            found = world.store.completion(ID)
            stored_before.append((message["body"], found is not None and found.text.endswith("ötter")))

    asyncio.run(asyncio.wait_for(world.asgi(ask(stream=stream), send), 20))
    ends = [
        stored for body, stored in stored_before if not stream or b'"finish_reason": "' in body or b"[DONE]" in body
    ]
    assert len(ends) == (2 if stream else 1), stored_before
    assert all(ends), stored_before


# -- streams that are cut off ------------------------------------------------------------------------------------------
def test_a_user_who_hangs_up_in_the_middle_may_correct_what_was_said_until_then(world: World) -> None:
    gone = asyncio.Event()
    bodies: list[bytes] = []

    async def stuck(prompt: str, i: int) -> None:
        if i == 1:
            gone.set()
            await asyncio.sleep(60)

    async def send(message: Message) -> None:
        bodies.append(message.get("body", b""))

    world.client.before = stuck
    asyncio.run(asyncio.wait_for(world.asgi(ask(stream=True), send, gone=gone), 20))
    assert b"an " in b"".join(bodies)
    assert "ötter".encode() not in b"".join(bodies)
    found = world.store.completion(ID)
    assert found is not None
    assert found.text == "an "
    assert world.client.ended == [ID]  # and nobody goes on generating for nobody


def test_a_stream_whose_source_fails_ends_with_its_error_and_leaves_no_note_behind(world: World) -> None:
    async def breaks(prompt: str, i: int) -> None:
        if i == 1 and prompt == "break":
            raise OSError("the engine's pipe")

    async def both() -> list[bytes]:
        bodies: list[bytes] = []

        async def send(message: Message) -> None:
            bodies.append(message.get("body", b""))

        with pytest.raises(BaseException, match="the engine's pipe"):
            await world.asgi(ask("break", stream=True), send)
        assert _NOTE.get() is None
        assert world.store.completion(ID) is None
        bodies.clear()
        await world.asgi(ask("fine", stream=True), send)
        return bodies

    world.client.before = breaks
    told = events_of(b"".join(asyncio.run(both())).decode())
    assert told[-2]["weight_versions"] == ["7", "7+1"]
    assert len(told[-2]["weight_version_spans"]) == 2  # of the second request only
    found = world.store.completion(ID)
    assert found is not None
    assert found.text == "an ötter"


def test_closing_the_noting_client_early_ends_the_engines_generation() -> None:
    client = FakeClient(script=SCRIPT)

    async def run() -> None:
        outputs = _NotingClient(client).generate("hello", "params", "id-1", priority=3)
        async for _ in outputs:
            break
        await outputs.aclose()
        assert client.ended == ["id-1"]

    asyncio.run(run())
    assert client.asked == [("hello", "params", "id-1", {"priority": 3})]


def test_a_generation_that_no_request_asked_for_is_passed_on_unnoted() -> None:
    client = FakeClient(script=SCRIPT)

    async def run() -> list[Any]:
        return [each async for each in _NotingClient(client).generate("warm", None, "up")]

    assert asyncio.run(run()) == SCRIPT


# -- at the same time --------------------------------------------------------------------------------------------------
def meeting(count: int) -> Callable[[str, int], Any]:
    """Every request waits before each output until all of them have come that far: they take turns, for sure."""
    barriers: dict[int, asyncio.Barrier] = {}

    async def meet(prompt: str, i: int) -> None:
        await barriers.setdefault(i, asyncio.Barrier(count)).wait()

    return meet


@pytest.mark.parametrize("stream", [False, True])
def test_requests_at_the_same_time_do_not_mix_their_notes(world: World, stream: bool) -> None:
    count = 5
    meet = meeting(count)

    class Client(FakeClient):
        async def generate(self, prompt: Any, params: Any, request_id: str, **more: Any) -> Any:
            yielded = [output(choice(text=prompt)), output(choice(text=prompt, spans=[(f"v{prompt}", 0, int(prompt))]))]
            for i, each in enumerate(yielded):
                await meet(prompt, i)
                yield each

    world.serving.engine_client._client = Client()

    async def one(prompt: str) -> bytes:
        bodies: list[bytes] = []

        async def send(message: Message) -> None:
            bodies.append(message.get("body", b""))
            await asyncio.sleep(0)

        await world.asgi(ask(prompt, stream=stream), send)
        return b"".join(bodies)

    async def all_of_them() -> list[bytes]:
        return await asyncio.gather(*(one(str(i)) for i in range(1, count + 1)))

    for i, body in enumerate(asyncio.run(all_of_them()), start=1):
        told = events_of(body.decode())[-2] if stream else json.loads(body)
        assert told["weight_versions"] == [f"v{i}"]
        assert told["weight_version_spans"] == [{"index": 0, "version": f"v{i}", "start": 0, "end": i}]
