"""Who may come in: keys on every route, and nothing for a web page."""

import asyncio
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from api_fakes import KEYS, World, chat, chat_tokenizer, lesson, open_world

from insitu.live.api.auth import PUBLIC

JSON = {"content-type": "application/json"}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path, chat_tokenizer(), allowed_hosts=["gpu.example"], max_body=4096) as made:
        yield made


def routes(world: World) -> list[tuple[str, str]]:
    """Every method and path of the application, by its own public description of itself."""
    described = [(m.upper(), path) for path, methods in world.app.openapi()["paths"].items() for m in methods]
    plain = [
        (m, path) for r in world.app.routes if (path := getattr(r, "path", None)) for m in getattr(r, "methods", ())
    ]
    return [(m, path.replace("{", "").replace("}", "")) for m, path in {*described, *plain}]


def test_every_route_but_health_is_closed_without_a_key(world: World) -> None:
    found = routes(world)
    assert {path for _, path in found} >= {
        "/health",
        "/openapi.json",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/id",
        "/v1/feedback",
        "/v1/feedback/id",
        "/v1/live",
        "/v1/live/versions",
        "/v1/live/versions/id/rollback",
    }
    for method, path in [
        *found,
        ("GET", "/nowhere"),
        ("POST", "/health"),
        ("OPTIONS", "/v1/feedback"),
        ("GET", "/docs"),
    ]:
        answer = world.client(None).request(method, path)
        if (method, path) in PUBLIC:
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "value",
    [
        "Bearer wrong",
        "Bearer ",
        "Bearer",
        "",
        f"Basic {KEYS.learn}",
        KEYS.learn,
        f"Bearer {KEYS.learn}x",
        f"Bearer {KEYS.learn[:-1]}",
        f"Bearer {KEYS.learn} {KEYS.learn}",
        "Bearer schlüssel".encode("latin-1"),
        "Bearer ключ".encode(),
    ],
)
def test_a_wrong_key_is_a_401(world: World, value: Any) -> None:
    client = world.client(None)
    for method, path in routes(world):
        if (method, path) not in PUBLIC:
            answer = client.request(method, path, headers={"authorization": value})
            assert answer.status_code == 401, (method, path)


def test_two_authorization_headers_are_none(world: World) -> None:
    headers = [("authorization", f"Bearer {KEYS.learn}"), ("authorization", f"Bearer {KEYS.api}")]
    assert world.client(None).get("/v1/models", headers=headers).status_code == 401


def test_the_api_key_may_ask_but_not_teach(world: World) -> None:
    client = world.client(KEYS.api)
    for path in ("/v1/models", "/v1/live", "/v1/live/versions"):
        assert client.get(path).status_code == 200
    assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    for method, path, body in (
        ("POST", "/v1/feedback", {"messages": lesson()}),
        ("GET", "/v1/feedback/x", None),
        ("POST", "/v1/live/versions/0/rollback", {}),
        ("GET", "/v1/live/rollbacks/1", None),
    ):
        answer = client.request(method, path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "learn_key_required"), path
    assert world.store.queued(9) == []
    assert world.store.open_rollbacks() == []


POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/feedback", "/v1/live/versions/0/rollback", "/nowhere"]


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://127.0.0.1:3000",
        "http://127.0.0.1",
        "file://",
        "http://localhost:8000",
        "http://127.0.0.1:8000.evil.example",
        "http://127.0.0.1:8000@evil.example",
        "http://[",
    ],
)
def test_a_web_page_cannot_post_with_a_body_or_without(world: World, origin: str) -> None:
    client = world.client(headers={**JSON, "authorization": f"Bearer {KEYS.learn}", "origin": origin})
    for path, body in itertools.product(POSTS, (b"", b"{}")):
        answer = client.post(path, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin"), (path, body)
    assert world.store.open_rollbacks() == []


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "https://127.0.0.1:8000"])
def test_the_servers_own_pages_may_post(world: World, origin: str) -> None:
    answer = world.client().post("/v1/feedback", json={"messages": lesson()}, headers={"origin": origin})
    assert answer.status_code == 202


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 202),
        ("LOCALHOST:8000", 202),
        ("127.0.0.1:1", 202),
        ("[::1]:8000", 202),
        ("gpu.example:80", 202),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
        ("evil.example@localhost", 403),
        ("evil.example:8000", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_a_page_whose_name_points_here_cannot_post(world: World, host: str, status: int) -> None:
    answer = world.client().post("/v1/feedback", json={"messages": lesson()}, headers={"host": host})
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
def test_every_post_says_that_it_is_json_with_a_body_or_without(world: World, kind: str | None) -> None:
    headers = {"authorization": f"Bearer {KEYS.learn}"} | ({"content-type": kind} if kind else {})
    client = world.client(headers=headers)
    for path, body in itertools.product(POSTS, (b"", b"{}")):
        answer = client.post(path, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "not_json"), (path, body)
    assert world.store.open_rollbacks() == []


def test_a_charset_beside_json_is_fine(world: World) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert world.client().post("/v1/live/versions/0/rollback?timeout=0", headers=headers).status_code == 202


def test_a_large_body_is_refused_before_it_is_read(world: World) -> None:
    async def raw(chunks: list[bytes], length: int | None) -> tuple[int, int]:
        """Status, and how many chunks were taken."""
        taken = 0

        async def body() -> Any:
            nonlocal taken
            for chunk in chunks:
                taken += 1
                yield chunk

        transport = httpx2.ASGITransport(app=world.app)
        headers = {**JSON, "authorization": f"Bearer {KEYS.learn}"} | (
            {"content-length": str(length)} if length else {}
        )
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post("/v1/feedback", content=body(), headers=headers)
        assert answer.json()["error"]["code"] == "body_too_large" or answer.status_code == 400
        return answer.status_code, taken

    kib = b"x" * 1024
    assert asyncio.run(raw([kib] * 5, 5 * 1024)) == (413, 5)  # a little too much is read, so that the client hears why
    status, taken = asyncio.run(raw([kib] * 1000, None))
    assert status == 413
    assert taken < 20
    assert asyncio.run(raw([kib] * 1000, 1000 * 1024)) == (413, 0)
    assert asyncio.run(raw([kib] * 4, None))[0] == 400  # as much as is allowed: not JSON, but read


def test_without_a_key_the_body_is_not_read(world: World) -> None:
    async def main() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body was read")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/feedback",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        await world.app(scope, receive, send)
        return sent

    assert asyncio.run(main())[0]["status"] == 401


def test_websockets_are_closed(world: World) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), world.client().websocket_connect("/v1/live"):
        pass


def test_keys_are_never_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    world.client().post("/v1/chat/completions", json=chat())
    world.client("wrong").get("/v1/models")
    world.engine.fail_at = 0
    world.client().post("/v1/chat/completions", json=chat())
    assert KEYS.learn not in caplog.text
    assert KEYS.api not in caplog.text
    assert KEYS.learn not in repr(KEYS)
