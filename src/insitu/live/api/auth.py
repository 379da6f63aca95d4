"""Who may come in. One pure ASGI middleware in front of every route, whatever is added later; only GET /health is public.

A browser is the enemy here: any web page can make it POST to a server on this machine. So what changes something needs a
Host that is ours (else a page whose name was re-pointed at 127.0.0.1 is "same origin"), no foreign Origin, and a JSON content
type (which a plain form cannot send), with a body or without.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from insitu.live.api.errors import ApiError
from insitu.live.keys import Keys, Role, digest

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PUBLIC = {("GET", "/health")}
MAX_BODY = 4 * 2**20
_SAFE = {"GET", "HEAD", "OPTIONS"}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:@/\[\]]+)(:\d+)?")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: what the key may do, and its digest (a correction may name only what the same key was answered)."""

    role: Role
    key: str


def authenticate(headers: Headers, keys: Keys) -> Caller:
    """The caller by its ``Authorization: Bearer`` header, or a 401."""
    given = headers.getlist("authorization")
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise _unauthorized("send your key as: Authorization: Bearer KEY")
    presented = token.strip().encode("latin-1")  # how ASGI headers are decoded; any byte may come
    role = keys.role_of(presented)
    if role is None:
        raise _unauthorized("the key is wrong")
    return Caller(role, digest(presented))


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def caller_of(keys: Keys) -> Callable[[Request], Caller]:
    """A dependency that gives a route its caller."""

    def caller(request: Request) -> Caller:
        return authenticate(request.headers, keys)

    return caller


def learn_key(keys: Keys) -> Callable[[Request], Caller]:
    """A dependency that lets only the learn key through."""

    def caller(request: Request) -> Caller:
        who = authenticate(request.headers, keys)
        if who.role != "learn":
            raise ApiError(403, "this needs the learn key; the API key may only ask", code="learn_key_required")
        return who

    return caller


def refuse_foreign(headers: Headers, allowed_hosts: Iterable[str]) -> None:
    """403 for a request that another web site made this browser send."""
    hosts = headers.getlist("host")
    name = _host_name(hosts[0]) if len(hosts) == 1 else None
    if name is None or name not in allowed_hosts:
        raise ApiError(
            403, f"the Host header {hosts[:1]} is not one that this server answers to", code="host_not_allowed"
        )
    for origin in headers.getlist("origin"):
        scheme, _, netloc = origin.lower().partition("://")
        # The port counts: a page on another port of this machine is foreign too. The scheme may differ behind a TLS proxy.
        if scheme not in ("http", "https") or netloc != hosts[0].lower():
            raise ApiError(403, f"requests from web pages of {origin!r} are refused", code="foreign_origin")


def _host_name(host: str) -> str | None:
    found = _HOST.fullmatch(host.lower())
    return found[1].strip("[]") if found else None


def refuse_other_content(headers: Headers) -> None:
    """415 for anything but JSON, with or without a body."""
    given = headers.getlist("content-type")
    if len(given) != 1 or given[0].partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the header Content-Type: application/json, also without a body", code="not_json")


class Guard:
    """The middleware. The order is Host and Origin, key, content type, size: nothing is read from a caller without a key."""

    def __init__(self, app: ASGIApp, *, keys: Keys, allowed_hosts: Iterable[str], max_body: int = MAX_BODY) -> None:
        self.app = app
        self._keys = keys
        self._hosts = frozenset(host.lower().strip("[]") for host in (*LOOPBACK, *allowed_hosts))
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            try:
                receive = await self._admit(scope, receive)
            except ApiError as refusal:
                await refusal.response()(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        headers = Headers(scope=scope)
        method = scope["method"]
        if method not in _SAFE:
            refuse_foreign(headers, self._hosts)
        if (method, scope["path"]) not in PUBLIC:
            authenticate(headers, self._keys)
        if method in ("POST", "PUT", "PATCH"):
            refuse_other_content(headers)
        return await self._buffered(headers, receive) if method not in _SAFE else receive

    async def _buffered(self, headers: Headers, receive: Receive) -> Receive:
        """Read the body, at most so much of it. What is over is thrown away for a while before the 413: a client that is
        still sending when the connection closes would report a broken pipe instead of the reason."""
        size, length = 0, headers.get("content-length", "")
        declared = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
        chunks: list[bytes] = []
        more = declared <= 4 * self._max_body
        while more and size <= 4 * self._max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the connection ended inside the body")  # nobody reads this
            size += len(message.get("body", b""))
            if size <= self._max_body:
                chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        if max(size, declared) > self._max_body:
            raise ApiError(
                413,
                f"the body is larger than {self._max_body} bytes",
                code="body_too_large",
                headers={"connection": "close"} if more else None,
            )
        body: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

        async def replay() -> Message:
            return body.pop() if body else await receive()

        return replay
