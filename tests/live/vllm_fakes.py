"""vLLM's API server as far as the plugin sees it: an engine client, serving objects that hold it, and its OpenAI routes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from api_fakes import KEYS, FakeEngine, chat_tokenizer
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, Response, StreamingResponse

from insitu.live.api import errors
from insitu.live.api.auth import Guard
from insitu.live.api.detokenize import Detokenizer
from insitu.live.api.feedback import feedback_router
from insitu.live.api.service import LocalService
from insitu.live.api.serving import Serving
from insitu.live.store import Store
from insitu.live.vllm_plugin.answers import Answers, note_spans

ID = "chatcmpl-abc"
Spans = Iterable[tuple[str, int, int]]


def choice(index: int = 0, text: str = "", spans: Spans | None = None) -> SimpleNamespace:
    """One of a RequestOutput's ``outputs``. vLLM sets the spans on a choice's last one only."""
    told = None if spans is None else [SimpleNamespace(version=v, start=a, end=b) for v, a, b in spans]
    return SimpleNamespace(index=index, text=text, weight_versions=told)


def output(*choices: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(outputs=list(choices))


@dataclass
class FakeClient:
    """vLLM's EngineClient: gives ``script`` to whoever asks. ``before`` is awaited before each output."""

    script: list[SimpleNamespace] = field(default_factory=list)
    before: Callable[[str, int], Any] | None = None
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    errored: bool = False
    model_config: Any = "the model's"

    async def generate(self, prompt: Any, params: Any, request_id: str, **more: Any) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, request_id, more))
        try:
            for i, each in enumerate(self.script):
                if self.before is not None:
                    await self.before(prompt, i)
                yield each
        finally:
            self.ended.append(request_id)

    async def abort(self, request_id: str) -> str:
        return f"aborted {request_id}"


class ChatServing:
    """vLLM's OpenAIServingChat: asks its client, and answers in OpenAI's shapes with vLLM's spacing of events."""

    def __init__(self, client: Any) -> None:
        self.engine_client = client

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        outputs = self.engine_client.generate(prompt, None, ID)
        if body.get("stream"):
            return StreamingResponse(self.events(outputs), media_type="text/event-stream")
        if body.get("n") == 0:
            return JSONResponse({"error": {"message": "n must be at least 1", "code": 400}}, 400)
        texts: dict[int, str] = {}
        async for each in outputs:
            for found in each.outputs:
                texts[found.index] = texts.get(found.index, "") + found.text
        choices = [{"index": i, "message": {"role": "assistant", "content": text}} for i, text in sorted(texts.items())]
        return JSONResponse({"id": ID, "object": "chat.completion", "choices": choices})

    async def events(self, outputs: AsyncIterator[Any]) -> AsyncIterator[str]:
        def event(choices: list[Any], **more: Any) -> str:
            return f"data: {json.dumps({'id': ID, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

        try:
            first = True
            async for each in outputs:
                if first:
                    yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
                    first = False
                for found in each.outputs:
                    reason = None if found.weight_versions is None else "stop"
                    yield event([{"index": found.index, "delta": {"content": found.text}, "finish_reason": reason}])
            yield event([], usage={"completion_tokens": 3})
        except RuntimeError as error:  # vLLM tells it in the stream
            yield f'data: {{"error": {{"message": "{error}", "code": 500}}}}\n\n'
        yield "data: [DONE]\n\n"


class World:
    """vLLM's application with the plugin's guard and answers around it, over a real store."""

    def __init__(self, directory: Path) -> None:
        self.store = Store(directory / "insitu.db")
        self.store.commit(self.store.reserve("base", None), "0" * 64, {})
        self.client = FakeClient()
        self.version = "7"
        self.app = FastAPI()
        self.serving = ChatServing(self.client)
        self.app.state.openai_serving_chat = self.serving
        self.app.post("/v1/chat/completions")(self.serving.answer)
        tokenizer = chat_tokenizer()
        service = LocalService(self.store)
        serving = Serving(FakeEngine(tokenizer), service, tokenizer, Detokenizer(tokenizer), KEYS, 0)
        errors.install(self.app)
        self.app.include_router(feedback_router(serving))
        self.app.add_middleware(Answers, service=service, version=lambda: self.version)
        self.app.add_middleware(Guard, keys=KEYS, allowed_hosts=())
        note_spans(self.app.state, self.client)

    def http(self, key: str = KEYS.learn) -> TestClient:
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        return TestClient(self.app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False, headers=headers)

    async def asgi(self, body: dict[str, Any], send: Any, *, gone: asyncio.Event | None = None) -> None:
        """One request as uvicorn makes it. ``gone`` is when the client hangs up."""
        raw = json.dumps(body).encode()
        names = {"host": "127.0.0.1", "content-type": "application/json", "authorization": f"Bearer {KEYS.learn}"}
        path = "/v1/chat/completions"
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in names.items()],
        }
        parts = [
            {"type": "http.request", "body": raw[:9], "more_body": True},
            {"type": "http.request", "body": raw[9:]},
        ]

        async def receive() -> Any:
            if parts:
                return parts.pop(0)
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        await self.app(scope, receive, send)


def ask(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def events_of(body: str) -> list[Any]:
    """The stream's events, parsed; ``"[DONE]"`` as it is."""
    found = []
    for event in body.removesuffix("\n\n").split("\n\n"):
        assert event.startswith("data: "), event
        data = event.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found
