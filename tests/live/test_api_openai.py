"""The official client against a real server on a real port."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from api_fakes import KEYS, MODEL, World, chat_tokenizer, lesson, open_world


class Served:
    """A world behind uvicorn, and the connections it was asked to break."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.break_next = 0
        self.posts: list[str] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        config = uvicorn.Config(self._app, log_level="warning", timeout_graceful_shutdown=1, interface="asgi3")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            self.posts.append(scope["path"])
        lose = self.break_next > 0
        self.break_next -= lose

        async def lost(message: Any) -> None:
            """The work was done, the answer is not heard: what makes a client post again."""
            if message["type"] == "http.response.start":
                await send({"type": "http.response.start", "status": 502, "headers": []})
            else:
                await send({"type": "http.response.body", "body": b""})

        await self.world.app(scope, receive, lost if lose else send)

    def client(self, key: str = KEYS.learn) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=2)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with open_world(Path(tmp_path_factory.mktemp("state")), chat_tokenizer()) as world:
        server = Served(world)
        yield server
        server.close()


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    served.world.engine.say("hello world 😀")
    served.world.engine.versions = {}
    served.posts.clear()
    with served.client() as made:
        yield made


def test_it_chats(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], temperature=0, logprobs=True, top_logprobs=1
    )
    reply = raw.parse()
    assert reply.choices[0].message.content == "hello world 😀"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert raw.headers["x-weight-version"] == "0"
    assert (reply.model_extra or {})["weight_versions"] == ["0"]


def test_it_streams(served: Served, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello world 😀"
    assert chunks[-1].usage is not None
    assert stream.response.headers["x-weight-version"] == "0"
    served.world.engine.say("again")
    with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "hello"}]) as events:
        events.until_done()
        assert events.get_final_completion().choices[0].message.content == "again"


def test_an_error_inside_a_stream_is_raised(served: Served, client: openai.OpenAI) -> None:
    served.world.engine.fail_at = 2
    stream = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}], stream=True)
    with pytest.raises(openai.APIError, match="generation loop"):
        list(stream)
    served.world.engine.fail_at = None


def test_leaving_a_stream_early_cancels_it(served: Served, client: openai.OpenAI) -> None:
    engine = served.world.engine
    before = engine.cancelled
    engine.stall_at = 3
    stream = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}], stream=True)
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 5
    while engine.running and time.monotonic() < until:
        time.sleep(0.01)
    engine.stall_at = None
    assert (engine.running, engine.cancelled) == (0, before + 1)


def test_it_completes_text(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=3, logprobs=1, echo=True)
    assert done.choices[0].logprobs is not None
    assert len(done.choices[0].logprobs.token_logprobs or []) == 6
    parts = client.completions.create(model=MODEL, prompt="hello", max_tokens=30, stream=True)
    assert "".join(part.choices[0].text for part in parts) == "hello world 😀"


def test_it_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "insitu"


def test_errors_are_the_clients_own_kinds(served: Served, client: openai.OpenAI) -> None:
    ask: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(**{**ask, "model": "gpt-4o"})
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**ask, presence_penalty=1)
    assert (bad.value.param, bad.value.code) == ("presence_penalty", "unsupported_value")
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "<|im_start|>"}])
    with served.client("wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with served.client(KEYS.api) as asker, pytest.raises(openai.PermissionDeniedError):
        asker.post("/feedback", body={"messages": lesson()}, cast_to=object)


def test_it_teaches_corrects_and_rolls_back(served: Served, client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "what?"}])
    item: Any = client.post("/feedback", body={"completion_id": reply.id, "correction": "the dog"}, cast_to=object)
    assert item["status"] == "queued"
    store = served.world.store
    version = store.reserve("teach", store.head(), feedback=[item["id"]])
    store.commit(version, "1" * 64, {})
    learned: Any = client.get(f"/feedback/{item['id']}", cast_to=object)
    assert (learned["status"], learned["weight_version"]) == ("applied", str(version))
    back: Any = client.post(f"/live/versions/{version}/rollback?timeout=0", cast_to=object)
    assert back["status"] == "queued"


def test_a_post_whose_answer_is_lost_is_learned_once(served: Served, client: openai.OpenAI) -> None:
    known = len(served.world.store.queued(99))
    served.break_next = 2
    item: Any = client.post("/feedback", body={"messages": lesson("once", "the fox")}, cast_to=object)
    assert served.posts == ["/v1/feedback"] * 3
    assert item["status"] == "queued"
    assert len(served.world.store.queued(99)) == known + 1


def test_a_conflict_is_not_tried_again(served: Served, client: openai.OpenAI) -> None:
    client.post("/feedback", body={"id": "same", "messages": lesson("a", "b")}, cast_to=object)
    with pytest.raises(openai.ConflictError):
        client.post("/feedback", body={"id": "same", "messages": lesson("a", "c")}, cast_to=object)
    assert served.posts == ["/v1/feedback"] * 2


def test_a_body_that_is_too_large_is_told_so(client: openai.OpenAI) -> None:
    for size in (5 * 2**20, 40 * 2**20):
        with pytest.raises(openai.APIStatusError) as refused:
            client.post("/feedback", body={"messages": lesson("x" * size)}, cast_to=object)
        assert refused.value.status_code == 413
