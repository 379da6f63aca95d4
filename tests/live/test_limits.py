"""So many items may wait, so many posts come in a minute; who is told to come again later does, and loses nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from api_fakes import World, chat_tokenizer, lesson, open_world

from insitu.live.api.errors import ApiError
from insitu.live.api.limits import Limits, limits_of_environment
from insitu.live.client import Client, ClientError
from insitu.live.config import ServeConfig
from insitu.live.records import QueueFullError, StateError
from insitu.live.store import Store


def test_the_bucket_holds_a_minute_and_fills_with_time() -> None:
    now = [100.0]
    limits = Limits(per_minute=60, clock=lambda: now[0])
    for _ in range(60):
        limits.admit()
    with pytest.raises(ApiError, match="more than 60 posts of feedback in a minute; wait 1 s") as refused:
        limits.admit()
    assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "1")
    now[0] += 2.5
    limits.admit()
    limits.admit()
    with pytest.raises(ApiError):
        limits.admit()
    now[0] += 100_000  # an idle day is not saved up
    for _ in range(60):
        limits.admit()
    with pytest.raises(ApiError):
        limits.admit()
    assert limits.status() == {"max_queue": 10_000, "feedback_per_minute": 60, "queue_full": 0, "rate_limited": 3}


def test_a_slow_rate_says_how_long_to_wait() -> None:
    limits = Limits(per_minute=2, clock=lambda: 0.0)
    limits.admit()
    limits.admit()
    with pytest.raises(ApiError) as refused:
        limits.admit()
    assert refused.value.headers["retry-after"] == "30"


def test_a_full_queue_takes_nothing_new_and_still_knows_what_it_has(tmp_path: Path) -> None:
    store = Store(tmp_path / "insitu.db")
    for i in range(3):
        store.add_feedback("messages", {"n": i}, f"x{i}", hold=i == 1, max_queue=3)
    with pytest.raises(QueueFullError, match="3 items are queued or held already, and 3 is the limit"):
        store.add_feedback("messages", {"n": 3}, "x3", max_queue=3)
    assert store.feedback("x3") is None
    assert store.add_feedback("messages", {"n": 1}, "x1", max_queue=3)[1] is False
    assert store.add_feedback("messages", {"n": 2}, max_queue=3)[0].id == "x2"
    store.withdraw("x0")
    assert store.add_feedback("messages", {"n": 3}, "x3", max_queue=3)[1] is True
    store.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path, chat_tokenizer(), limits=Limits(max_queue=2, per_minute=5, clock=lambda: 0.0)) as made:
        yield made


def test_both_refusals_are_429_with_the_time_to_wait(world: World) -> None:
    http = world.client()
    posted = [http.post("/v1/feedback", json={"messages": lesson(str(i))}) for i in (0, 1, 2, 0, 1, 0)]
    assert [answer.status_code for answer in posted] == [202, 202, 429, 200, 200, 429]
    full, fast = posted[2], posted[5]
    assert (full.json()["error"]["code"], full.headers["retry-after"]) == ("queue_full", "10")
    assert (fast.json()["error"]["code"], fast.headers["retry-after"]) == ("rate_limit_exceeded", "12")
    assert full.json()["error"]["type"] == fast.json()["error"]["type"] == "rate_limit_error"
    intake = http.get("/v1/live").json()["intake"]
    assert intake == {"max_queue": 2, "feedback_per_minute": 5, "queue_full": 1, "rate_limited": 1}
    assert world.store.counts() == {"queued": 2}


def test_limits_come_from_the_environment_under_vllm() -> None:
    found = limits_of_environment({"INSITU_MAX_QUEUE": "7", "INSITU_FEEDBACK_PER_MINUTE": "9"})
    assert (found.max_queue, found.per_minute) == (7, 9)
    assert limits_of_environment({}).max_queue == ServeConfig().max_queue
    for odd in ("0", "-1", "many", "1.5", "٣"):
        with pytest.raises(StateError, match=f"INSITU_MAX_QUEUE='{odd}'"):
            limits_of_environment({"INSITU_MAX_QUEUE": odd})


@pytest.mark.parametrize("name", ["max_queue", "feedback_per_minute"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0"):
        ServeConfig(**options)


class Script:
    """A server that gives these answers: status and Retry-After."""

    def __init__(self, *answers: tuple[int, str | None]) -> None:
        self.answers = list(answers)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        status, wait = self.answers.pop(0)
        return httpx2.Response(status, json={"id": "x"}, headers={} if wait is None else {"retry-after": wait})


def client_of(script: Script) -> Client:
    client = Client.__new__(Client)  # without a state directory
    client.facts = {"url": "http://test"}
    client.http = httpx2.Client(base_url="http://test", transport=httpx2.MockTransport(script))
    return client


def test_the_client_comes_again_when_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("insitu.live.client.time.sleep", slept.append)
    script = Script((429, "3"), (429, "10"), (202, None))
    assert client_of(script).post("/v1/feedback", {})["id"] == "x"
    assert (slept, script.answers) == ([3, 10], [])
    for wait in (None, "soon", "601"):  # not told, not understood, not within its patience
        with pytest.raises(ClientError, match="HTTP 429"):
            client_of(Script((429, wait))).post("/v1/feedback", {})
    assert slept == [3, 10]


def test_waiting_for_many_items_asks_for_the_first_that_waits_only() -> None:
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        id = request.url.path.rsplit("/", 1)[1]
        asked.append(id)
        # A job ends after 10 questions, and another after 100.
        done = len(asked) > 100 or (len(asked) > 10 and int(id) < 60)
        return httpx2.Response(200, json={"id": id, "status": "applied" if done else "queued"})

    client = client_of(Script())
    client.http = httpx2.Client(base_url="http://test", transport=httpx2.MockTransport(answer))
    rounds = list(client.wait_learned([str(i) for i in range(120)], poll=0))
    assert [len(found) for found in rounds[:12]] == [0] * 10 + [60, 60]
    assert [item["id"] for item in rounds[-1]] == [str(i) for i in range(120)]
    assert len(asked) < 200
