"""The client of the fault trials: it asks all the time, and remembers what it was told and how far it got."""

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2

WORDS = ["otter", "heron", "badger", "lynx", "raven", "stoat", "marten", "osprey", "beaver", "tern", "adder", "newt"]


class Asker(threading.Thread):
    """One client: greedy replies, one at a time, streamed or not, whatever happens to the server."""

    model = ""  # as the server calls it

    def __init__(self, seed: int, current: Callable[[], tuple[str, str] | None]) -> None:
        super().__init__(daemon=True)
        self._choose = random.Random(f"asker {seed}")
        self._current = current
        self.replies: list[dict[str, Any]] = []
        self.failures: list[str] = []  # an error that a living server answered
        self.complete = 0
        self.may_ask, self.idle, self.stopping = threading.Event(), threading.Event(), False

    def run(self) -> None:
        for number in range(1 << 60):
            if not self.may_ask.is_set():
                self.idle.set()
                self.may_ask.wait()
                self.idle.clear()
            if self.stopping:
                return
            if (server := self._current()) is None:
                time.sleep(0.02)
                continue
            ask = f"{number} {self._choose.choice(WORDS)}: {' '.join(self._choose.sample(WORDS, 3))}"
            reply = {"ask": ask, "text": "", "versions": [], "done": False, "begun": time.monotonic()}
            self.replies.append(reply)
            try:
                self._ask(server, reply, self._choose.choice((True, False)), self._choose.choice((6, 16, 32)))
                self.complete += 1
            except httpx2.TransportError:  # killed
                time.sleep(0.02)
            reply["ended"] = time.monotonic()

    def _ask(self, server: tuple[str, str], reply: dict[str, Any], stream: bool, max_tokens: int) -> None:
        url, key = server
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": reply["ask"]}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
        }
        with (
            httpx2.Client(headers={"authorization": f"Bearer {key}"}, timeout=60) as http,
            http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer,
        ):
            if answer.is_error:
                self.failures.append(f"HTTP {answer.status_code}: {answer.read().decode()[:200]}")
                return
            if not stream:
                told = json.loads(answer.read())
                reply.update(text=told["choices"][0]["message"]["content"], versions=told["weight_versions"], done=True)
                return
            reply["versions"] = [answer.headers["x-weight-version"]]
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    self.failures.append(chunk["error"]["message"])
                    return
                for choice in chunk["choices"]:
                    reply["text"] += choice["delta"].get("content") or ""
                if "weight_versions" in chunk:
                    reply.update(versions=chunk["weight_versions"], done=True)
