"""``/v1/live/canaries``: the prompts by which updates are judged. What is added counts from the next job on."""

from typing import Any

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from insitu.data.chat import encode_question
from insitu.data.messages import DataError
from insitu.live import prompts
from insitu.live.api.auth import learn_key
from insitu.live.api.errors import ApiError
from insitu.live.api.schema import CanaryRequest
from insitu.live.api.serving import Serving
from insitu.live.records import Canary

MAX_CANARIES = 64  # a user's own: each costs time in the audit and memory in the learner
ROOM = 24  # tokens that the reply to a canary may take


def canaries_router(serving: Serving) -> APIRouter:
    router = APIRouter()
    service = serving.service
    may_learn = [Depends(learn_key(serving.keys))]

    @router.get("/v1/live/canaries", dependencies=may_learn)
    async def list_canaries() -> dict[str, Any]:
        shipped = [_describe(name, prompt, None) for name, prompt in prompts.built_in().items()]
        return {"object": "list", "data": [*shipped, *(_described(c) for c in await service.canaries())]}

    @router.post("/v1/live/canaries", status_code=201, dependencies=may_learn)
    async def add_canary(body: CanaryRequest) -> Response:
        """201 when it is new, 200 when it was there already: a client may repeat a post whose answer was lost."""
        await serving.tokenize(_check, serving, body.prompt)
        known = await service.canaries()
        if len(known) >= MAX_CANARIES and body.prompt not in {canary.prompt for canary in known}:
            raise ApiError(
                409, f"there are {MAX_CANARIES} canaries, and no more are kept; remove one", code="too_many_canaries"
            )
        canary, is_new = await service.add_canary(body.prompt)
        return JSONResponse(_described(canary), 201 if is_new else 200)

    @router.delete("/v1/live/canaries/{id}", dependencies=may_learn)
    async def remove_canary(id: str) -> dict[str, Any]:
        if id in prompts.built_in():
            raise ApiError(422, f"{id} ships with insitu and always judges", param="id", code="built_in")
        found = next((canary for canary in await service.canaries() if canary.name == id), None)
        if found is None or not await service.remove_canary(found.id):
            raise ApiError(404, f"there is no canary {id!r}", param="id", code="not_found")
        return {"object": "live.canary.deleted", "id": id, "deleted": True}

    return router


def _check(serving: Serving, prompt: str) -> None:
    """DataError, a 422, unless every job can ask it."""
    if not prompt.strip():
        raise DataError(
            "the prompt is empty; a canary is a question that no lesson should change the answer to", "prompt"
        )
    if prompt in prompts.ANCHORS:
        raise DataError("this prompt is an anchor: it takes part in training, so it cannot judge", "prompt")
    if prompt in prompts.CANARIES:
        raise DataError("this prompt ships as a canary already", "prompt")
    try:
        ids = encode_question(serving.tokenizer, prompt)
    except DataError as error:
        raise DataError(str(error), "prompt") from error
    room = serving.engine.info.context_length - ROOM
    if len(ids) > room:
        raise DataError(
            f"the prompt encodes to {len(ids)} tokens; with {ROOM} for the reply the context has room for {room}",
            "prompt",
        )


def _described(canary: Canary) -> dict[str, Any]:
    return _describe(canary.name, canary.prompt, int(canary.created))


def _describe(name: str, prompt: str, created: int | None) -> dict[str, Any]:
    return {"object": "live.canary", "id": name, "created": created, "built_in": created is None, "prompt": prompt}
