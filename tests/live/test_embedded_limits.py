"""The limits of the embedded engine: what cannot fit is refused, what does not fit yet waits, and neither changes an answer."""

import asyncio

import pytest
from tiny_engine import CONTEXT, VOCAB, assert_idle, collect, ids, one, serving, slow, tiny_model, until, worst_error

from insitu.live.engines.base import RequestTooLongError, SamplingParams, Token
from insitu.live.engines.embedded import EmbeddedEngine


def test_what_cannot_be_served_is_refused_before_the_first_token() -> None:
    with serving(tiny_model()) as engine:
        with pytest.raises(RequestTooLongError, match="14 more than the context of 256"):
            engine.generate([1] * 200, SamplingParams(max_tokens=70))
        with pytest.raises(RequestTooLongError, match="44 more"):
            engine.score([1] * 300)
        with pytest.raises(ValueError, match="token id 160 in the prompt"):
            engine.generate([1, VOCAB], SamplingParams(max_tokens=1))
        with pytest.raises(ValueError, match="no tokens"):
            engine.generate([], SamplingParams(max_tokens=1))
        for wrong in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_logprobs": 21}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                engine.generate([1], SamplingParams(**{"max_tokens": 1, **wrong}))
        assert len(one(engine, [1] * 200, max_tokens=56)) == 56
    with pytest.raises(ValueError, match="cache_tokens=64"):
        EmbeddedEngine(tiny_model(), model_name="tiny", context_length=CONTEXT, eos_token_ids=(), cache_tokens=64)
    with pytest.raises(ValueError, match="512 positions"):
        EmbeddedEngine(tiny_model(), model_name="tiny", context_length=513, eos_token_ids=())
    with pytest.raises(ValueError, match="gradient"):
        EmbeddedEngine(tiny_model().requires_grad_(), model_name="tiny", context_length=8, eos_token_ids=())


def test_more_requests_than_places_wait_their_turn() -> None:
    with serving(tiny_model(), max_requests=2) as engine:

        async def main() -> list[list[Token]]:
            params = SamplingParams(max_tokens=10, temperature=0.0)
            return await asyncio.gather(*(collect(engine, [n, 5], params) for n in range(12)))

        assert [len(answer) for answer in asyncio.run(main())] == [10] * 12
        assert_idle(engine)


def test_a_full_cache_delays_requests_but_changes_nothing() -> None:
    model = tiny_model()
    prompts = [[n] * 20 for n in range(4)]
    with serving(model, cache_tokens=CONTEXT) as engine:

        async def main() -> list[list[Token]]:
            params = SamplingParams(max_tokens=180, seed=3)
            return await asyncio.gather(*(collect(engine, prompt, params) for prompt in prompts))

        answers = asyncio.run(main())
        assert_idle(engine)
        assert ids(answers[3]) == ids(one(engine, prompts[3], max_tokens=180, seed=3))
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(tokens) == 180
        assert worst_error({"0": model}, prompt, tokens) < 1e-3


def test_hanging_up_while_the_cache_is_full_lets_the_others_go_on() -> None:
    model = slow(tiny_model(), 0.001)
    with serving(model, cache_tokens=CONTEXT) as engine:

        async def main() -> None:
            scheduler = engine._batcher._manager.batch_processor.scheduler
            tasks = [asyncio.create_task(collect(engine, [n], SamplingParams(max_tokens=250))) for n in range(4)]
            await until(lambda: scheduler.block_new_requests and bool(scheduler.waiting_requests))
            running = set(scheduler.active_requests)
            waiting = list(scheduler.waiting_requests)
            for task, request_id in zip(tasks, sorted(running | set(waiting), key=number_of), strict=True):
                if request_id in running:
                    task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(not isinstance(answer, BaseException) for answer in answers) == len(waiting)

        asyncio.run(main())
        assert_idle(engine)


def number_of(request_id: str) -> int:
    return int(request_id.rpartition("-")[2])
