"""The embedded engine on a tiny random Llama: what it says must be what the weights say, before and after they change."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.requests import RequestState

from insitu.live.engines.base import EngineError, RequestTooLongError, SamplingParams, Token
from insitu.live.engines.batching import Batcher
from insitu.live.engines.embedded import EmbeddedEngine
from insitu.live.engines.sampling import Draw, pick
from insitu.live.engines.scoring import twin

VOCAB = 160
CONTEXT = 256
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Wide enough that the context decides: with the default the logits hardly differ from one another.
        initializer_range=0.25,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        **changes,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def plain_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after every token of ``ids``, by a fresh fp32 model that has the weights of ``model``."""
    config = LlamaConfig(**{**model.config.to_dict(), "dtype": torch.float32}, attn_implementation="eager")
    fresh = LlamaForCausalLM(config).eval()
    fresh.load_state_dict({name: tensor.float().clone() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        return fresh(torch.tensor([list(ids)])).logits[0].log_softmax(-1)


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[EmbeddedEngine]:
    settings = {"context_length": CONTEXT, "eos_token_ids": (), **settings}
    engine = EmbeddedEngine(model, model_name="tiny", **settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


async def collect(engine: EmbeddedEngine, prompt: Sequence[int], params: SamplingParams) -> list[Token]:
    async with aclosing(engine.generate(prompt, params)) as stream:
        return [token async for token in stream]


def one(engine: EmbeddedEngine, prompt: Sequence[int], **params: Any) -> list[Token]:
    return asyncio.run(collect(engine, prompt, SamplingParams(**params)))


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


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


def perturb(model: Any, seed: int, size: float) -> None:
    """What the learner does: write the weights in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size)


def slow(model: Any, seconds: float = 0.004) -> Any:
    """Make each forward take a while, so that an update surely meets requests that are running."""
    model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def update(engine: EmbeddedEngine, model: Any, step: int, size: float = 0.05) -> int:
    engine.pause()
    perturb(model, step, size)
    recomputed = engine.publish(f"0+{step}").recomputed
    engine.resume()
    return recomputed


def worst_error(history: dict[str, Any], prompt: Sequence[int], tokens: Sequence[Token]) -> float:
    """Largest difference between reported log-probabilities and a fresh forward on the weights of each token's version."""
    text = [*prompt, *ids(tokens)]
    rows = {version: plain_logprobs(model, text) for version, model in history.items()}
    return max(
        abs(token.logprob - rows[token.version][len(prompt) - 1 + i, token.id].item()) for i, token in enumerate(tokens)
    )


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


def frozen(model: Any) -> Any:
    copy = tiny_model()
    copy.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return copy


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.002)


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


def test_a_client_that_hangs_up_frees_its_place() -> None:
    model = slow(tiny_model(), 0.02)  # an answer that is not stopped takes 4 s
    steps: list[None] = []
    model.register_forward_pre_hook(lambda *_: steps.append(None))
    with serving(model, max_requests=1) as engine:

        async def main() -> None:
            stream = engine.generate(PROMPT, SamplingParams(max_tokens=200))
            await anext(stream)
            await stream.aclose()
            task = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=200)))
            await asyncio.sleep(0.1)
            task.cancel()
            assert len(await collect(engine, PROMPT, SamplingParams(max_tokens=2))) == 2
            assert len(steps) < 100

        asyncio.run(main())
        assert_idle(engine)


def assert_idle(engine: EmbeddedEngine) -> None:
    """No request is left anywhere, and no cache is in use. Cancellations take a step or two to be obeyed."""
    scheduler = engine._batcher._manager.batch_processor.scheduler
    end = time.monotonic() + 2
    while scheduler.has_pending_requests() and time.monotonic() < end:
        time.sleep(0.01)
    engine.pause()
    assert not engine._batcher.requests
    assert not scheduler.active_requests
    assert not scheduler.waiting_requests
    assert engine.publish(engine.version).recomputed == 0
    engine.resume()


