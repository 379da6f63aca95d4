"""What every completion route needs at hand, and the checks that the two kinds of completion share."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

from insitu.live.api.detokenize import Detokenizer
from insitu.live.api.errors import ApiError
from insitu.live.api.generation import Answer
from insitu.live.api.limits import Limits
from insitu.live.api.service import LiveService
from insitu.live.engines.base import Engine, SamplingParams, Token
from insitu.live.keys import Keys
from insitu.live.records import Completion

_LOG = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")

VERSION_HEADER = "x-weight-version"


@dataclass(frozen=True, slots=True)
class Serving:
    """The parts of a running server. ``created`` is when it began, in Unix seconds."""

    engine: Engine
    service: LiveService
    tokenizer: Any
    detokenizer: Detokenizer
    keys: Keys
    created: int
    limits: Limits = field(default_factory=Limits)
    # Threads of their own: requests that wait for these two must not use up the threads that the store needs.
    _encoding: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    _scoring: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))

    async def tokenize(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run something that uses the tokenizer in a thread (a large body takes a while), one at a time: tokenizers are not
        safe to share."""
        return await to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._encoding)

    async def score(self, ids: Sequence[int], top: int) -> list[Token]:
        return await to_thread.run_sync(self.engine.score, ids, top, limiter=self._scoring)

    def check_model(self, model: str) -> None:
        served = self.engine.info.model_name
        if model != served:
            raise ApiError(
                404,
                f"the model {model!r} is not served here; this is {served!r}",
                param="model",
                code="model_not_found",
            )

    def check_room(self, num_prompt: int, max_tokens: int, prompt: str) -> None:
        """``prompt`` names the parameter that the prompt came from."""
        room = self.engine.info.context_length
        if num_prompt + max_tokens <= room:
            return
        raise ApiError(
            400,
            f"the context holds {room} tokens; {prompt} has {num_prompt} and max_tokens asks for {max_tokens} more",
            param=prompt if num_prompt >= room else "max_tokens",
            code="context_length_exceeded",
        )

    def sampling(self, request: Any, max_tokens: int, top_logprobs: int) -> SamplingParams:
        ends = {*self.engine.info.eos_token_ids}
        if self.tokenizer.eos_token_id is not None:
            ends.add(self.tokenizer.eos_token_id)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else float(request.temperature),
            top_p=1.0 if request.top_p is None else float(request.top_p),
            seed=request.seed,
            top_logprobs=top_logprobs,
            stop_token_ids=tuple(sorted(ends)),
        )

    async def remember(self, id: str, key: str, messages: list[dict[str, Any]], answer: Answer) -> None:
        """Keep the answer so that a correction can name it. An answer is not withheld because that failed."""
        completion = Completion(id, key, messages, answer.text, ",".join(answer.versions))
        try:
            await self.service.add_completion(completion)
        except Exception:
            _LOG.exception("completion %s was answered but not stored: it cannot be corrected", id)


def check_stream_options(request: Any) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options", code="invalid_value")


def wants_usage(request: Any) -> bool:
    """Whether a stream ends with a chunk that has the usage and no choice; every other chunk then says ``usage: null``."""
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def usage(num_prompt: int, answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": answer.num_tokens,
        "total_tokens": num_prompt + answer.num_tokens,
    }


def finite(logprob: float) -> float:
    """JSON has no infinities; -9999.0 is what OpenAI sends for "as good as impossible"."""
    return logprob if logprob > -9999.0 else -9999.0


def version_header(versions: list[str]) -> dict[str, str]:
    return {VERSION_HEADER: ",".join(versions)}
