"""Transformers' continuous batching, with what a server over changing weights needs and it does not have.

Four things are added, each at a place where the manager lets itself be extended:

* :class:`_Sampler`, a logits processor, draws every token itself (per request: seed, temperature, top_p) and notes its
  log-probability under the raw logits. It leaves only the drawn token alive, so the manager's argmax takes it.
* :class:`_Router` hands each token to its own request on that request's event loop.
* :class:`_Scheduler` can drop everything computed from old weights.
* :class:`Batcher` sizes the cache: the manager's default is a share of all memory.

Written against Transformers 5.23. Everything here that runs in the manager's thread says so.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.logits_process import LogitsProcessorList

from insitu.live.engines.base import EngineError, SamplingParams, Token
from insitu.live.engines.sampling import Draw, describe, pick

_PAGE_TOKENS = 64  # the cache is given out in pages of this many tokens


@dataclass(slots=True, eq=False)
class Request:
    """One request in the batch. ``deliver`` takes its tokens, then None; or an error. It may be called from any thread."""

    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    seed: int
    deliver: Callable[[Token | EngineError | None], None]
    id: str = ""  # given by Batcher.submit
    position: int = 0  # tokens drawn so far; goes on counting when the cache is recomputed
    drawn: Token | None = None  # drawn in the running step, not yet delivered


class _Sampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Draws the next token of every request in the batch. Runs in the manager's thread."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 (declared so by the base class)
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, batcher: "Batcher") -> None:
        self._batcher = batcher
        self._rows: list[Request | None] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Called just before the forward, with the requests in the order of their rows."""
        requests = self._batcher.requests
        self._rows = [requests.get(future.state.request_id) for future in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        # Rows after these belong to requests in the middle of their prompt: padding that nobody reads.
        logits = scores[: len(self._rows)]
        if not self._rows:
            return scores
        # A request that was withdrawn in this step still has a row; what it gets goes nowhere.
        chosen = [pick(row, _draw(request)) for row, request in zip(logits, self._rows, strict=True)]
        num_top = [request.params.top_logprobs if request else 0 for request in self._rows]
        described = describe(logits, chosen, num_top)
        for request, scored in zip(self._rows, described, strict=True):
            if request is not None:
                request.drawn = Token(*scored, self._batcher.version)
                request.position += 1
        only_chosen = torch.full_like(scores, -torch.inf)
        only_chosen[range(len(chosen)), chosen] = 0.0
        return only_chosen


class _Router(OutputRouter):  # type: ignore[misc]
    """Delivers what a step produced. Runs in the manager's thread.

    The manager's own router would do for one event loop that never closes. It sends a whole batch to the loop of whichever
    request comes last, a closed loop ends its thread, and what arrives after a request was withdrawn stays in a queue.
    """

    def __init__(self, batcher: "Batcher") -> None:
        super().__init__()
        self._batcher = batcher

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.deliver(output)

    def deliver(self, output: Any) -> None:
        request = self._batcher.requests.get(output.request_id)
        if request is None:
            # Withdrawn. The manager forgets a cancellation that overtakes its request between two looks at its queues.
            if not output.is_finished():
                self._batcher.cancel(output.request_id)
            return
        if output.error is not None:
            self.end(request, EngineError(f"generation failed: {output.error}"))
            return
        token, request.drawn = request.drawn, None
        # Rows are matched to requests by order. If this ever breaks, answers would go to the wrong clients: stop instead.
        assert token is not None, f"no token was drawn for {request.id}"
        assert token.id == output.generated_tokens[-1], f"{request.id} was given a token drawn for another request"
        if math.isnan(token.logprob):
            self.end(request, EngineError(f"the model of version {token.version} gives no probabilities (NaN)"))
            self._batcher.cancel(request.id)
            return
        self._send(request, token)
        if output.is_finished():
            self.end(request, None)

    def end(self, request: Request, last: EngineError | None) -> None:
        if self._batcher.requests.pop(request.id, None) is not None:
            self._send(request, last)

    def _send(self, request: Request, item: Token | EngineError | None) -> None:
        try:
            request.deliver(item)
        except RuntimeError:  # its event loop is closed: nobody is left to read it
            self._batcher.withdraw(request)


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """First come, first served, and able to start all running requests anew."""

    def clear_cancelled_requests(self) -> Any:
        """Runs in the manager's thread.

        When the cache runs full the manager puts requests back and admits none until one *finishes*. If those that run are
        cancelled instead, it would wait for ever (Transformers 5.23). Delete when it lifts the block here itself.
        """
        cancelled = super().clear_cancelled_requests()
        if not self.active_requests:
            self.block_new_requests = False
        return cancelled

    def recompute(self, wanted: Callable[[str], bool]) -> int:
        """Drop the cache of all running requests and queue the wanted ones again, first in line and in their order, as
        prompt + tokens so far. Only inside a pause. Returns how many were queued again."""
        running = list(self.active_requests.values())
        kept = [state for state in running if wanted(state.request_id)]
        for state in running:
            self.finish_request(state.request_id)  # frees its cache
        for state in reversed(kept):
            self.waiting_requests[state.request_id] = state.create_equivalent_initial_request()
            self.waiting_requests_order.appendleft(state.request_id)
        self.block_new_requests = False
        return len(kept)


SCHEDULER_MAPPING["insitu"] = _Scheduler


class Batcher:
    """The manager's thread, the requests in it, and the version that stamps their tokens."""

    def __init__(
        self, model: Any, *, version: str, max_requests: int, cache_tokens: int, max_batch_tokens: int
    ) -> None:
        self.version = version
        self.requests: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._manager = model.init_continuous_batching(
            # eos_token_id=-1: each request brings its own stop tokens. do_sample=False: see _Sampler.
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE_TOKENS,
                num_blocks=math.ceil(cache_tokens / _PAGE_TOKENS),
                max_batch_tokens=max(max_batch_tokens, max_requests),
                max_requests_per_batch=max_requests,
                max_blocks_per_request=0,
                allow_block_sharing=False,  # else a prefix computed from old weights could be found and used again
                use_async_batching=False,  # in a pause no step may be half done
                use_cuda_graph=False,
                auto_switch_to_flash=False,
                scheduler_type="insitu",
                seed=0,  # the manager seeds torch with it; our draws do not use torch's generators
            ),
        )
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Sampler(self)]))
        processors.tensors_required = 1
        self._manager.logit_processor = processors
        self._manager.output_router = _Router(self)

    def start(self, context_length: int) -> None:
        """Start the manager's thread and wait until its cache is there."""
        self._manager.start()
        try:
            with self._manager.pause():
                longest = infer_max_single_request_tokens(self._cache)
        except RuntimeError as error:
            raise EngineError(
                f"generation did not start: {self._manager.background_thread_status.fatal_error}"
            ) from error
        if longest < context_length:
            self.stop("the cache is too small")
            raise ValueError(
                f"the cache holds {longest} tokens of one request, less than the context of {context_length}"
            )

    def stop(self, reason: str) -> None:
        """End the thread; what still runs gets an :class:`EngineError`. Not inside a pause."""
        self.fail_all(reason)
        self._manager.stop(block=True, hard_stop=True)

    def fail_all(self, reason: str) -> None:
        for request in list(self.requests.values()):
            self._manager.output_router.end(request, EngineError(reason))

    def why_dead(self) -> str | None:
        """None while requests are accepted."""
        if (fatal := self._manager.background_thread_status.fatal_error) is not None:
            return f"the generation loop died: {fatal}"
        if (
            not self._manager.is_running()
            or self._manager.background_thread_status.can_accept_new_requests() is not None
        ):
            return "the generation loop is not running"
        return None

    def submit(self, request: Request, prompt_ids: Sequence[int]) -> None:
        request.id = f"request-{next(self._numbers)}"
        self.requests[request.id] = request
        self._manager.add_request(
            list(prompt_ids),
            request_id=request.id,
            max_new_tokens=request.params.max_tokens,
            streaming=True,
            eos_token_id=list(request.stop_token_ids),
        )
        # Asked after adding: a loop that dies fails what is queued, then nobody reads the queue any more.
        if (reason := self.why_dead()) is not None:
            self.requests.pop(request.id, None)
            raise EngineError(reason)

    def withdraw(self, request: Request) -> None:
        """End a request that nobody waits for any more. Nothing happens if it has ended."""
        if self.requests.pop(request.id, None) is not None:
            self.cancel(request.id)

    def cancel(self, request_id: str) -> None:
        self._manager.cancel_request(request_id)

    def pause(self) -> AbstractContextManager[None]:
        """While it is held no forward runs. To be entered and left in the same thread."""
        context: AbstractContextManager[None] = self._manager.pause()
        return context

    def recompute(self) -> int:
        """Inside a pause: leave nothing in the cache, and let the running requests begin again where they are.

        Requests that only wait have nothing in the cache, those that the manager has taken from its queue but not looked at
        when it paused included.
        """
        recomputed: int = self._manager.batch_processor.scheduler.recompute(self.requests.__contains__)
        cache = self._cache
        in_use = cache.num_sectors * cache.bytes_per_sector - cache.compute_free_capacity(relative=False)
        owners = [owner for allocator in cache.cache_allocators.values() for owner in allocator.block_table]
        if in_use or owners:
            raise EngineError(f"{in_use} bytes of cache are still in use after all was dropped, by {owners}")
        return recomputed

    @property
    def _cache(self) -> Any:
        return self._manager.batch_processor.cache


def _draw(request: Request | None) -> Draw:
    if request is None:
        return Draw(0.0, 1.0, 0, 0)
    return Draw(request.params.temperature, request.params.top_p, request.seed, request.position)
