"""``POST /v1/chat/completions``: the conversation goes through the model's chat template; the answer can be corrected later."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from insitu.data.chat import encode_prompt
from insitu.live.api import stream
from insitu.live.api.auth import Caller, caller_of
from insitu.live.api.errors import ApiError
from insitu.live.api.generation import Answer, Piece, TextToken, begin
from insitu.live.api.schema import ChatRequest
from insitu.live.api.serving import Serving, check_stream_options, finite, usage, version_header, wants_usage
from insitu.live.engines.base import SamplingParams

# A chat client that names no limit gets this much, or what the context has left.
DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class _Turn:
    """One request, checked and encoded."""

    id: str
    created: int
    request: ChatRequest
    messages: list[dict[str, Any]]
    prompt_ids: list[int]
    params: SamplingParams
    caller: Caller


def chat_router(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(
        request: Request, body: ChatRequest, caller: Annotated[Caller, Depends(caller_of(serving.keys))]
    ) -> Response:
        turn = await _prepare(serving, body, caller)
        work = _stream(serving, turn) if body.stream else _complete(serving, turn)
        return await stream.answer(request, work)

    return router


async def _prepare(serving: Serving, request: ChatRequest, caller: Caller) -> _Turn:
    serving.check_model(request.model)
    check_stream_options(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs", code="invalid_value")
    messages = [message.plain() for message in request.messages]
    prompt_ids = await serving.tokenize(encode_prompt, serving.tokenizer, messages)
    max_tokens = _max_tokens(request)
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, serving.engine.info.context_length - len(prompt_ids)))
    serving.check_room(len(prompt_ids), max_tokens, "messages")
    params = serving.sampling(request, max_tokens, request.top_logprobs or 0)
    id = f"chatcmpl-{uuid.uuid4().hex}"
    return _Turn(id, int(time.time()), request, messages, prompt_ids, params, caller)


def _max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ; send one", param="max_tokens", code="invalid_value"
        )
    return old if new is None else new


async def _complete(serving: Serving, turn: _Turn) -> Response:
    answer = Answer()
    tokens: list[TextToken] = []
    async with aclosing(_pieces(serving, turn, answer)) as pieces:
        async for piece in pieces:
            tokens += piece.tokens
    await serving.remember(turn.id, turn.caller.key, turn.messages, answer)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": _logprobs(serving, turn, tokens),
        "finish_reason": answer.finish_reason,
    }
    body = {
        **_head(serving, turn, "chat.completion"),
        "choices": [choice],
        "usage": usage(len(turn.prompt_ids), answer),
        "weight_versions": answer.versions,
    }
    return JSONResponse(body, headers=version_header(answer.versions))


async def _stream(serving: Serving, turn: _Turn) -> Response:
    answer = Answer()
    pieces = _pieces(serving, turn, answer)
    first = await begin(pieces)
    events = _events(serving, turn, answer, pieces, first)
    return stream.EventStream(events, pieces, version_header(answer.versions[:1]))


async def _events(
    serving: Serving, turn: _Turn, answer: Answer, pieces: AsyncGenerator[Piece], first: Piece | None
) -> AsyncGenerator[dict[str, Any]]:
    head = _head(serving, turn, "chat.completion.chunk")
    with_usage = wants_usage(turn.request)
    if with_usage:
        head["usage"] = None

    def chunk(delta: dict[str, Any], tokens: list[TextToken], finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = _logprobs(serving, turn, tokens)
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]}

    try:
        async with aclosing(pieces):
            yield chunk({"role": "assistant", "content": ""}, [])
            if first is not None:
                if first.text or first.tokens:
                    yield chunk({"content": first.text}, first.tokens)
                async for piece in pieces:
                    yield chunk({"content": piece.text}, piece.tokens)
    finally:
        # Before the last chunk, so that a correction finds it; also when the user has seen enough and hung up.
        await serving.remember(turn.id, turn.caller.key, turn.messages, answer)
    yield {**chunk({}, [], answer.finish_reason), "weight_versions": answer.versions}
    if with_usage:
        used = usage(len(turn.prompt_ids), answer)
        yield {**head, "choices": [], "usage": used, "weight_versions": answer.versions}


def _pieces(serving: Serving, turn: _Turn, answer: Answer) -> AsyncGenerator[Piece]:
    return answer.pieces(serving.engine, serving.detokenizer, turn.prompt_ids, turn.params, turn.request.stop or ())


def _head(serving: Serving, turn: _Turn, kind: str) -> dict[str, Any]:
    return {"id": turn.id, "object": kind, "created": turn.created, "model": serving.engine.info.model_name}


def _logprobs(serving: Serving, turn: _Turn, tokens: list[TextToken]) -> dict[str, Any] | None:
    if not turn.request.logprobs:
        return None
    content = []
    for item in tokens:
        token = item.token
        alternatives = [_token(serving, id, logprob) for id, logprob in token.top[: turn.params.top_logprobs]]
        content.append({**_token(serving, token.id, token.logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def _token(serving: Serving, id: int, logprob: float) -> dict[str, Any]:
    raw = serving.detokenizer.bytes_of(id)
    return {"token": serving.detokenizer.label(id), "logprob": finite(logprob), "bytes": list(raw)}
