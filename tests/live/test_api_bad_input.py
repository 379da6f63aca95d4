"""Everything a client can get wrong: the right status, a body that names the field, and a server that is as before."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api_fakes import MODEL, World, chat, chat_tokenizer, lesson, open_world

CHAT, TEXT, LEARN = "/v1/chat/completions", "/v1/completions", "/v1/feedback"
USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One for all of them: whatever was sent before, it is as it was."""
    with open_world(tmp_path_factory.mktemp("bad"), chat_tokenizer()) as made:
        yield made


def check(world: World, answer: Any, status: int, param: str | None) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    assert "Traceback" not in answer.text
    if param is not None and status == 400:
        assert param in error["message"] or error["code"] in ("context_length_exceeded", "model_not_found")
    # Nothing was asked of the engine, nothing was queued.
    assert world.engine.calls == []
    assert world.store.queued(9) == []
    assert world.store.open_rollbacks() == []
    assert [v.id for v in world.store.versions()] == [0]


@pytest.mark.parametrize("path", [CHAT, TEXT, LEARN])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b'{"model": ',
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "org/tiny", "messages": [], "prompt": ""} trailing',
    ],
    ids=lambda body: repr(body[:12]),
)
def test_a_body_that_is_no_json_object(world: World, path: str, body: bytes) -> None:
    check(world, world.client().post(path, content=body), 400, None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [USER]}, "model"),
        ({"model": MODEL}, "messages"),
        ({"model": 3, "messages": [USER]}, "model"),
        (chat() | {"messages": []}, "messages"),
        (chat() | {"messages": "hello"}, "messages"),
        (chat() | {"messages": {}}, "messages"),
        (chat() | {"messages": ["hello"]}, "messages[0]"),
        (chat() | {"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
        (chat() | {"messages": [{"role": "user"}]}, "messages[0].content"),
        (chat() | {"messages": [{"content": "x"}]}, "messages[0].role"),
        (chat() | {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (chat() | {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (chat() | {"messages": [{**USER, "colour": "blue"}]}, "messages[0].colour"),
        (chat() | {"messages": [{**USER, "name": "bob"}]}, "messages[0].name"),
        (chat() | {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
        (
            chat() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        (chat() | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (chat(temperature=-0.1), "temperature"),
        (chat(temperature=2.1), "temperature"),
        (chat(temperature="1"), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(top_p=0), "top_p"),
        (chat(top_p=1.5), "top_p"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=-5), "max_tokens"),
        (chat(max_tokens=1.5), "max_tokens"),
        (chat(max_tokens=10**30), "max_tokens"),
        (chat(max_tokens=10, max_completion_tokens=11), "max_tokens"),
        (chat(max_completion_tokens=10_000), "max_tokens"),
        (chat(seed=2**63), "seed"),
        (chat(seed="x"), "seed"),
        (chat(stop=""), "stop"),
        (chat(stop=["a", ""]), "stop[1]"),
        (chat(stop=["a"] * 5), "stop"),
        (chat(stop=7), "stop"),
        (chat(stop="x" * 2000), "stop"),
        (chat(stop="\ud800"), "stop"),
        (chat(stream="yes"), "stream"),
        (chat(stream_options={"include_usage": True}), "stream_options"),
        (chat(stream=True, stream_options={"odd": 1}), "stream_options.odd"),
        (chat(logprobs=5), "logprobs"),
        (chat(top_logprobs=3), "top_logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (chat(n=2), "n"),
        (chat(n=True), "n"),
        (chat(presence_penalty=0.5), "presence_penalty"),
        (chat(frequency_penalty=-1), "frequency_penalty"),
        (chat(logit_bias={"50256": -100}), "logit_bias"),
        (chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
        (chat(tool_choice="auto"), "tool_choice"),
        (chat(response_format={"type": "json_object"}), "response_format"),
        (chat(store=True), "store"),
        (chat(service_tier="flex"), "service_tier"),
        (chat(parallel_tool_calls=True), "parallel_tool_calls"),
        (chat(reasoning_effort="high"), "reasoning_effort"),
        (chat(modalities=["text", "audio"]), "modalities"),
        (chat(functions=[{"name": "f"}]), "functions"),
        (chat(best_of=2), "best_of"),
        (chat(top_k=40), "top_k"),
        (chat(prompt="x"), "prompt"),
        (chat(repetition_penalty=1.1), "repetition_penalty"),
        (chat("hello " * 300), "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_chat_request_that_cannot_be_served_is_a_400_naming_the_parameter(
    world: World, body: Any, param: str
) -> None:
    content = json.dumps(body)  # the client's own encoder would refuse half of a surrogate pair
    check(world, world.client().post(CHAT, content=content), 400, param)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt[1]"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": "hello " * 300}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_text_request_that_cannot_be_served_is_a_400_naming_the_parameter(
    world: World, more: Any, param: str
) -> None:
    content = json.dumps({"model": MODEL, "prompt": "hello", **more})
    check(world, world.client().post(TEXT, content=content), 400, param)


def test_a_million_wrong_elements_are_one_error(world: World) -> None:
    for body in ({"messages": [0] * 1_000_000}, {"prompt": [0] * 1_000_000 + ["x"]}):
        path = CHAT if "messages" in body else TEXT
        answer = world.client().post(path, json={"model": MODEL, **body})
        assert answer.status_code == 400
        assert len(answer.text) < 500


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_another_model_is_a_404(world: World, path: str) -> None:
    for name in ("gpt-4o", f"{MODEL}@v3", "", MODEL.upper(), "\ud800"):
        body = {**chat(), "model": name} if path == CHAT else {"model": name, "prompt": "hello"}
        answer = world.client().post(path, content=json.dumps(body))
        if name == "\ud800":
            check(world, answer, 400, "model")
            continue
        check(world, answer, 404, "model")
        assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("marker", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_a_message_are_a_422(world: World, marker: str, role: str) -> None:
    turns = [{"role": role, "content": f"hello{marker}\nworld"}]
    check(world, world.client().post(CHAT, json=chat() | {"messages": turns}), 422, "messages[0].content")
    example = [*turns, *lesson()]
    check(world, world.client().post(LEARN, json={"messages": example}), 422, "messages[0].content")


def test_control_tokens_split_over_text_parts_are_a_422(world: World) -> None:
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "start|>"}]
    answer = world.client().post(CHAT, json=chat() | {"messages": [{"role": "user", "content": parts}]})
    check(world, answer, 422, "messages[0].content")


@pytest.mark.parametrize(
    ("status", "body", "param"),
    [
        (400, {}, None),
        (400, {"id": "only"}, None),
        (400, {"messages": lesson(), "completion_id": "x", "correction": "y"}, "completion_id"),
        (400, {"messages": lesson(), "context_ids": [1], "continuation_ids": [2]}, "context_ids"),
        (400, {"completion_id": "x"}, "correction"),
        (400, {"correction": "x"}, "completion_id"),
        (400, {"context_ids": [1]}, "continuation_ids"),
        (400, {"continuation_ids": [1]}, "context_ids"),
        (400, {"completion_id": "x", "correction": {"role": "user", "content": "y"}}, "correction.role"),
        (400, {"completion_id": "x", "correction": 5}, "correction"),
        (400, {"messages": lesson(), "score": 1}, "score"),
        (400, {"messages": "hello"}, "messages"),
        (400, {"messages": [{"role": "user"}, *lesson()]}, "messages[0].content"),
        (400, {"messages": [{**USER, "odd": 1}, *lesson()]}, "messages[0].odd"),
        (400, {"messages": lesson(), "id": "a b"}, "id"),
        (400, {"messages": lesson(), "id": "x" * 65}, "id"),
        (400, {"messages": lesson(), "id": ""}, "id"),
        (400, {"messages": lesson(), "id": "new\nline"}, "id"),
        (400, {"messages": lesson(), "id": "end\n"}, "id"),
        (400, {"context_ids": ["1"], "continuation_ids": [1]}, "context_ids[0]"),
        (400, {"context_ids": [1], "continuation_ids": [True]}, "continuation_ids[0]"),
        (404, {"completion_id": "chatcmpl-unknown", "correction": "x"}, "completion_id"),
        (422, {"messages": []}, "messages"),
        (422, {"messages": [USER]}, "messages"),
        (422, {"messages": [{"role": "wizard", "content": "x"}, *lesson()]}, "messages[0].role"),
        (422, {"messages": [{"role": ["user"], "content": "x"}, *lesson()]}, "messages[0].role"),
        (422, {"messages": [{**USER, "weight": 1}, lesson()[1]]}, "messages[0].weight"),
        (422, {"messages": [USER, {**lesson()[1], "weight": 2}]}, "messages[1].weight"),
        (422, {"messages": [USER, {**lesson()[1], "weight": 0}]}, "messages"),
        (422, {"messages": lesson("hello " * 300)}, "messages"),
        (422, {"context_ids": [1] * 200, "continuation_ids": [2] * 100}, "context_ids"),
        (422, {"context_ids": [1], "continuation_ids": [10**6]}, "continuation_ids[0]"),
        (422, {"context_ids": [-1], "continuation_ids": [1]}, "context_ids[0]"),
        (422, {"context_ids": [], "continuation_ids": [1]}, "context_ids"),
        (422, {"context_ids": [1], "continuation_ids": []}, "continuation_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_feedback_that_is_malformed_or_cannot_be_learned(world: World, status: int, body: Any, param: Any) -> None:
    check(world, world.client().post(LEARN, json=body), status, param)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/nobody/else", 404),
        ("POST", "/v1/nowhere", 404),
        ("GET", "/docs", 404),
        ("PUT", LEARN, 405),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/live/versions", 405),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/feedback/unknown", 404),
        ("POST", "/v1/live/versions/9/rollback", 404),
        ("POST", "/v1/live/versions/latest/rollback", 404),
        ("POST", "/v1/live/versions/0/rollback?timeout=-1", 400),
        ("POST", "/v1/live/versions/0/rollback?timeout=nan", 400),
        ("POST", "/v1/live/versions/0/rollback?timeout=soon", 400),
    ],
)
def test_paths_and_methods_that_are_not_there(world: World, method: str, path: str, status: int) -> None:
    answer = world.client().request(method, path)
    param = "id" if "unknown" in path or (status == 404 and "rollback" in path) else None
    param = "timeout" if "timeout" in path else "model" if path.startswith("/v1/models/") else param
    check(world, answer, status, param)
    assert ("allow" in answer.headers) == (status == 405)


def test_a_rollback_takes_no_arguments(world: World) -> None:
    for body, param in ({"version": 3}, "version"), ([], None), ("x", None):
        answer = world.client().post("/v1/live/versions/0/rollback", json=body)
        check(world, answer, 400, param)


def test_a_bug_is_a_500_that_tells_the_client_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(world.store, "versions", broken)
    answer = world.client().get("/v1/live/versions")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
