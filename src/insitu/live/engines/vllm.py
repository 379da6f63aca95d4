"""vLLM as a serving engine: the same interface as the embedded one, over the client that vLLM's API server has of its engine.

vLLM's own routes answer the clients. What is here is the other half: the safe moment to write, and what the learner asks.
Calls come from other threads and run on the API server's event loop.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from insitu.live.engines.base import (
    Engine,
    EngineError,
    EngineInfo,
    PublishReport,
    RequestTooLongError,
    SamplingParams,
    Token,
)

_T = TypeVar("_T")
_TIMEOUT = 120.0  # seconds for anything that does not generate; a pause waits for the forward that is running


class Weights(Protocol):
    """vLLM's worker, as far as a publish needs it: see :class:`insitu.live.vllm_plugin.worker.WeightClient`."""

    def refresh(self) -> int: ...


class VLLMEngine(Engine):
    """``info`` is known at once; everything else after :meth:`bind`."""

    def __init__(self, info: EngineInfo, version: str) -> None:
        self.info = info
        self._version = version
        self._client: Any = None
        self._weights: Weights | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._paused = False

    async def bind(self, client: Any, weights: Weights) -> None:
        """Run on the API server's event loop, which ``client`` (vLLM's EngineClient) belongs to."""
        self._client, self._weights, self._loop = client, weights, asyncio.get_running_loop()
        await client.update_weight_version(self._version)

    def start(self) -> None:
        """vLLM starts itself."""

    def close(self) -> None:
        """vLLM ends itself."""

    def healthy(self) -> bool:
        return self._client is not None and not self._client.errored

    @property
    def version(self) -> str:
        return self._version

    # -- the safe moment -----------------------------------------------------------------------------------------------
    def pause(self) -> None:
        if self._paused:
            raise RuntimeError("the engine is already paused")
        try:
            self._run(self._client.pause_generation(mode="keep", clear_cache=False))
        except TimeoutError as error:
            self._run(self._client.resume_generation())  # it may still come to pause, and nobody would end it
            raise EngineError(f"vLLM did not pause within {_TIMEOUT:.0f} s") from error
        self._paused = True

    def publish(self, version: str) -> PublishReport:
        if not self._paused:
            raise RuntimeError("publish() outside a pause: call pause() before the weights are written")
        assert self._weights is not None
        begin = time.perf_counter()
        self._weights.refresh()
        self._run(self._forget(version))
        self._version = version
        return PublishReport(version, 0, time.perf_counter() - begin)

    async def _forget(self, version: str) -> None:
        """Drop every cache of something computed from weights. Running requests are prefilled again when they go on."""
        if not await self._client.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise EngineError("vLLM could not reset its prefix cache: answers would mix old and new weights")
        if self._client.model_config.is_multimodal_model:
            await self._client.reset_mm_cache()
            await self._client.reset_encoder_cache()
        await self._client.update_weight_version(version)

    def resume(self) -> None:
        if not self._paused:
            raise RuntimeError("resume() without a pause")
        self._run(self._client.resume_generation())
        self._paused = False

    # -- what the learner asks -----------------------------------------------------------------------------------------
    def score(self, ids: Sequence[int], top: int = 0) -> list[Token]:
        if len(ids) >= self.info.context_length:
            raise RequestTooLongError(
                f"{len(ids)} tokens and one more do not fit a context of {self.info.context_length}"
            )
        return self._run(self._score(list(ids), top))

    async def _score(self, ids: list[int], top: int) -> list[Token]:
        from vllm import SamplingParams as Params

        # A prompt whose log-probabilities are asked for is computed whole, whatever the prefix cache holds.
        params = Params(max_tokens=1, temperature=0.0, prompt_logprobs=top)
        final = await self._last(ids, params)
        scored = []
        for wanted, row in zip(ids[1:], final.prompt_logprobs[1:], strict=True):
            best = sorted(row.items(), key=lambda item: item[1].rank or math.inf)[:top]
            scored.append(
                Token(wanted, row[wanted].logprob, tuple((id, found.logprob) for id, found in best), self._version)
            )
        return scored

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[Token, None]:
        """Tokens all at once, when the reply is whole: the learner needs no stream."""
        over = len(prompt_ids) + params.max_tokens - self.info.context_length
        if over > 0:
            raise RequestTooLongError(
                f"{len(prompt_ids)} prompt tokens and max_tokens={params.max_tokens} are {over} more than the context of "
                f"{self.info.context_length} tokens"
            )
        return self._reply(list(prompt_ids), params)

    async def _reply(self, prompt_ids: list[int], params: SamplingParams) -> AsyncGenerator[Token, None]:
        from vllm import SamplingParams as Params

        asked = Params(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            seed=params.seed,
            logprobs=params.top_logprobs,
            stop_token_ids=list(params.stop_token_ids),
        )
        assert self._loop is not None
        # The caller may run a loop of its own, in another thread.
        running = asyncio.run_coroutine_threadsafe(self._last(prompt_ids, asked), self._loop)
        final = await asyncio.wrap_future(running)
        reply = final.outputs[0]
        versions = [span.version for span in reply.weight_versions or () for _ in range(span.start, span.end)]
        for at, (id, row) in enumerate(zip(reply.token_ids, reply.logprobs, strict=True)):
            best = sorted(row.items(), key=lambda item: item[1].rank or math.inf)[: params.top_logprobs]
            version = versions[at] if at < len(versions) else self._version
            yield Token(id, row[id].logprob, tuple((other, found.logprob) for other, found in best), version)

    async def _last(self, prompt_ids: list[int], params: Any) -> Any:
        """The final output of a request of our own."""
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.FINAL_ONLY
        final: Any = None
        prompt = TokensPrompt(prompt_token_ids=prompt_ids)
        async with aclosing(self._client.generate(prompt, params, f"insitu-{uuid4().hex}")) as outputs:
            async for final in outputs:  # noqa: B007 - the last one is wanted
                pass
        if final is None:
            raise EngineError("vLLM ended a request without an answer")
        return final

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """``work`` on the event loop, from another thread."""
        if self._loop is None or self._client.errored:
            work.close()
            raise EngineError("vLLM's engine has died")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_TIMEOUT)
