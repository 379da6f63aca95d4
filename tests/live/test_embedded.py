"""The embedded engine on a tiny random Llama: what it says must be what the weights say, before and after they change."""

import asyncio
import threading
import time
from typing import Any

import pytest
import torch
from tiny_engine import (
    PROMPT,
    VOCAB,
    assert_idle,
    collect,
    frozen,
    ids,
    one,
    plain_logprobs,
    serving,
    slow,
    tiny_model,
    until,
    update,
    worst_error,
)

from insitu.live.engines.base import SamplingParams, Token
from insitu.live.engines.batching import Batcher
from insitu.live.engines.embedded import EmbeddedEngine
from insitu.live.engines.sampling import Draw, pick
from insitu.live.engines.scoring import twin


def test_greedy_is_what_generate_of_transformers_gives() -> None:
    model = tiny_model()
    expected = twin(model).generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    with serving(model) as engine:
        tokens = one(engine, PROMPT, max_tokens=30, temperature=0.0)
    assert ids(tokens) == expected[0, len(PROMPT) :].tolist()


def test_logprobs_and_alternatives_are_the_raw_models() -> None:
    model = tiny_model()
    with serving(model) as engine:
        tokens = one(engine, PROMPT, max_tokens=20, temperature=0.7, top_p=0.9, top_logprobs=5, seed=1)
    expected = plain_logprobs(model, [*PROMPT, *ids(tokens)])[len(PROMPT) - 1 : -1]
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        assert [i for i, _ in token.top] == row.topk(5).indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)


def test_prompts_in_pieces_beside_running_requests_keep_their_rows() -> None:
    model = tiny_model()
    prompts = [[(7 * i + j) % VOCAB for j in range(length)] for i, length in enumerate((1, 45, 3, 70, 8, 9, 16, 33))]
    with serving(model, max_batch_tokens=8) as engine:

        async def main() -> list[list[Token]]:
            params = SamplingParams(max_tokens=25, temperature=0.0)
            return await asyncio.gather(*(collect(engine, prompt, params) for prompt in prompts))

        answers = asyncio.run(main())
    for prompt, tokens in zip(prompts, answers, strict=True):
        rows = plain_logprobs(model, [*prompt, *ids(tokens)])[len(prompt) - 1 : -1]
        assert ids(tokens) == rows.argmax(-1).tolist()
        assert [token.logprob for token in tokens] == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)


def test_draws_follow_seed_and_position_alone_and_in_a_batch() -> None:
    model = tiny_model()
    with serving(model) as engine:
        params = {"max_tokens": 40, "temperature": 1.3, "top_p": 0.9}
        alone = [ids(one(engine, PROMPT, seed=seed, **params)) for seed in (11, 12)]

        async def batch() -> list[list[Token]]:
            seeds = (11, 12, 13, 14, 15, 16, 17, 18)
            return await asyncio.gather(*(collect(engine, PROMPT, SamplingParams(seed=s, **params)) for s in seeds))

        together = [ids(answer) for answer in asyncio.run(batch())]
        unseeded = [ids(one(engine, PROMPT, **params)) for _ in range(2)]
    assert together[:2] == alone
    assert len(set(map(tuple, together))) == 8
    assert unseeded[0] != unseeded[1]
    # And they are the draws of sampling.pick, whose distribution tests/live/test_sampling.py checks.
    rows = plain_logprobs(model, [*PROMPT, *alone[0]])[len(PROMPT) - 1 : -1]
    assert alone[0] == [pick(row, Draw(1.3, 0.9, 11, position)) for position, row in enumerate(rows)]


def test_a_stop_token_or_the_models_own_end_is_the_last_token() -> None:
    model = tiny_model()
    with serving(model) as engine:
        free = ids(one(engine, PROMPT, max_tokens=20, temperature=0.0))
        stop = free[7]
        stopped = ids(one(engine, PROMPT, max_tokens=20, temperature=0.0, stop_token_ids=(VOCAB - 1, stop)))
    assert stopped == free[: free.index(stop) + 1]
    with serving(model, eos_token_ids=(stop,)) as engine:
        assert ids(one(engine, PROMPT, max_tokens=20, temperature=0.0)) == stopped