def test_a_cancellation_that_overtakes_its_request_still_ends_it() -> None:
    with serving(slow(tiny_model(), 0.02)) as engine:

        async def main() -> None:
            for _ in range(20):
                stream = engine.generate(PROMPT, SamplingParams(max_tokens=200))
                pending = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0)
                pending.cancel()
                await asyncio.wait([pending])
                await stream.aclose()

        asyncio.run(main())
        # The same, but surely so: the cancellation is read before the request is.
        manager = engine._batcher._manager
        manager.cancel_request("stray")
        time.sleep(0.3)
        manager.add_request(PROMPT, request_id="stray", max_new_tokens=200, streaming=True)
        end = time.monotonic() + 2
        while not manager.batch_processor.scheduler.has_pending_requests() and time.monotonic() < end:
            time.sleep(0.001)
        assert_idle(engine)
        assert manager.output_router.output_queue.empty()


def test_more_requests_than_places_wait_their_turn() -> None:
    with serving(tiny_model(), max_requests=2) as engine:

        async def main() -> list[list[Token]]:
            params = SamplingParams(max_tokens=10, temperature=0.0)
            return await asyncio.gather(*(collect(engine, [n, 5], params) for n in range(12)))

        assert [len(answer) for answer in asyncio.run(main())] == [10] * 12
        assert_idle(engine)


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


def test_a_pause_stops_generation_and_may_end_in_another_thread() -> None:
    with serving(slow(tiny_model())) as engine:

        async def main() -> None:
            answer: list[Token] = []

            async def read() -> None:
                async for token in engine.generate(PROMPT, SamplingParams(max_tokens=60)):
                    answer.append(token)

            running = asyncio.create_task(read())
            await until(lambda: len(answer) > 5)
            await in_thread(engine.pause)
            assert engine.healthy()
            await asyncio.sleep(0.02)
            reached = len(answer)
            late = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=3)))
            await asyncio.sleep(0.1)
            assert len(answer) == reached
            assert not late.done()
            await in_thread(engine.resume)
            await running
            assert len(answer) == 60
            assert len(await late) == 3

        asyncio.run(main())


async def in_thread(call: Callable[[], Any]) -> None:
    """Run ``call`` in a thread made for it, and gone after it."""
    thread = threading.Thread(target=call)
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.001)


def test_a_request_withdrawn_in_a_pause_does_not_come_back() -> None:
    with serving(slow(tiny_model(), 0.02)) as engine:

        async def main() -> None:
            streams = [engine.generate(PROMPT, SamplingParams(max_tokens=200)) for _ in range(3)]
            for stream in streams:
                await anext(stream)
            engine.pause()
            await streams[0].aclose()
            assert engine.publish("1").recomputed == 2
            await streams[1].aclose()
            engine.resume()
            for _ in range(5):
                token = await anext(streams[2])
            assert token.version == "1"
            await streams[2].aclose()

        asyncio.run(main())
        assert_idle(engine)


def test_control_calls_out_of_order_are_refused() -> None:
    engine = EmbeddedEngine(tiny_model(), model_name="tiny", context_length=CONTEXT, eos_token_ids=(), version="7")
    with pytest.raises(EngineError, match="not started"):
        engine.pause()
    engine.start()
    with pytest.raises(RuntimeError, match="starts once"):
        engine.start()
    with pytest.raises(RuntimeError, match="outside a pause"):
        engine.publish("8")
    with pytest.raises(RuntimeError, match="without a pause"):
        engine.resume()
    engine.pause()  # nothing is running: that must not make it wait
    with pytest.raises(RuntimeError, match="already paused"):
        engine.pause()
    assert engine.version == "7"
    assert engine.publish("8").recomputed == 0
    engine.resume()
    assert engine.version == "8"
    assert one(engine, PROMPT, max_tokens=1)[0].version == "8"
    engine.pause()
    engine.close()  # even now
    engine.close()
    assert not engine.healthy()
    with pytest.raises(EngineError, match="closed"):
        engine.pause()


def test_cache_that_survives_an_update_is_noticed() -> None:
    with serving(tiny_model()) as engine:
        engine.pause()
        state = RequestState("forgotten", PROMPT)
        cache = engine._batcher._manager.batch_processor.cache
        assert cache.can_store_request_tokens(state, len(PROMPT))
        with pytest.raises(EngineError, match=r"bytes of cache are still in use.*forgotten"):
            engine.publish("1")
        assert engine.version == "0"
        cache.free_blocks("forgotten")
        engine.publish("1")
        engine.resume()


def test_closing_ends_running_requests_with_an_error() -> None:
    with serving(slow(tiny_model())) as engine:

        async def main() -> None:
            stream = engine.generate(PROMPT, SamplingParams(max_tokens=200))
            await anext(stream)
            await asyncio.to_thread(engine.close)
            with pytest.raises(EngineError, match="closed"):
                [token async for token in stream]
            with pytest.raises(EngineError, match="closed"):
                await anext(engine.generate(PROMPT, SamplingParams(max_tokens=1)))

        asyncio.run(main())


