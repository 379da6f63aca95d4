"""``POST /v1/completions``: raw text or token ids in, no chat template. With ``echo`` and ``logprobs`` it scores a given text,
as evaluation harnesses ask."""

import itertools
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from insitu.live.api import stream
from insitu.live.api.auth import Caller, caller_of
from insitu.live.api.errors import ApiError
from insitu.live.api.generation import Answer, Piece, TextToken, begin
from insitu.live.api.schema import CompletionRequest
from insitu.live.api.serving import Serving, check_stream_options, finite, usage, version_header, wants_usage
from insitu.live.engines.base import SamplingParams, Token

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class _Job:
    """One request, checked and encoded. ``added`` is how many tokens the tokenizer put before the text (BOS)."""

    id: str
    created: int
    request: CompletionRequest
    prompt_ids: list[int]
    added: int
    params: SamplingParams
    caller: Caller


@dataclass(frozen=True, slots=True)
class _Shown:
    """A token with its place in the text; ``logprob`` is None where nothing comes before it."""

    id: int
    offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def completions_router(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(
        request: Request, body: CompletionRequest, caller: Annotated[Caller, Depends(caller_of(serving.keys))]
    ) -> Response:
        job = await _prepare(serving, body, caller)
        work = _stream(serving, job) if body.stream else _complete(serving, job)
        return await stream.answer(request, work)

    return router


async def _prepare(serving: Serving, request: CompletionRequest, caller: Caller) -> _Job:
    serving.check_model(request.model)
    check_stream_options(request)
    prompt_ids, added = await serving.tokenize(_encode, serving, request.prompt)
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens=0 asks for nothing unless echo=true", param="max_tokens", code="invalid_value")
    serving.check_room(len(prompt_ids), max_tokens, "prompt")
    params = serving.sampling(request, max_tokens, request.logprobs or 0)
    return _Job(f"cmpl-{uuid.uuid4().hex}", int(time.time()), request, prompt_ids, added, params, caller)


def _encode(serving: Serving, prompt: str | list[int] | list[str] | list[list[int]]) -> tuple[list[int], int]:
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise ApiError(400, "send one prompt a request", param="prompt", code="unsupported_value")
        prompt = prompt[0]
    added = 0
    if isinstance(prompt, str):
        ids: list[int] = serving.tokenizer(prompt)["input_ids"]
        alone = zip(ids, serving.tokenizer("")["input_ids"], strict=False)
        added = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], alone))
    else:
        ids = [id for id in prompt if isinstance(id, int)]
        for i, id in enumerate(ids):
            if not 0 <= id < serving.detokenizer.vocab_size:
                message = f"prompt[{i}]={id} is no token id; expected 0 to {serving.detokenizer.vocab_size - 1}"
                raise ApiError(400, message, param=f"prompt[{i}]", code="invalid_value")
    if not ids:
        raise ApiError(
            400, "prompt is empty; the first token needs one before it", param="prompt", code="invalid_value"
        )
    return ids, added


async def _complete(serving: Serving, job: _Job) -> Response:
    answer = Answer()
    echoed, shown = await _echo(serving, job, answer)
    async with aclosing(_pieces(serving, job, answer)) as pieces:
        async for piece in pieces:
            shown += _generated(piece.tokens, len(echoed))
    await serving.remember(job.id, job.caller.key, [], answer)
    choice = _choice(serving, job, echoed + answer.text, shown, answer.finish_reason)
    body = {
        **_head(serving, job),
        "choices": [choice],
        "usage": usage(len(job.prompt_ids), answer),
        "weight_versions": answer.versions,
    }
    return JSONResponse(body, headers=version_header(answer.versions))


async def _stream(serving: Serving, job: _Job) -> Response:
    answer = Answer()
    echoed, shown = await _echo(serving, job, answer)
    pieces = _pieces(serving, job, answer)
    first = await begin(pieces)
    events = _events(serving, job, answer, (echoed, shown), pieces, first)
    return stream.EventStream(events, pieces, version_header(answer.versions[:1]))


