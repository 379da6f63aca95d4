"""A small HTTP client of an insitu server, for the command line and the demo. It finds URL and keys in the state directory."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from insitu.live.keys import load_keys

# Time to answer one request; a long generation on a slow machine is no error.
_TIMEOUT = httpx2.Timeout(600, connect=5)
_PATIENCE = 600.0  # seconds


class ClientError(RuntimeError):
    """The server is not there, or said no; the message is fit to be shown."""


class Client:
    """Speaks to the server of one state directory with its learn key."""

    def __init__(self, state_dir: Path) -> None:
        file = state_dir / "server.json"
        if not file.exists():
            raise ClientError(
                f"no server runs on {state_dir}; start one with: insitu serve smollm2 --state-dir {state_dir}"
            )
        self.facts: dict[str, Any] = json.loads(file.read_text())
        keys = load_keys(state_dir)
        self.http = httpx2.Client(
            base_url=self.facts["url"], headers={"authorization": f"Bearer {keys.learn}"}, timeout=_TIMEOUT
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()

    def request(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        """Raises ClientError with the server's own message unless the answer is a success.

        A server that is asked too much (429) says when to come again; that is done for up to ten minutes.
        """
        content = body if body is not None or method in ("GET", "DELETE") else {}
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                answer = self.http.request(method, path, json=content)
            except httpx2.TransportError as error:
                raise ClientError(f"the server at {self.facts['url']} does not answer: {error}") from error
            wait = answer.headers.get("retry-after", "") if answer.status_code == 429 else ""
            if not (wait.isascii() and wait.isdigit()) or time.monotonic() + int(wait) > until:
                break
            time.sleep(int(wait))
        if answer.is_error:
            raise ClientError(_message(answer))
        return answer

    def get(self, path: str) -> Any:
        return self.request("GET", path).json()

    def post(self, path: str, body: Any = None) -> Any:
        return self.request("POST", path, body).json()

    def reply(self, messages: list[dict[str, str]], max_tokens: int, temperature: float = 0.0) -> tuple[str, str]:
        """The assistant's reply and the version of the weights that wrote it."""
        body = {
            "model": self.facts["model"],
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        answer = self.request("POST", "/v1/chat/completions", body)
        return str(answer.json()["choices"][0]["message"]["content"]), answer.headers["x-weight-version"]

    def stream(self, messages: list[dict[str, str]], max_tokens: int, temperature: float) -> Iterator[str]:
        """The reply piece by piece."""
        body = {
            "model": self.facts["model"],
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
        }
        with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.is_error:
                answer.read()
                raise ClientError(_message(answer))
            for line in answer.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[len("data: ") :])
                if "error" in chunk:
                    raise ClientError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""

    def wait_learned(self, ids: list[str], poll: float = 0.2) -> Iterator[list[dict[str, Any]]]:
        """The items that neither wait nor are in training any more, again and again until that is all of them, in the
        order of ``ids``. Jobs take items in order of arrival, so no more is asked once one is found that still waits."""
        done: dict[str, dict[str, Any]] = {}
        waiting = list(dict.fromkeys(ids))
        while True:
            while waiting:
                item = self.get(f"/v1/feedback/{waiting[0]}")
                if item["status"] in ("queued", "training"):
                    break
                done[waiting.pop(0)] = item
            yield [done[id] for id in ids if id in done]
            if not waiting:
                return
            time.sleep(poll)


def _message(answer: httpx2.Response) -> str:
    try:
        return f"{answer.json()['error']['message']} (HTTP {answer.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}: {answer.text[:200]}"
