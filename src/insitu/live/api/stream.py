"""Answers that end with the connection: server-sent events, and work that is dropped when nobody waits for it any more."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from insitu.live.api.errors import translate

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class HungUpError(Exception):
    """The client has closed the connection."""


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Run ``work``; if the client hangs up first, cancel it, wait until it has cleaned up, and raise HungUpError."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUpError
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that ``work`` makes, or an empty one that nobody will see."""
    try:
        return await unless_hung_up(request.receive, work)
    except HungUpError:
        return Response(status_code=499)


class EventStream(Response):
    """``data: {...}`` for each object, then ``data: [DONE]``.

    Starlette's own streaming response neither watches the connection while the next event is being made (asgi 2.4) nor closes
    its generator in time; here a hang-up closes ``events`` at once, which cancels the generation behind it. An error after
    the first event is an event too: the status is already sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Mapping[str, Any]], source: AsyncGenerator[Any], headers: Mapping[str, str]
    ) -> None:
        super().__init__(None, 200, {**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source  # what events draws on; events cannot close it if it was never started

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_hung_up(receive, self._send_all(send))
        except (HungUpError, OSError):  # an OSError is a hang-up that was noticed while sending
            pass
        finally:
            await self._events.aclose()
            await self._source.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await _send_event(send, json.dumps(event, ensure_ascii=False, allow_nan=False))
        except OSError:
            raise
        except Exception as error:
            refusal = translate(error)
            if refusal.status >= 500:
                _LOG.error("a stream failed", exc_info=error)
            await _send_event(send, json.dumps(refusal.body()))
        else:
            await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