async def several_across_updates(engine: EmbeddedEngine, model: Any, prompts: list[list[int]]) -> tuple[Any, Any]:
    """Answers that span three updates, and the models of all versions."""
    history = {"0": frozen(model)}
    answers: list[list[Token]] = [[] for _ in prompts]

    async def read(prompt: list[int], answer: list[Token]) -> None:
        async for token in engine.generate(prompt, SamplingParams(max_tokens=60, seed=5)):
            answer.append(token)

    readers = [asyncio.create_task(read(*pair)) for pair in zip(prompts, answers, strict=True)]
    for step in (1, 2, 3):
        await until(lambda step=step: min(map(len, answers)) >= 12 * step)
        await asyncio.to_thread(update, engine, model, step)
        history[f"0+{step}"] = frozen(model)
    await asyncio.gather(*readers)
    return history, answers


def test_requests_in_flight_are_recomputed_under_the_new_weights() -> None:
    model = slow(tiny_model())
    prompts = [PROMPT, [5] * 70, [1]]
    with serving(model, max_batch_tokens=16) as engine:
        history, answers = asyncio.run(several_across_updates(engine, model, prompts))
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(tokens) == 60
        assert {token.version for token in tokens} == {"0", "0+1", "0+2", "0+3"}
        assert worst_error(history, prompt, tokens) < 1e-3


def test_without_recomputing_the_same_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "recompute", lambda _: 0)
    model = slow(tiny_model())
    with serving(model) as engine:
        history, answers = asyncio.run(several_across_updates(engine, model, [PROMPT]))
    assert worst_error(history, PROMPT, answers[0]) > 1e-2


def test_updates_that_change_nothing_change_no_draw() -> None:
    model = slow(tiny_model())
    with serving(model) as engine:
        params = {"max_tokens": 60, "seed": 8, "temperature": 1.5}
        undisturbed = ids(one(engine, PROMPT, **params))

        async def main() -> list[Token]:
            running = asyncio.create_task(collect(engine, PROMPT, SamplingParams(**params)))
            while not running.done():
                await asyncio.sleep(0.03)
                await asyncio.to_thread(update, engine, model, 1, size=0.0)
            return await running

        assert ids(asyncio.run(main())) == undisturbed


def test_a_prompt_computed_before_an_update_is_not_reused_after() -> None:
    model = tiny_model()
    prompt = [(3 * i) % VOCAB for i in range(200)]
    with serving(model) as engine:
        one(engine, prompt, max_tokens=5, seed=1)
        update(engine, model, 1)
        after = one(engine, prompt, max_tokens=5, seed=1)
    assert worst_error({"0+1": model}, prompt, after) < 1e-3


def test_many_updates_lose_double_or_fail_nothing() -> None:
    model = slow(tiny_model(), 0.002)
    with serving(model) as engine:
        updated, done = [], threading.Event()

        def learner() -> None:
            for step in range(1, 21):
                updated.append(update(engine, model, step))
                time.sleep(0.01)
            done.set()

        async def client(number: int) -> list[list[Token]]:
            answers = []
            while not done.is_set() or not answers:
                answers.append(await collect(engine, [number, 2], SamplingParams(max_tokens=37, seed=number)))
            return answers

        async def main() -> list[list[list[Token]]]:
            results = await asyncio.gather(asyncio.to_thread(learner), *(client(n) for n in range(8)))
            return results[1:]

        clients = asyncio.run(main())
        assert_idle(engine)
    order = ["0", *(f"0+{step}" for step in range(1, 21))]
    for answer in (answer for answers in clients for answer in answers):
        assert len(answer) == 37
        versions = [order.index(token.version) for token in answer]
        assert versions == sorted(versions)
    assert max(updated) > 1  # updates did meet running requests
