"""Replies for the learner from vLLM: on its event loop, whoever asks from wherever."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_client import CONTEXT, FINAL_ONLY, World, best_at, logprob, stand_in_modules

from insitu.live.engines.base import EngineError, RequestTooLongError, SamplingParams, Token


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    stand_in_modules(monkeypatch)
    world = World()
    yield world
    assert world.client.running == 0, "a request was left running in vLLM"
    world.server.close()


def span(version: str, start: int, end: int) -> SimpleNamespace:
    return SimpleNamespace(version=version, start=start, end=end)


def test_a_reply_is_vllms_tokens_with_their_log_probabilities(world: World) -> None:
    told = world.generate([3, 1], max_tokens=8, temperature=0.0)
    assert told == [Token(id, logprob(2 + i, id), (), "4") for i, id in enumerate([5, 9, 2])]
    assert [token.id for token in world.generate([3, 1], max_tokens=2)] == [5, 9]


def test_what_was_asked_for_is_what_vllm_is_asked_for(world: World) -> None:
    asked: dict[str, Any] = {"max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "seed": 11}
    world.generate([3, 1], **asked, top_logprobs=2, stop_token_ids=(2, 7))
    ((_, prompt, params, request),) = world.client.calls
    assert prompt == {"prompt_token_ids": [3, 1]}
    assert vars(params) == {**asked, "logprobs": 2, "stop_token_ids": [2, 7], "output_kind": FINAL_ONLY}
    assert request.startswith("insitu-")


def test_the_alternatives_are_the_best_ones_by_rank(world: World) -> None:
    for i, token in enumerate(world.generate([3, 1], max_tokens=3, top_logprobs=4)):
        best = best_at(2 + i)[:4]
        assert token.top == tuple((id, logprob(2 + i, id)) for id in best)


@pytest.mark.parametrize(
    ("spans", "versions"),
    [
        (None, ["4", "4", "4"]),
        ([], ["4", "4", "4"]),
        ([span("9", 0, 3)], ["9", "9", "9"]),
        ([span("9", 0, 1), span("9+1", 1, 3)], ["9", "9+1", "9+1"]),
        ([span("9", 0, 2)], ["9", "9", "4"]),  # more tokens than vLLM has labels for
        ([span("9", 0, 0), span("8", 0, 3)], ["8", "8", "8"]),
    ],
)
def test_each_token_carries_the_version_of_its_span(world: World, spans: Any, versions: list[str]) -> None:
    world.client.spans = spans
    assert [token.version for token in world.generate([3, 1], max_tokens=8)] == versions


@pytest.mark.parametrize(
    ("prompt", "limit", "over"), [(CONTEXT, 1, 1), (1, CONTEXT, 1), (CONTEXT + 3, 4, 7), (8, 9, 1)]
)
def test_what_does_not_fit_the_context_is_refused_at_once_by_how_much(
    world: World, prompt: int, limit: int, over: int
) -> None:
    with pytest.raises(RequestTooLongError, match=rf"{prompt} prompt tokens and max_tokens={limit} are {over} more"):
        world.engine.generate([1] * prompt, SamplingParams(max_tokens=limit))
    assert world.client.calls == []
    assert len(world.generate([1] * (CONTEXT - 3), max_tokens=3)) == 3


def test_it_may_be_asked_on_vllms_own_event_loop_too(world: World) -> None:
    async def collect() -> list[int]:
        return [token.id async for token in world.engine.generate([3, 1], SamplingParams(max_tokens=8))]

    assert world.server.run(collect()) == [5, 9, 2]


def test_several_replies_at_once_are_asked_for_at_once(world: World) -> None:
    async def collect(prompt: list[int]) -> list[float]:
        params = SamplingParams(max_tokens=8)
        return [token.logprob async for token in world.engine.generate(prompt, params)]

    async def together() -> list[list[float]]:
        return await asyncio.gather(*(collect([1] * n) for n in (1, 2, 3)))

    assert asyncio.run(together()) == [[logprob(n + i, id) for i, id in enumerate([5, 9, 2])] for n in (1, 2, 3)]


def test_who_does_not_wait_any_longer_ends_the_request_in_vllm(world: World) -> None:
    world.client.hang = True

    async def impatient() -> None:
        replies = world.engine.generate([3, 1], SamplingParams(max_tokens=8))
        first = asyncio.ensure_future(anext(replies))
        await asyncio.get_running_loop().run_in_executor(None, world.client.stuck.wait, 20)
        assert world.client.running == 1
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(impatient())
    for _ in range(100):
        world.server.run(asyncio.sleep(0))
    assert world.client.running == 0


def test_what_vllm_raises_or_does_not_answer_is_raised_to_the_asker(world: World) -> None:
    world.client.fail = {"generate": ValueError("the engine core died")}
    with pytest.raises(ValueError, match="engine core died"):
        world.generate([3, 1], max_tokens=2)
    world.client.fail = {}
    world.client.silent = True
    with pytest.raises(EngineError, match="without an answer"):
        world.generate([3, 1], max_tokens=2)
