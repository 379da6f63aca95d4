"""``/v1/feedback``: what the model is to learn. Checked in full when it is posted, so that nothing fails later in the queue."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from insitu.data.chat import encode_continuation, encode_messages
from insitu.data.messages import DataError, check_messages
from insitu.live.api.auth import Caller, learn_key
from insitu.live.api.errors import ApiError
from insitu.live.api.schema import Correction, FeedbackRequest, Nothing, as_list, as_text
from insitu.live.api.serving import Serving
from insitu.live.records import Feedback, FeedbackKind, FeedbackStatus, IdInUseError, QueueFullError, WrongStatusError


def feedback_router(serving: Serving) -> APIRouter:
    router = APIRouter()
    service = serving.service
    caller_of = learn_key(serving.keys)
    may_learn = [Depends(caller_of)]

    @router.post("/v1/feedback", status_code=202)
    async def create_feedback(body: FeedbackRequest, caller: Annotated[Caller, Depends(caller_of)]) -> Response:
        """202 when it was queued or held, 200 when it was known already: a client may repeat a post whose answer was lost."""
        serving.limits.admit()
        kind, payload = await _payload(serving, body, caller)
        try:
            item, is_new = await service.add_feedback(
                kind, payload, body.id, hold=bool(body.hold), max_queue=serving.limits.max_queue
            )
        except IdInUseError as error:
            raise ApiError(409, str(error), param="id", code="id_in_use") from error
        except QueueFullError as error:
            raise serving.limits.full(error) from error
        return JSONResponse(describe(item), 202 if is_new else 200)

    @router.get("/v1/feedback", dependencies=may_learn)
    async def list_feedback(
        status: FeedbackStatus | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    ) -> dict[str, Any]:
        """In order of arrival."""
        if after is not None:
            _known(after, await service.feedback(after), param="after")
        found = await service.list_feedback(status, limit + 1, after)
        return as_list([describe(item) for item in found[:limit]], len(found) > limit)

    @router.get("/v1/feedback/{id}", dependencies=may_learn)
    async def retrieve_feedback(
        id: str, content: Annotated[bool, Query(description="Also what is to be learned.")] = False
    ) -> dict[str, Any]:
        item = _known(id, await service.feedback(id))
        return {**describe(item), "content": item.payload} if content else describe(item)

    @router.post("/v1/feedback/{id}/hold", dependencies=may_learn)
    async def hold_feedback(id: str, body: Nothing | None = None) -> dict[str, Any]:
        """No job takes it up until it is released."""
        return await _moved(id, service.hold)

    @router.post("/v1/feedback/{id}/release", dependencies=may_learn)
    async def release_feedback(id: str, body: Nothing | None = None) -> dict[str, Any]:
        """Back to its old place in the queue."""
        return await _moved(id, service.release)

    @router.delete("/v1/feedback/{id}", dependencies=may_learn)
    async def withdraw_feedback(id: str) -> dict[str, Any]:
        """It is never learned, and stays listed as withdrawn."""
        return await _moved(id, service.withdraw)

    return router


def describe(item: Feedback) -> dict[str, Any]:
    """``weight_version`` is the version that took it up, as it is spelled in the ``x-weight-version`` header."""
    return {
        "object": "feedback",
        "id": item.id,
        "created": int(item.created),
        "kind": item.kind,
        "status": item.status,
        "reason": item.reason,
        "weight_version": None if item.version is None else str(item.version),
    }


def _known(id: str, item: Feedback | None, *, param: str = "id") -> Feedback:
    if item is None:
        raise ApiError(404, f"there is no feedback {id!r}", param=param, code="not_found")
    return item


async def _moved(id: str, move: Callable[[str], Awaitable[Feedback | None]]) -> dict[str, Any]:
    try:
        return describe(_known(id, await move(id)))
    except WrongStatusError as error:
        raise ApiError(409, str(error), param="id", code="wrong_status") from error


async def _payload(serving: Serving, body: FeedbackRequest, caller: Caller) -> tuple[FeedbackKind, dict[str, Any]]:
    """What goes into the store, once it is sure that the learner can encode it."""
    freeze = {"freeze_context": True} if body.freeze_context else {}
    match _form(body):
        case "messages":
            assert body.messages is not None
            given = [message.plain() for message in body.messages]
            return "messages", {"messages": await serving.tokenize(_checked, serving, given), **freeze}
        case "correction":
            return "messages", {"messages": await _corrected(serving, body, caller), **freeze}
        case _:
            ids = {"context_ids": body.context_ids, "continuation_ids": body.continuation_ids}
            await run_in_threadpool(_check_ids, serving, **ids)
            return "continuation", {**ids, **freeze}


def _checked(serving: Serving, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages in one spelling, so that a repeated post is recognised however it is spelled."""
    turns = check_messages(given)
    messages: list[dict[str, Any]] = [
        {**turn.for_template(), "weight": 0} if turn.role == "assistant" and not turn.train else {**turn.for_template()}
        for turn in turns
    ]
    encode_messages(serving.tokenizer, messages, max_length=serving.engine.info.context_length)
    return messages


def _check_ids(serving: Serving, *, context_ids: Any, continuation_ids: Any) -> None:
    info = serving.engine.info
    encode_continuation(
        context_ids, continuation_ids, vocab_size=serving.detokenizer.vocab_size, max_length=info.context_length
    )


def _form(body: FeedbackRequest) -> Literal["messages", "correction", "continuation"]:
    """Which of the three ways to say it was used; exactly one, and whole."""
    forms: dict[Literal["messages", "correction", "continuation"], tuple[str, ...]] = {
        "messages": ("messages",),
        "correction": ("completion_id", "correction"),
        "continuation": ("context_ids", "continuation_ids"),
    }
    given = [form for form, names in forms.items() if any(getattr(body, name) is not None for name in names)]
    if len(given) != 1:
        ways = "messages, or completion_id and correction, or context_ids and continuation_ids"
        param = forms[given[1]][0] if given else None
        raise ApiError(400, f"send exactly one of: {ways}", param=param, code="invalid_value")
    for name in forms[given[0]]:
        if getattr(body, name) is None:
            message = f"missing required parameter: {name}"
            raise ApiError(400, message, param=name, code="missing_required_parameter")
    return given[0]


async def _corrected(serving: Serving, body: FeedbackRequest, caller: Caller) -> list[dict[str, Any]]:
    """The conversation of an earlier answer with the right answer in its place, which alone is to be learned."""
    assert body.completion_id is not None
    assert body.correction is not None
    completion = await serving.service.completion(body.completion_id)
    if completion is None or completion.key != caller.key:
        # One answer to both: whether somebody else's completion exists is not told.
        message = f"this key was given no completion {body.completion_id!r} (only the key that asked may correct)"
        raise ApiError(404, message, param="completion_id", code="not_found")
    if not completion.messages:
        message = (
            f"{body.completion_id!r} is from /v1/completions, which has no turns; use context_ids and continuation_ids"
        )
        raise ApiError(422, message, param="completion_id", code="invalid_content")
    text = as_text(body.correction.content if isinstance(body.correction, Correction) else body.correction)
    # An explicit 0 on earlier answers: they were the model's own, and nobody said that they were right.
    context = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in completion.messages]
    try:
        return await serving.tokenize(_checked, serving, [*context, {"role": "assistant", "content": text}])
    except DataError as error:
        raise DataError(str(error), "correction") from error
