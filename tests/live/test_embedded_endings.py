"""Requests of the embedded engine that end early: by the client, by close, by a failure. Nothing of them may be left behind."""

import asyncio
import threading
import time
from typing import Any

import pytest
import torch
from tiny_engine import PROMPT, assert_idle, collect, one, serving, slow, tiny_model

from insitu.live.engines.base import EngineError, SamplingParams


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