def test_a_dead_generation_loop_is_noticed_by_all() -> None:
    model = tiny_model()
    with serving(slow(model)) as engine:

        async def main() -> None:
            streams = [engine.generate(PROMPT, SamplingParams(max_tokens=200)) for _ in range(3)]
            for stream in streams:
                await anext(stream)

            def explode(*_: Any) -> None:
                raise MemoryError("no room")

            model.register_forward_pre_hook(explode)
            for stream in streams:
                with pytest.raises(EngineError, match="no room"):
                    [token async for token in stream]
            assert not engine.healthy()
            with pytest.raises(EngineError, match="generation loop"):
                await anext(engine.generate(PROMPT, SamplingParams(max_tokens=1)))
            with pytest.raises(EngineError, match="generation loop"):
                engine.pause()

        asyncio.run(main())


def test_broken_weights_fail_the_request_and_not_the_engine() -> None:
    model = tiny_model()
    weight = model.model.norm.weight
    good = weight.clone()
    with serving(model) as engine:
        weight.fill_(torch.nan)
        with pytest.raises(EngineError, match="NaN"):
            one(engine, PROMPT, max_tokens=5)
        weight.copy_(good)
        assert len(one(engine, PROMPT, max_tokens=5)) == 5
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


def test_several_event_loops_and_one_that_closes_early() -> None:
    with serving(slow(tiny_model(), 0.02)) as engine:
        abandoned = asyncio.new_event_loop()
        stream = engine.generate(PROMPT, SamplingParams(max_tokens=200))
        abandoned.run_until_complete(anext(stream))
        answers = []
        threads = [
            threading.Thread(target=lambda n=n: answers.append(one(engine, [n], max_tokens=20))) for n in range(3)
        ]
        for thread in threads:
            thread.start()
        abandoned.close()
        for thread in threads:
            thread.join()
        assert [len(answer) for answer in answers] == [20] * 3
        assert engine.healthy()
        assert_idle(engine)


def test_score_is_a_plain_forward_beside_generation_and_waits_for_the_end_of_a_pause() -> None:
    model = tiny_model()
    text = [(11 * i) % VOCAB for i in range(60)]
    with serving(slow(model, 0.001)) as engine:

        async def main() -> list[Token]:
            running = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=100)))
            scored = [await asyncio.to_thread(engine.score, text, 3) for _ in range(5)][-1]
            assert len(await running) == 100
            return scored

        check_score(model, text, asyncio.run(main()), "0")
        engine.pause()
        with ThreadPoolExecutor(1) as other:
            asked = other.submit(engine.score, text, 3)
            with pytest.raises(TimeoutError):
                asked.result(timeout=0.3)
            perturb(model, 1, 0.05)
            engine.publish("1")
            engine.resume()
            check_score(model, text, asked.result(timeout=30), "1")


def check_score(model: Any, text: Sequence[int], scored: Sequence[Token], version: str) -> None:
    rows = plain_logprobs(model, text)
    assert ids(scored) == list(text[1:])
    for i, token in enumerate(scored):
        assert token.version == version
        assert token.logprob == pytest.approx(rows[i, token.id].item(), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(rows[i].topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scoring_in_bf16_equals_a_fresh_model_and_copies_no_weight(attention: str) -> None:
    model = tiny_model().bfloat16()
    model.set_attn_implementation(attention)
    fresh = frozen(model).bfloat16()
    fresh.set_attn_implementation(attention)
    text = [(11 * i) % VOCAB for i in range(60)]
    with serving(model) as engine:
        one(engine, PROMPT, max_tokens=3)
        served, scorer = dict(model.named_parameters()), dict(engine._scorer.named_parameters())
        assert served.keys() == scorer.keys()
        assert all(served[name].data_ptr() == scorer[name].data_ptr() for name in served)
        assert engine._scorer.config is not model.config
        scored = engine.score(text)
    with torch.no_grad():
        rows = fresh(torch.tensor([text])).logits[0].float().log_softmax(-1)
    assert [t.logprob for t in scored] == pytest.approx([rows[i, t.id].item() for i, t in enumerate(scored)], abs=1e-6)
