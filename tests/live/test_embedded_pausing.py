"""The control calls of the embedded engine: nothing runs in a pause, nothing outlives a publish, and the order is kept."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tiny_engine import CONTEXT, PROMPT, assert_idle, collect, one, serving, slow, tiny_model, until
from transformers.generation.continuous_batching.requests import RequestState

from insitu.live.engines.base import EngineError, SamplingParams, Token
from insitu.live.engines.embedded import EmbeddedEngine


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
