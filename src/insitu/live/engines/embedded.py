"""The serving engine inside this process: a Transformers model on continuous batching.

The parameters are views of memory that the learner, another process, writes. They are never copied nor packed: what the
learner writes is what the next forward reads. Hence the order of a change: pause, write, publish, resume.
"""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from insitu.live.engines import scoring
from insitu.live.engines.base import (
    Engine,
    EngineError,
    EngineInfo,
    PublishReport,
    RequestTooLongError,
    SamplingParams,
    Token,
)
from insitu.live.engines.batching import Batcher, Request
from insitu.live.engines.pausing import HeldPause

_MAX_TOP = 20
_DEFAULT_CACHE_TOKENS = 32768


class EmbeddedEngine(Engine):
    """Serves ``model``, a Transformers causal language model in eval mode whose parameters need no gradient.

    Args:
        model: the module to serve. It belongs to the engine from now on: do not call it.
        model_name, context_length, eos_token_ids: what :class:`EngineInfo` says. Generation ends at ``eos_token_ids`` and at
            a request's own ``stop_token_ids``.
        version: stamped on tokens until the first publish.
        max_requests: requests computed at once; more wait their turn.
        cache_tokens: room for keys and values, all requests together; memory is taken as it is used. At least the context
            length, which is also the default if 32768 or all requests together are less.
        max_batch_tokens: longest piece of a prompt in one forward. It bounds how long a pause has to wait.
    """

    def __init__(
        self,
        model: Any,
        *,
        model_name: str,
        context_length: int,
        eos_token_ids: Sequence[int],
        version: str = "0",
        max_requests: int = 8,
        cache_tokens: int | None = None,
        max_batch_tokens: int = 256,
    ) -> None:
        for name, value in (("context_length", context_length), ("max_requests", max_requests)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if cache_tokens is None:
            cache_tokens = max(context_length, min(_DEFAULT_CACHE_TOKENS, max_requests * context_length))
        if cache_tokens < context_length:
            raise ValueError(
                f"cache_tokens={cache_tokens} cannot hold one request of context_length={context_length}; raise it, or "
                "lower the context length"
            )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and context_length > positions:
            raise ValueError(f"context_length={context_length} is more than the {positions} positions the model knows")
        if model.training or any(p.requires_grad for p in model.parameters()):
            raise ValueError("the model must be in eval mode and its parameters must not require gradients")
        self.info = EngineInfo(model_name, context_length, tuple(eos_token_ids))
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._scorer = scoring.twin(model)  # before continuous batching touches the configuration
        self._score_lock = threading.Lock()
        self._batcher = Batcher(
            model,
            version=version,
            max_requests=max_requests,
            cache_tokens=cache_tokens,
            max_batch_tokens=max_batch_tokens,
        )
        self._control_lock = threading.Lock()  # guards the three below
        self._held: HeldPause | None = None
        self._started = False
        self._closed = threading.Event()

    def start(self) -> None:
        with self._control_lock:
            if self._started:
                raise RuntimeError("an engine starts once")
            self._batcher.start(self.info.context_length)
            self._started = True
        threading.Thread(target=self._close_with_main_thread, name="engine-guard", daemon=True).start()

    def close(self) -> None:
        with self._control_lock:
            if not self._started or self._closed.is_set():
                return
            self._closed.set()
            # First the requests, then the pause: the loop may make one more step, perhaps on half-written weights.
            self._batcher.fail_all("the engine was closed")
            self._release()
            self._batcher.stop("the engine was closed")

    def healthy(self) -> bool:
        return self._why_unhealthy() is None

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[Token, None]:
        # Checked here and not at the first token, so that a caller can still answer with an error status.
        self._check_ids("prompt", prompt_ids)
        if not 0 <= params.top_logprobs <= _MAX_TOP:
            raise ValueError(f"top_logprobs={params.top_logprobs} is not between 0 and {_MAX_TOP}")
        if params.max_tokens < 1:
            raise ValueError(f"max_tokens={params.max_tokens} must be at least 1")
        if not params.temperature >= 0 or not 0 < params.top_p <= 1:
            raise ValueError(
                f"temperature={params.temperature}, top_p={params.top_p}: expected temperature >= 0 and 0 < top_p <= 1"
            )
        over = len(prompt_ids) + params.max_tokens - self.info.context_length
        if over > 0:
            raise RequestTooLongError(
                f"{len(prompt_ids)} prompt tokens and max_tokens={params.max_tokens} are {over} more than the context of "
                f"{self.info.context_length} tokens"
            )
        return self._stream(list(prompt_ids), params)

    async def _stream(self, prompt_ids: list[int], params: SamplingParams) -> AsyncGenerator[Token, None]:
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Token | EngineError | None] = asyncio.Queue()

        def deliver(item: Token | EngineError | None) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, item)

        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = Request(params, (*params.stop_token_ids, *self.info.eos_token_ids), seed, deliver)
        if (reason := self._why_unhealthy()) is not None:
            raise EngineError(reason)
        self._batcher.submit(request, prompt_ids)
        try:
            while (item := await inbox.get()) is not None:
                if isinstance(item, EngineError):
                    raise item
                yield item
        finally:
            self._batcher.withdraw(request)

    def score(self, ids: Sequence[int], top: int = 0) -> list[Token]:
        self._check_ids("text", ids)
        if not 0 <= top <= _MAX_TOP:
            raise ValueError(f"top={top} is not between 0 and {_MAX_TOP}")
        over = len(ids) - self.info.context_length
        if over > 0:
            raise RequestTooLongError(
                f"{len(ids)} tokens are {over} more than the context of {self.info.context_length}"
            )
        with self._score_lock:
            return scoring.score(self._scorer, ids, top, self.version)

    def pause(self) -> None:
        with self._control_lock:
            if self._held is not None:
                raise RuntimeError("the engine is already paused")
            if (reason := self._why_unhealthy()) is not None:
                raise EngineError(reason)
            try:
                self._held = HeldPause(self._batcher.pause())
            except RuntimeError as error:
                raise EngineError(self._why_unhealthy() or str(error)) from error
            self._score_lock.acquire()  # until the pause ends: a score reads the weights too

    def publish(self, version: str) -> PublishReport:
        with self._control_lock:
            if self._held is None:
                raise RuntimeError("publish() outside a pause: call pause() before the weights are written")
            begin = time.perf_counter()
            recomputed = self._batcher.recompute()
            self._batcher.version = version
            return PublishReport(version, recomputed, time.perf_counter() - begin)

    def resume(self) -> None:
        with self._control_lock:
            if self._held is None:
                raise RuntimeError("resume() without a pause")
            self._release()

    @property
    def version(self) -> str:
        return self._batcher.version

    def _release(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._score_lock.release()
            held.release()

    def _why_unhealthy(self) -> str | None:
        if self._closed.is_set():
            return "the engine was closed"
        if not self._started:
            return "the engine was not started"
        return self._batcher.why_dead()

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        """A bad id would end the generation loop for everyone."""
        if not ids:
            raise ValueError(f"the {what} has no tokens")
        for token_id in ids:
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(f"token id {token_id} in the {what} is outside the vocabulary of {self._vocab_size}")

    def _close_with_main_thread(self) -> None:
        """The manager's thread is no daemon: if the main thread ended without close(), the process would never exit."""
        while not self._closed.wait(1.0):
            if not threading.main_thread().is_alive():
                self.close()
