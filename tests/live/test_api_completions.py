"""Text completions: raw prompts, and the echo with log-probabilities by which evaluation harnesses score a text."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import MODEL, World, chat_tokenizer, open_world
from tokenizers import processors


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path, chat_tokenizer()) as made:
        yield made


def post(world: World, prompt: Any, **more: Any) -> Any:
    return world.client().post("/v1/completions", json={"model": MODEL, "prompt": prompt, **more})


def complete(world: World, prompt: Any, **more: Any) -> Any:
    answer = post(world, prompt, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids_of(world: World, text: str) -> list[int]:
    ids: list[int] = world.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_prompt_is_text_or_token_ids_alone_or_in_a_list_of_one(world: World, as_ids: bool, wrap: bool) -> None:
    world.engine.say(" is blue", end=False)
    prompt: Any = ids_of(world, "the answer") if as_ids else "the answer"
    body = complete(world, [prompt] if wrap else prompt)
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": " is blue", "logprobs": None, "finish_reason": "length"}]
    ids, params = world.engine.calls[0]
    assert ids == ids_of(world, "the answer")
    assert params.max_tokens == 16
    assert body["usage"]["prompt_tokens"] == len(ids)


def test_several_prompts_are_refused(world: World) -> None:
    answer = post(world, ["one", "two"])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_echo_repeats_the_prompt_with_its_logprobs(world: World) -> None:
    world.engine.say(" world")
    world.engine.versions[-1] = "7"
    body = complete(world, "hello", echo=True, logprobs=3)
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    prompt = ids_of(world, "hello")
    assert choice["text"] == "hello world" == "".join(logprobs["tokens"])
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    expected = [-0.5 - i for i in range(1, len(prompt))] + [-0.5 - i for i in range(len(world.engine.script) - 1)]
    assert logprobs["token_logprobs"][1:] == expected
    # Three alternatives, and always the token itself.
    assert all(3 <= len(top) <= 4 for top in logprobs["top_logprobs"][1:])
    for token, value, top in list(
        zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    )[1:]:
        assert token in top
        assert value == top[token] or len(top) == 3
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert body["weight_versions"] == ["7"]


def test_echo_with_no_new_tokens_only_scores(world: World) -> None:
    ids = ids_of(world, "the answer is blue")
    choice = complete(world, ids, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert choice["text"] == "the answer is blue"
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids)
    assert world.engine.calls == []
    assert post(world, ids, max_tokens=0).json()["error"]["param"] == "max_tokens"


def test_logprobs_zero_gives_the_chosen_tokens_only(world: World) -> None:
    choice = complete(world, "hello", logprobs=0)["choices"][0]
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"])


def test_offsets_inside_a_character_point_at_it(world: World) -> None:
    world.engine.say("a😀b")
    choice = complete(world, "hello", logprobs=0, echo=True)["choices"][0]
    offsets = choice["logprobs"]["text_offset"][len(ids_of(world, "hello")) :]
    assert choice["text"] == "helloa😀b"
    assert offsets == [5, 6, 6, 6, 6, 7]


def test_an_echoed_prompt_shows_its_special_tokens(world: World) -> None:
    text = "<|im_start|>user\nhello"
    choice = complete(world, text, echo=True, max_tokens=0)["choices"][0]
    assert choice["text"] == text


def test_an_echoed_text_does_not_show_what_the_tokenizer_put_before_it(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer())
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    with open_world(tmp_path, tokenizer) as world:
        choice = complete(world, "hello", echo=True, logprobs=0, max_tokens=0)["choices"][0]
        assert choice["text"] == "hello"
        assert choice["logprobs"]["tokens"][0] == "<|endoftext|>"
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert None not in choice["logprobs"]["token_logprobs"][1:]
        ids = [bos, *ids_of(world, "hello")]
        assert complete(world, ids, echo=True, max_tokens=0)["choices"][0]["text"] == "<|endoftext|>hello"


def test_streamed_and_whole_completions_are_equal(world: World) -> None:
    world.engine.say(" world 😀, the answer")
    whole = complete(world, "hello", echo=True, logprobs=2)
    text = post(world, "hello", echo=True, logprobs=2, stream=True, stream_options={"include_usage": True}).text
    lines = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert chunks.pop()["usage"] == whole["usage"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    for name, values in whole["choices"][0]["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][name]] == values
    assert choices[-1]["finish_reason"] == "stop"
    assert chunks[-1]["weight_versions"] == ["0"]


def test_a_token_id_beyond_the_vocabulary_is_named(world: World) -> None:
    answer = post(world, [1, 2, 10**6])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt[2]")
    assert world.engine.calls == []


def test_an_empty_prompt_is_refused(world: World) -> None:
    for prompt in ("", [], [[]]):
        answer = post(world, prompt)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt"), prompt


def test_a_completion_cannot_be_corrected_and_says_why(world: World) -> None:
    id = complete(world, "hello")["id"]
    answer = world.client().post("/v1/feedback", json={"completion_id": id, "correction": "x"})
    assert answer.status_code == 422
    assert "context_ids" in answer.json()["error"]["message"]
