"""The gate: nobody is answered before the weights are proven, and nothing may move them away from the arena."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from api_fakes import KEYS
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from insitu.live.api.auth import Guard
from insitu.live.vllm_plugin.endpoint import Endpoint
from insitu.live.vllm_plugin.gate import Gate

PATHS = [
    ("GET", "/health"),
    ("GET", "/ping"),
    ("GET", "/version"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/feedback"),
    ("GET", "/v1/live/versions"),
    ("POST", "/v1/live/versions/0/rollback"),
    ("POST", "/tokenize"),
    ("GET", "/v1/models/"),
    ("GET", "/nothing/here"),
]
OPEN = [("GET", "/v1/live"), ("GET", "/v1/models"), ("GET", "/metrics")]
FORBIDDEN = ["/scale_elastic_ep", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]


class World:
    def __init__(self) -> None:
        self.reason: str | None = "the engine is starting"
        self.reached: list[str] = []
        app = FastAPI(redirect_slashes=False)

        @app.api_route("/{path:path}", methods=["GET", "POST"])
        def everything(path: str) -> dict[str, Any]:
            self.reached.append(f"/{path}")
            return {"served": path}

        @app.websocket("/v1/realtime")
        async def realtime(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text("here")
            await socket.close()

        app.add_middleware(Gate, closed=lambda: self.reason)
        self.app = app
        self.http = TestClient(app, base_url="http://127.0.0.1:8000")


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_closed_gate_gives_503_with_the_reason_and_an_open_one_lets_through(
    world: World, method: str, path: str
) -> None:
    answer = world.http.request(method, path)
    assert answer.status_code == 503
    assert answer.json() == {
        "error": {"message": "the engine is starting", "type": "server_error", "param": None, "code": "not_ready"}
    }
    assert answer.headers["retry-after"] == "1"
    assert world.reached == []
    world.reason = None
    assert world.http.request(method, path).json() == {"served": path[1:]}
    assert world.reached == [path]


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_what_tells_how_far_it_is_passes_a_closed_gate(world: World, method: str, path: str) -> None:
    assert world.http.request(method, path).json() == {"served": path[1:]}
    assert world.http.request(method, path + "?verbose=1").json() == {"served": path[1:]}


@pytest.mark.parametrize("path", FORBIDDEN)
@pytest.mark.parametrize("reason", [None, "the engine is starting"])
def test_routes_that_would_move_the_weights_are_never_let_through(world: World, path: str, reason: str | None) -> None:
    world.reason = reason
    answer = world.http.post(path, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_with_insitu")
    assert path in answer.json()["error"]["message"]
    assert world.reached == []


def test_the_reason_is_asked_for_every_request(world: World) -> None:
    for reason in ("the engine is starting", "the learner has not yet compared the weights with their version"):
        world.reason = reason
        assert world.http.get("/health").json()["error"]["message"] == reason
    world.reason = None
    assert world.http.get("/health").status_code == 200
    world.reason = "refused later"
    assert world.http.get("/health").status_code == 503


def test_other_protocols_are_the_guards_business(world: World) -> None:
    """The gate lets a websocket pass; the guard, outside of it, closes every one."""
    with world.http.websocket_connect("/v1/realtime") as socket:
        assert socket.receive_text() == "here"
    guarded = TestClient(Guard(world.app, keys=KEYS, allowed_hosts=()), base_url="http://127.0.0.1:8000")
    with pytest.raises(WebSocketDisconnect), guarded.websocket_connect("/v1/realtime"):
        pass


def test_a_reason_of_any_text_is_an_answer_in_plain_ascii(world: World) -> None:
    world.reason = "the weights cannot be trained in place: 'größe.weight' \ud800"
    answer = world.http.get("/health")
    assert answer.status_code == 503
    assert json.loads(answer.content.decode("ascii"))["error"]["message"] == world.reason


# -- the reason --------------------------------------------------------------------------------------------------------
@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


def test_the_endpoint_is_closed_until_a_learner_has_proven_the_weights(endpoint: Endpoint) -> None:
    assert endpoint.closed() == "the engine is starting"
    control = SimpleNamespace(proven=False, refusal=None)
    endpoint.control = control  # type: ignore[assignment]
    assert endpoint.closed() == "the learner has not yet compared the weights with their version"
    control.refusal = "'lm_head.weight' is a private copy"
    assert endpoint.closed() == "the weights cannot be trained in place: 'lm_head.weight' is a private copy"
    control.proven, control.refusal = True, None
    assert endpoint.closed() is None
    control.refusal = "a later learner's"  # what was proven stays proven while this server lives
    assert endpoint.closed() is None


def test_an_endpoint_for_another_load_format_changes_nothing(endpoint: Endpoint) -> None:
    app = FastAPI()
    app.state.args = SimpleNamespace(load_format="auto")
    routes, middleware = list(app.routes), list(app.user_middleware)
    endpoint.attach_router(app)
    assert (app.routes, app.user_middleware) == (routes, middleware)