async def _events(
    serving: Serving,
    job: _Job,
    answer: Answer,
    echo: tuple[str, list[_Shown]],
    pieces: AsyncGenerator[Piece],
    first: Piece | None,
) -> AsyncGenerator[dict[str, Any]]:
    head = _head(serving, job)
    with_usage = wants_usage(job.request)
    if with_usage:
        head["usage"] = None
    echoed, shown = echo
    try:
        async with aclosing(pieces):
            if echoed:
                yield {**head, "choices": [_choice(serving, job, echoed, shown, None)]}
            if first is not None and (first.text or first.tokens):
                yield {**head, "choices": [_piece(serving, job, first, len(echoed))]}
            async for piece in pieces:
                yield {**head, "choices": [_piece(serving, job, piece, len(echoed))]}
    finally:
        await serving.remember(job.id, job.caller.key, [], answer)
    last = _choice(serving, job, "", [], answer.finish_reason)
    yield {**head, "choices": [last], "weight_versions": answer.versions}
    if with_usage:
        used = usage(len(job.prompt_ids), answer)
        yield {**head, "choices": [], "usage": used, "weight_versions": answer.versions}


async def _pieces(serving: Serving, job: _Job, answer: Answer) -> AsyncGenerator[Piece]:
    if job.params.max_tokens == 0:  # only the echo is wanted
        answer.finish_reason = "length"
        answer.used(serving.engine.version)
        return
    stops = job.request.stop or ()
    async with aclosing(
        answer.pieces(serving.engine, serving.detokenizer, job.prompt_ids, job.params, stops)
    ) as pieces:
        async for piece in pieces:
            yield piece


async def _echo(serving: Serving, job: _Job, answer: Answer) -> tuple[str, list[_Shown]]:
    """The prompt's own text and tokens, scored if logprobs are asked for."""
    if not job.request.echo:
        return "", []
    scored: list[Token] = []
    if job.request.logprobs is not None:
        scored = await serving.score(job.prompt_ids, job.request.logprobs)
        for token in scored:
            answer.used(token.version)
    decoder = serving.detokenizer.decoder(show_special=True)
    text, shown = "", []
    for i, id in enumerate(job.prompt_ids):
        offset = len(text)
        if i >= job.added:
            text += decoder.push(id)
        known = scored[i - 1] if i and scored else None
        shown.append(_Shown(id, offset, known.logprob if known else None, known.top if known else ()))
    return text + decoder.flush(), shown


def _generated(tokens: list[TextToken], start: int) -> list[_Shown]:
    return [_Shown(t.token.id, start + t.offset, t.token.logprob, t.token.top) for t in tokens]


def _piece(serving: Serving, job: _Job, piece: Piece, start: int) -> dict[str, Any]:
    return _choice(serving, job, piece.text, _generated(piece.tokens, start), None)


def _choice(serving: Serving, job: _Job, text: str, shown: list[_Shown], finish_reason: str | None) -> dict[str, Any]:
    logprobs = None if job.request.logprobs is None else _logprobs(serving, shown, job.request.logprobs)
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(serving: Serving, shown: list[_Shown], num_top: int) -> dict[str, Any]:
    label = serving.detokenizer.label
    tops: list[dict[str, float] | None] = []
    for item in shown:
        if item.logprob is None:
            tops.append(None)
            continue
        top = {label(id): finite(logprob) for id, logprob in item.top[:num_top]}
        # OpenAI's promise: the token itself is always among them, as one more if it is not one of the best.
        top.setdefault(label(item.id), finite(item.logprob))
        tops.append(top)
    return {
        "tokens": [label(item.id) for item in shown],
        "token_logprobs": [None if item.logprob is None else finite(item.logprob) for item in shown],
        "top_logprobs": tops,
        "text_offset": [item.offset for item in shown],
    }


def _head(serving: Serving, job: _Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": serving.engine.info.model_name,
    }
