"""Which weights wrote an answer, told on vLLM's own responses; and the answer remembered, so that it can be corrected.

vLLM labels every token with the version published when it was sampled and says so on a request's last output, but not on its
OpenAI routes. So the serving objects get an engine client that passes everything on and notes those spans, and a middleware
writes them where the embedded server has them: the header ``x-weight-version``, and ``weight_versions`` in the body.
"""

import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from insitu.live.api.service import LiveService
from insitu.live.api.serving import VERSION_HEADER
from insitu.live.keys import digest
from insitu.live.records import Completion

log = logging.getLogger("insitu.vllm")

CHAT = "/v1/chat/completions"
ROUTES = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages")


@dataclass(slots=True)
class Note:
    """What is known of one answer. ``spans`` are vLLM's, of every choice: version, first token, end."""

    spans: list[dict[str, Any]] = field(default_factory=list)
    id: str = ""
    text: str = ""

    @property
    def versions(self) -> list[str]:
        return list(dict.fromkeys(span["version"] for span in self.spans))


_NOTE: ContextVar[Note | None] = ContextVar("insitu_note", default=None)


class _NotingClient:
    """vLLM's engine client, except that the spans of what it generates are noted for the request that asked."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        note = _NOTE.get()
        async with aclosing(self._client.generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                if note is not None:
                    for choice in output.outputs:
                        note.spans += [
                            {"index": choice.index, "version": span.version, "start": span.start, "end": span.end}
                            for span in choice.weight_versions or ()
                        ]
                yield output


def note_spans(state: Any, client: Any) -> None:
    """Give every serving object of vLLM's application state the noting client."""
    noting = _NotingClient(client)
    for serving in vars(state)["_state"].values():
        if getattr(serving, "engine_client", None) is client:
            serving.engine_client = noting


class Answers:
    """The middleware around vLLM's completion routes."""

    def __init__(self, app: ASGIApp, *, service: LiveService, version: Callable[[], str]) -> None:
        self.app = app
        self._service = service
        self._version = version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in ROUTES:
            await self.app(scope, receive, send)
            return
        asked = _Asked(receive)

        async def finish(note: Note) -> None:
            if path == CHAT and note.id and note.text:
                await self._remember(scope, asked.body, note)

        answer = _Answer(send, self._version, finish)
        token = _NOTE.set(answer.note)
        try:
            await self.app(scope, asked.receive, answer.send)
        finally:
            _NOTE.reset(token)
        await answer.finish()  # the user has seen enough and hung up

    async def _remember(self, scope: Scope, body: bytes, note: Note) -> None:
        key = Headers(scope=scope)["authorization"].partition(" ")[2].strip()
        version = ",".join(note.versions) or self._version()  # a stream that was cut off has no last output
        messages = json.loads(body)["messages"]
        completion = Completion(note.id, digest(key.encode("latin-1")), messages, note.text, version)
        try:
            await self._service.add_completion(completion)
        except Exception:
            log.exception("completion %s was answered but not stored: it cannot be corrected", note.id)


class _Asked:
    """The request's body, kept as it is read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.body = b""

    async def receive(self) -> Message:
        message = await self._receive()
        self.body += message.get("body", b"")
        return message


class _Answer:
    """One response on its way out. The start is held back until the first piece of the body, when more is known.

    ``finish`` is called once, before the last piece of the answer goes out: who has read it may correct it at once.
    """

    def __init__(self, send: Send, version: Callable[[], str], finish: Callable[[Note], Awaitable[None]]) -> None:
        self.note = Note()
        self._send = send
        self._version = version
        self._finish = finish
        self._complete = False  # the answer, though more events may follow
        self._finished = False
        self._start: MutableMapping[str, Any] | None = None
        self._stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            self._start = message
            self._stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            body = self._events(message.get("body", b"")) if self._stream else self._whole(message)
            if self._start is not None:
                start, self._start = self._start, None
                headers = MutableHeaders(raw=start["headers"])
                headers[VERSION_HEADER] = ",".join(self.note.versions) or self._version()
                if "content-length" in headers and not message.get("more_body"):
                    headers["content-length"] = str(len(body))
                await self._send(start)
            if self._complete or not message.get("more_body"):
                await self.finish()
            await self._send({**message, "body": body})
        else:
            await self._send(message)

    async def finish(self) -> None:
        if not self._finished:
            self._finished = True
            await self._finish(self.note)

    def _whole(self, message: Message) -> bytes:
        body: bytes = message.get("body", b"")
        if self._start is None or message.get("more_body") or not self.note.spans:
            return body
        told = json.loads(body)
        self._read(told, "message")
        return json.dumps({**told, **self._spans()}, ensure_ascii=False).encode()

    def _events(self, body: bytes) -> bytes:
        """Server-sent events, each whole: vLLM writes one at a time. The last of them with tokens names the versions."""
        if not body.startswith(b"data: {"):
            return body
        told = json.loads(body.removeprefix(b"data: "))
        self._read(told, "delta")
        if not self.note.spans:
            return body
        return b"data: " + json.dumps({**told, **self._spans()}, ensure_ascii=False).encode() + b"\n\n"

    def _spans(self) -> dict[str, Any]:
        return {"weight_versions": self.note.versions, "weight_version_spans": self.note.spans}

    def _read(self, told: dict[str, Any], part: str) -> None:
        self.note.id = self.note.id or str(told.get("id") or "")
        choices: Iterable[Any] = told.get("choices") or ()
        for choice in choices:
            if isinstance(choice, dict) and choice.get("index") == 0:
                self.note.text += (choice.get(part) or {}).get("content") or ""
                self._complete |= choice.get("finish_reason") is not None
