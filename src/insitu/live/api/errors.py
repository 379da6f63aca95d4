"""Every error is an OpenAI error body: ``{"error": {"message", "type", "param", "code"}}``, whatever raised it.

400 names a field of the wrong shape or an unsupported parameter, 422 a field that is well-formed but cannot be learned from.
"""

import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from insitu.data.messages import DataError
from insitu.live import disk
from insitu.live.engines.base import EngineError, RequestTooLongError

_LOG = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer of ``status`` with an OpenAI error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if status == 409:  # the openai client repeats a 409, and would ask again for what has just failed
            self.headers["x-should-retry"] = "false"

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        # Plain ASCII: a message that quotes half of a surrogate pair must not fail a second time.
        content = json.dumps(self.body(), allow_nan=False)
        return Response(content, self.status, self.headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Give ``app`` these bodies for everything that can be raised, its own errors included."""

    async def respond(request: Request, exc: Exception) -> Response:
        return translate(exc).response()

    kinds = (
        ApiError,
        RequestValidationError,
        HTTPException,
        DataError,
        RequestTooLongError,
        EngineError,
        sqlite3.Error,
    )
    for kind in (*kinds, Exception):
        app.add_exception_handler(kind, respond)


def translate(exc: Exception) -> ApiError:
    """The answer to an exception. What nobody foresaw is a 500 that tells the client nothing; the server's log has it."""
    match exc:
        case ApiError():
            return exc
        case RequestValidationError():
            return _from_validation(exc)
        case HTTPException():
            return ApiError(exc.status_code, _http_message(exc), headers=exc.headers)
        case DataError():
            return ApiError(422, str(exc), param=exc.param, code="invalid_content")
        case RequestTooLongError():
            return ApiError(400, str(exc), param="max_tokens", code="context_length_exceeded")
        case EngineError():
            return ApiError(503, str(exc), code="engine_error")
        case sqlite3.Error() if disk.is_full(exc):
            _LOG.error("the disk is full", exc_info=exc)
            return ApiError(
                507, "no room on the server's disk: nothing was stored; free some and ask again", code="disk_full"
            )
        case sqlite3.Error():
            _LOG.error("the store failed", exc_info=exc)
            return ApiError(
                503, "the server cannot read or write its store; its log says why", code="store_unavailable"
            )
        case _:
            return ApiError(500, "the server made an error; its log has the details", code="internal_error")


def _http_message(exc: HTTPException) -> str:
    known = {404: "there is nothing at this path", 405: "this path does not take this method"}
    return known.get(exc.status_code, str(exc.detail))


def _from_validation(exc: RequestValidationError) -> ApiError:
    errors = list(exc.errors())
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {errors[0]['ctx']['error']}", code="invalid_json")
    # A union reports what is wrong with each of its branches; the one that got furthest is the one that was meant.
    path, error = max(((_path(e, exc.body), e) for e in errors), key=lambda pair: len(pair[0]))
    name = _spell(path)
    kind = error["type"]
    if not path:
        return ApiError(400, "the body must be a JSON object", code="invalid_type")
    if kind == "extra_forbidden":
        return ApiError(400, f"unrecognized parameter: {name}", param=name, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"missing required parameter: {name}", param=name, code="missing_required_parameter")
    code = "unsupported_value" if kind == "unsupported" else "invalid_value"
    return ApiError(400, f"invalid {name}: {error['msg']}", param=name, code=code)


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where in the client's own JSON the error is: pydantic's location less the names of its types."""
    where, *location = error["loc"]
    if where != "body":
        return list(location)
    path: list[str | int] = []
    at = body
    for i, part in enumerate(location):
        if (isinstance(at, dict) and part in at) or (isinstance(at, list) and isinstance(part, int) and part < len(at)):
            at = at[part]
            path.append(part)
        elif i == len(location) - 1 and error["type"] == "missing" and isinstance(at, dict):
            path.append(part)
    return path


def _spell(path: Sequence[str | int]) -> str:
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name
