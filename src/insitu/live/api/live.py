"""``/v1/live``: what the server is doing, its versions, and the way back to one of them."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from insitu.live.api.auth import learn_key
from insitu.live.api.errors import ApiError
from insitu.live.api.schema import Nothing, as_list
from insitu.live.api.service import LiveService
from insitu.live.api.serving import Serving
from insitu.live.records import Event, Rollback, Version

_POLL_SECONDS = 0.1


def live_router(serving: Serving, live_status: Callable[[], Mapping[str, Any]]) -> APIRouter:
    router = APIRouter()
    service = serving.service
    may_learn = [Depends(learn_key(serving.keys))]

    @router.get("/v1/live")
    async def live() -> dict[str, Any]:
        extra = await run_in_threadpool(live_status)
        counts = await service.counts()
        facts = {
            "object": "live",
            "model": serving.engine.info.model_name,
            "state": _state(serving.engine.healthy(), counts, extra),
            "weight_version": serving.engine.version,
            "head": await service.head(),
            "feedback": counts,
            "counters": await service.counters(),
            "intake": serving.limits.status(),
            "learner": {},
        }
        return {name: jsonable(fact) for name, fact in {**facts, **extra}.items()}

    @router.get("/v1/live/events")
    async def list_events(
        after: Annotated[
            int | None, Query(ge=0, lt=2**63, description="Events after this one; else the last ones.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> dict[str, Any]:
        found = await service.events(after, limit + 1)
        more = len(found) > limit
        # Without `after` it is the newest that are wanted, so the one too many is the oldest.
        return as_list([_describe_event(e) for e in (found[-limit:] if after is None else found[:limit])], more)

    @router.get("/v1/live/versions")
    async def list_versions() -> dict[str, Any]:
        return {"object": "list", "data": [_describe_version(version) for version in await service.versions()]}

    @router.post("/v1/live/versions/{id}/rollback", dependencies=may_learn)
    async def roll_back(
        request: Request,
        id: str,
        body: Nothing | None = None,
        timeout: Annotated[float, Query(ge=0, le=300, description="Seconds to wait for the learner.")] = 30,
    ) -> Response:
        """200 when the version is served again, 202 when the learner has not got to it yet, 409 with the reason when it
        could not be done."""
        version = await _committed(service, id)
        if version.pruned:
            raise ApiError(409, f"version {id} was pruned to save room; its bytes are gone", code="version_pruned")
        rollback = await service.add_rollback(version.id)
        until = time.monotonic() + timeout
        while rollback.status in ("queued", "running") and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)
            if await request.is_disconnected():
                break
            rollback = await service.rollback(rollback.id) or rollback
        if rollback.status == "failed":
            raise ApiError(409, rollback.reason or "the rollback failed", code="rollback_failed")
        return JSONResponse(_describe_rollback(rollback), 200 if rollback.status == "done" else 202)

    @router.post("/v1/live/versions/{id}/pin", dependencies=may_learn)
    async def pin(id: str, body: Nothing | None = None) -> dict[str, Any]:
        """Never prune this version."""
        return await _pinned(id, True)

    @router.post("/v1/live/versions/{id}/unpin", dependencies=may_learn)
    async def unpin(id: str, body: Nothing | None = None) -> dict[str, Any]:
        """Let it be pruned again when it is old."""
        return await _pinned(id, False)

    async def _pinned(id: str, pinned: bool) -> dict[str, Any]:
        version = await _committed(service, id)
        try:
            await service.pin(version.id, pinned)
        except ValueError as error:  # it was pruned, perhaps just now
            raise ApiError(409, str(error), code="version_pruned") from error
        return _describe_version(await service.version(version.id) or version)

    @router.get("/v1/live/rollbacks/{id}", dependencies=may_learn)
    async def retrieve_rollback(id: str) -> dict[str, Any]:
        number = _number(id)
        rollback = None if number is None else await service.rollback(number)
        if rollback is None:
            raise ApiError(404, f"there is no rollback {id!r}", param="id", code="not_found")
        return _describe_rollback(rollback)

    return router


async def _committed(service: LiveService, id: str) -> Version:
    number = _number(id)
    version = None if number is None else await service.version(number)
    if version is None or version.status != "committed":
        found = "does not exist" if version is None else f"was never served: it is {version.status}"
        raise ApiError(404, f"version {id} {found}", param="id", code="version_not_found")
    return version


def _state(healthy: bool, counts: Mapping[str, int], extra: Mapping[str, Any]) -> str:
    """``degraded`` is a server that cannot answer, or answers but cannot learn: its learner is away, or says why not."""
    learner = extra.get("learner", {})
    if not healthy or learner.get("state") == "absent" or learner.get("problem"):
        return "degraded"
    if extra.get("paused"):
        return "paused"
    return "learning" if extra.get("trial") or counts.get("training") else "serving"


def _number(text: str) -> int | None:
    """An id from a path, or None if it can be nobody's."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _describe_version(version: Version) -> dict[str, Any]:
    return {
        "object": "live.version",
        "id": version.id,
        "kind": version.kind,
        "status": version.status,
        "parent": version.parent,
        "target": version.target,
        "created": int(version.created),
        "sha256": version.sha256,
        "bytes": 0 if version.file is None else version.file.bytes,
        "pinned": version.pinned,
        "pruned": version.pruned,
        "report": jsonable(version.report),
    }


def _describe_event(event: Event) -> dict[str, Any]:
    return {
        "object": "live.event",
        "id": event.id,
        "created": int(event.created),
        "kind": event.kind,
        "subject": event.subject,
        "detail": jsonable(event.detail),
    }


def _describe_rollback(rollback: Rollback) -> dict[str, Any]:
    return {
        "object": "rollback",
        "id": rollback.id,
        "status": rollback.status,
        "target": rollback.target,
        "version": rollback.version,
        "reason": rollback.reason,
    }


def jsonable(value: Any) -> Any:
    """A report may hold the NaN for which its update was refused; JSON has none, so it becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value
