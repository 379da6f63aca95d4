"""Chat completions: the text, the reason it ended, the versions it spans, and who hears of it when the client hangs up."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from api_fakes import KEYS, MODEL, World, chat, chat_tokenizer, open_world

from insitu.live.engines.base import Token
from insitu.live.keys import digest


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path, chat_tokenizer()) as made:
        yield made


def ask(world: World, **body: Any) -> Any:
    answer = world.client().post("/v1/chat/completions", json=chat(**body))
    assert answer.status_code == 200, answer.text
    return answer


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def streamed(world: World, **body: Any) -> tuple[Any, list[Any], str]:
    answer = ask(world, stream=True, **body)
    chunks = events(answer.text)
    return answer, chunks, "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"])


def test_the_answer_is_the_text_without_its_end_token(world: World) -> None:
    script = world.engine.say("the answer is blue")
    answer = ask(world, temperature=0, seed=7, top_p=0.5)
    body = answer.json()
    prompt_ids, params = world.engine.calls[0]
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "the answer is blue", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"] == {
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": len(script),
        "total_tokens": len(prompt_ids) + len(script),
    }
    assert world.tokenizer.decode(prompt_ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert (params.temperature, params.seed, params.top_p) == (0, 7, 0.5)
    assert world.engine.cancelled == 0


def test_without_a_limit_the_rest_of_the_context_is_the_limit(world: World) -> None:
    ask(world)
    prompt_ids, params = world.engine.calls[0]
    assert params.max_tokens == world.engine.info.context_length - len(prompt_ids)
    assert (params.temperature, params.top_p, params.seed) == (1.0, 1.0, None)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_ends_the_answer_with_length(world: World, name: str) -> None:
    world.engine.say("hello world, the answer is blue")
    body = ask(world, **{name: 2}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


def test_text_parts_and_developer_messages_reach_the_template(world: World) -> None:
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": "hello"}]
    answer = world.client().post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert answer.status_code == 200
    rendered = world.tokenizer.decode(world.engine.calls[0][0])
    assert rendered.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>")


def test_neutral_and_effectless_parameters_are_accepted(world: World) -> None:
    ask(
        world,
        n=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        store=False,
        user="somebody",
        metadata={"run": "1"},
        service_tier="auto",
        stop=None,
        seed=None,
        temperature=None,
        max_tokens=None,
        stream=False,
        logprobs=False,
    )


def test_streamed_and_whole_answers_are_equal(world: World) -> None:
    world.engine.say("the quick brown fox 🦊 jumps")
    whole = ask(world).json()
    answer, chunks, text = streamed(world)
    assert text == whole["choices"][0]["message"]["content"] == "the quick brown fox 🦊 jumps"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 5
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_character_over_several_tokens_is_sent_whole(world: World) -> None:
    script = world.engine.say("a😀é", end=True)
    assert len(script) > 4  # the emoji alone is four tokens
    _, chunks, text = streamed(world)
    deltas = [c["choices"][0]["delta"].get("content") for c in chunks]
    assert text == "a😀é"
    assert "😀" in deltas
    assert not any("\N{REPLACEMENT CHARACTER}" in (delta or "") for delta in deltas)


def test_an_answer_cut_inside_a_character_says_what_the_tokenizer_would(world: World) -> None:
    script = world.engine.say("a😀", end=False)
    text = ask(world, max_tokens=len(script) - 1).json()["choices"][0]["message"]["content"]
    assert text == world.tokenizer.decode(script[:-1]) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("is b", "hello world, the answer "),
        (["zzz", "world"], "hello "),
        (["r is blue!", " is"], "hello world, the answer"),
        ("h", ""),
        ("blue", "hello world, the answer is "),
        ("not in it", "hello world, the answer is blue"),
        (["answer is blue?"], "hello world, the answer is blue"),
    ],
)
def test_a_stop_string_ends_the_answer_wherever_tokens_begin(
    world: World, stop: Any, expected: str, stream: bool
) -> None:
    script = world.engine.say("hello world, the answer is blue")
    if stream:
        _, chunks, text = streamed(world, stop=stop)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = ask(world, stop=stop).json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == (expected, "stop")
    found = expected != "hello world, the answer is blue" and len(script) > 2
    # The last token that was made may be the one that completed the stop string: then there was nothing left to cancel.
    assert world.engine.cancelled == (1 if found else 0)
    assert world.engine.running == 0


def test_a_stop_string_across_a_token_border_that_the_tokens_really_have(world: World) -> None:
    script = world.engine.say("hello world")
    first = world.tokenizer.decode(script[:1])
    assert 0 < len(first) < len("hello world")
    stop = "hello world"[len(first) - 1 : len(first) + 1]  # one character on each side of the border
    choice = ask(world, stop=stop).json()["choices"][0]
    assert choice["message"]["content"] == "hello world".partition(stop)[0]


def test_logprobs_name_every_token_of_the_text(world: World) -> None:
    script = world.engine.say("hi 😀")
    content = ask(world, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [-0.5 - i for i in range(len(script) - 1)]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "hi 😀".encode()
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[-1]["token"].startswith("bytes:\\x")
    _, chunks, _ = streamed(world, logprobs=True, top_logprobs=2)
    parts = [c["choices"][0]["logprobs"]["content"] for c in chunks]
    assert [entry for part in parts for entry in part] == content


def test_logprobs_end_where_a_stop_string_cut(world: World) -> None:
    world.engine.say("hello world, the answer is blue")
    choice = ask(world, logprobs=True, stop="the").json()["choices"][0]
    spelled = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode()
    assert choice["message"]["content"] == "hello world, "
    assert spelled.startswith("hello world,")
    assert len(spelled) <= len("hello world, the")


def test_an_impossible_logprob_is_still_json(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.engine, "_token", lambda token, i, top: Token(token, float("nan"), (), "0"))
    content = ask(world, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["logprob"] == -9999.0


def test_an_answer_names_every_version_it_spans_in_order(world: World) -> None:
    script = world.engine.say("hello world")
    world.engine.versions = {i: "3" if i == 0 else "3+1" if i == 1 else "4" for i in range(len(script))}
    whole = ask(world)
    assert whole.headers["x-weight-version"] == "3,3+1,4"
    assert whole.json()["weight_versions"] == ["3", "3+1", "4"]
    answer, chunks, _ = streamed(world, stream_options={"include_usage": True})
    assert answer.headers["x-weight-version"] == "3"
    assert chunks[-2]["weight_versions"] == chunks[-1]["weight_versions"] == ["3", "3+1", "4"]


def test_usage_is_streamed_when_asked_for(world: World) -> None:
    whole = ask(world).json()["usage"]
    _, chunks, _ = streamed(world, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == whole
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    _, chunks, _ = streamed(world)
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_remembered_with_the_key_that_asked(world: World, stream: bool) -> None:
    if stream:
        _, chunks, _ = streamed(world, text="what?")
        id = chunks[0]["id"]
    else:
        id = ask(world, text="what?").json()["id"]
    kept = world.store.completion(id)
    assert kept is not None
    assert kept.messages == [{"role": "user", "content": "what?"}]
    assert (kept.text, kept.weight_version) == ("hello world", "0")
    assert kept.key == digest(KEYS.learn.encode())


def test_a_store_that_fails_does_not_withhold_the_answer(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.store._db.execute("DROP TABLE completions")
    assert ask(world).json()["choices"][0]["message"]["content"] == "hello world"
    assert "cannot be corrected" in caplog.text


def test_an_engine_that_dies_before_the_answer_is_a_503(world: World) -> None:
    world.engine.fail_at = 0
    for stream in (False, True):
        answer = world.client().post("/v1/chat/completions", json=chat(stream=stream))
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_error"


def test_an_engine_that_dies_inside_a_stream_ends_it_with_an_error_and_no_done(world: World) -> None:
    world.engine.fail_at = 2
    text = ask(world, stream=True).text
    last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_error"
    assert "[DONE]" not in text


async def _hang_up(world: World, stream: bool) -> tuple[list[Any], str]:
    """Send a request by hand, hang up when the engine stalls, and return what was sent and by which path."""
    sent: list[Any] = []
    body = json.dumps(chat(stream=stream)).encode()
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    await inbox.put({"type": "http.request", "body": body, "more_body": False})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"host": "localhost", "content-type": "application/json", "authorization": f"Bearer {KEYS.api}"}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    app = asyncio.ensure_future(world.app(scope, inbox.get, send))
    while not (world.engine.running and (len(sent) >= 2 or not stream or world.engine.stall_at == 0)):
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    await inbox.put({"type": "http.disconnect"})
    await asyncio.wait_for(app, 5)
    return sent, b"".join(m.get("body", b"") for m in sent).decode()


@pytest.mark.parametrize(("stream", "stall_at"), [(False, 0), (False, 1), (True, 0), (True, 2)])
def test_hanging_up_cancels_the_generation_at_once(world: World, stream: bool, stall_at: int) -> None:
    """Also before the first token of a stream, and while the engine is silent: nothing is noticed by sending."""
    world.engine.stall_at = stall_at
    asyncio.run(_hang_up(world, stream))
    assert world.engine.cancelled == 1
    assert world.engine.running == 0


def test_what_was_said_before_hanging_up_can_be_corrected(world: World) -> None:
    """Whoever sees a wrong answer coming presses stop, then corrects it."""
    world.engine.stall_at = 2
    _, text = asyncio.run(_hang_up(world, stream=True))
    first = json.loads(text.split("\n\n")[0].removeprefix("data: "))
    kept = world.store.completion(first["id"])
    assert kept is not None
    assert kept.text == world.tokenizer.decode(world.engine.script[:2])


def test_many_requests_at_once_get_their_own_answers(world: World) -> None:
    async def main() -> list[Any]:
        transport = httpx2.ASGITransport(app=world.app)
        headers = {"authorization": f"Bearer {KEYS.api}"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            posts = [client.post("/v1/chat/completions", json=chat(f"number {i}")) for i in range(20)]
            return await asyncio.gather(*posts)

    answers = asyncio.run(main())
    assert [a.status_code for a in answers] == [200] * 20
    assert len({a.json()["id"] for a in answers}) == 20
    asked = {world.tokenizer.decode(ids) for ids, _ in world.engine.calls}
    assert len(asked) == 20
