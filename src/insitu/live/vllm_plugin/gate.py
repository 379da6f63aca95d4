"""Closed until the weights are proven: a server that cannot be trained, or reads a private copy, must not look ready."""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from insitu.live.api.errors import ApiError

_FORBIDDEN = ("/scale_elastic_ep", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_OPEN = ("/v1/live", "/v1/models", "/metrics")  # tell how far it is, and generate nothing


class Gate:
    """503 with the reason while ``closed`` gives one, ``GET /health`` included; 403 for routes that would move the weights."""

    def __init__(self, app: ASGIApp, *, closed: Callable[[], str | None]) -> None:
        self.app = app
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path in _FORBIDDEN:
            refusal = ApiError(403, f"{path} would move the weights away from the arena", code="not_with_insitu")
            await refusal.response()(scope, receive, send)
            return
        reason = self._closed() if scope["type"] == "http" and path not in _OPEN else None
        if reason is None:
            await self.app(scope, receive, send)
        else:
            refusal = ApiError(503, reason, code="not_ready", headers={"retry-after": "1"})
            await refusal.response()(scope, receive, send)
