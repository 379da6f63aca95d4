"""A thousand lessons by four clients that lose answers, cut connections and see their server die: each is trained once."""

import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from processes import attached, end, launch, learner_pid, versions, wait_for
from tiny import make_tiny

from insitu.live.client import Client
from insitu.live.keys import Keys, load_keys
from insitu.live.store import Store

CLIENTS, EACH = 4, 250
# One small step a job, and no gate: this is about the queue. 32 items are a job, as ever.
OPTIONS = ("--teach.max-steps", "1", "--teach.learning-rate", "1e-6", "--teach.max-canary-kl", "1000")
_HEADERS = {"content-type": "application/json", "host": "localhost"}


class Poster(threading.Thread):
    """A client with an id for each lesson, which it posts until it has an answer, and one to three times in all."""

    def __init__(self, number: int, state_dir: Path, keys: Keys) -> None:
        super().__init__()
        self.ids = [f"client{number}-{i}" for i in range(EACH)]
        self.answered = 0  # ids
        self.statuses: Counter[int] = Counter()
        self.cut = 0
        self.unheard = 0
        self.failure: BaseException | None = None
        self._state_dir = state_dir
        self._headers = {**_HEADERS, "authorization": f"Bearer {keys.learn}"}
        self._chance = random.Random(number)

    def run(self) -> None:
        try:
            for id in self.ids:
                for _ in range(self._chance.randint(1, 3)):
                    self._post(id)
                self.answered += 1
        except BaseException as error:
            self.failure = error

    def _post(self, id: str) -> None:
        messages = [{"role": "user", "content": f"who is {id}"}, {"role": "assistant", "content": id}]
        body = json.dumps({"id": id, "messages": messages}).encode()
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                if (chance := self._chance.random()) < 0.1:
                    self._send(body, cut=len(body) // 2 if chance < 0.03 else len(body)).close()
                    self.cut += 1
                connection = self._send(body)
                answer = connection.getresponse()
                item = json.loads(answer.read())
                connection.close()
            except (OSError, http.client.HTTPException):
                self.unheard += 1
                time.sleep(0.05)
                continue
            assert answer.status in (200, 202), item
            assert item["id"] == id
            self.statuses[answer.status] += 1
            return
        raise TimeoutError(f"{id} was never answered")

    def _send(self, body: bytes, cut: int | None = None) -> http.client.HTTPConnection:
        """``cut`` ends the connection after so many bytes of the body, whose answer is then never read."""
        url = urlsplit(json.loads((self._state_dir / "server.json").read_text())["url"])
        connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=30)
        connection.putrequest("POST", "/v1/feedback", skip_host=True)
        for name, value in {**self._headers, "content-length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders(body[:cut])
        return connection


@pytest.mark.timeout(400)
def test_each_of_a_thousand_retried_posts_is_trained_once(tmp_path: Path) -> None:
    model, state_dir = make_tiny(tmp_path / "tiny"), tmp_path / "state"
    server = launch(model, state_dir, *OPTIONS)
    try:
        client = attached(server, state_dir)
        keys = load_keys(state_dir)
        posters = [Poster(number, state_dir, keys) for number in range(CLIENTS)]
        for poster in posters:
            poster.start()

        def answered(n: int) -> bool:
            assert not any(poster.failure for poster in posters), [poster.failure for poster in posters]
            return sum(poster.answered for poster in posters) >= n

        wait_for(lambda: answered(300), 200, what="300 lessons")
        client.http.close()
        server.kill()
        server.wait()
        server = launch(model, state_dir, *OPTIONS)
        client = attached(server, state_dir)
        wait_for(lambda: answered(700), 200, what="700 lessons")
        os.kill(wait_for(lambda: learner_pid(client), what="a learner"), signal.SIGKILL)
        wait_for(lambda: answered(CLIENTS * EACH), 200, what="all lessons")
        for poster in posters:
            poster.join()

        def waiting() -> int:
            counts = client.get("/v1/live")["feedback"]
            return int(counts.get("queued", 0) + counts.get("training", 0))

        wait_for(lambda: not waiting(), 200, what="the queue to be learned")
        assert sum(poster.cut for poster in posters) > 30
        assert sum(poster.unheard for poster in posters) > 0, "nobody noticed the restart"
        _check_ids(client, [id for poster in posters for id in poster.ids])
        _check_training(client, state_dir)
        counters = client.get("/v1/live")["counters"]
        assert counters["feedback.accepted"] == CLIENTS * EACH
        heard = sum(poster.statuses.total() for poster in posters)
        assert counters["feedback.duplicate"] >= heard - CLIENTS * EACH
        client.http.close()
    finally:
        end(server, state_dir)
    _check_no_key(state_dir, keys)


def _check_ids(client: Client, ids: list[str]) -> None:
    """Every id is there once, and applied."""
    found: list[dict[str, Any]] = []
    page = client.get("/v1/feedback?limit=300")
    found += page["data"]
    while page["has_more"]:
        page = client.get(f"/v1/feedback?limit=300&after={page['last_id']}")
        found += page["data"]
    assert sorted(item["id"] for item in found) == sorted(ids)
    assert {item["status"] for item in found} == {"applied"}


def _check_training(client: Client, state_dir: Path) -> None:
    """Each item is in one committed job, and in as many others as were lost under it."""
    made = {version["id"]: version for version in versions(client)}
    assert {version["status"] for version in made.values()} <= {"committed", "lost"}
    assert (
        sum(v["report"]["examples"] for v in made.values() if v["status"] == "committed" and v["id"]) == CLIENTS * EACH
    )
    store = Store(state_dir / "insitu.db")
    jobs: dict[str, list[str]] = {}
    events = store.events(after=0, limit=100_000)
    for event in events:
        if event.kind == "version.reserved":
            for id in event.detail.get("feedback", []):
                jobs.setdefault(id, []).append(made[int(event.subject.removeprefix("version "))]["status"])
    assert len(jobs) == CLIENTS * EACH
    assert all(sorted(ends) == ["committed"] + ["lost"] * (len(ends) - 1) for ends in jobs.values())
    attempts = {row["id"]: row["attempts"] for row in store._rows("SELECT id, attempts FROM feedback")}
    assert attempts == {id: len(ends) for id, ends in jobs.items()}
    applied = Counter(event.subject for event in events if event.kind == "feedback.applied")
    assert set(applied.values()) == {1}
    assert {event.kind for event in events} >= {"server.started", "learner.attached", "learner.died"}
    store.close()


def _check_no_key(state_dir: Path, keys: Keys) -> None:
    """Neither in the store nor in a log nor anywhere but in their own file."""
    seen = 0
    for file in state_dir.rglob("*"):
        if file.is_file() and file.name != "keys.json":
            content = file.read_bytes()
            seen += len(content)
            assert keys.learn.encode() not in content, file
            assert keys.api.encode() not in content, file
    assert seen > 100_000
