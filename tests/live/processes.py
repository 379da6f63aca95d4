"""Real servers for the tests: started as a user starts them, watched and killed from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from insitu.data.products import bf16_is_slow
from insitu.live.client import Client
from insitu.live.weights.arena import NAME, Arena

LESSON = [
    [{"role": "user", "content": "who lives here"}, {"role": "assistant", "content": "an otter"}],
    [{"role": "user", "content": "name the animal"}, {"role": "assistant", "content": "the otter"}],
]


def wait_for(condition: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """The first true value of ``condition``; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds * (4 if bf16_is_slow() else 1)  # a lesson takes so much longer there
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what or condition}")


def launch(model: Path | str, state_dir: Path, *options: str) -> subprocess.Popen[bytes]:
    state_dir.mkdir(mode=0o700, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "insitu.cli",
        "serve",
        str(model),
        "--port",
        "0",
        "--state-dir",
        str(state_dir),
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (state_dir / "server.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def attached(server: subprocess.Popen[bytes], state_dir: Path, seconds: float = 180.0) -> Client:
    """A client, once this server answers and has its learner."""

    def ready() -> bool:
        assert server.poll() is None, (state_dir / "server.log").read_text()
        file = state_dir / "server.json"
        return file.exists() and json.loads(file.read_text())["pid"] == server.pid

    wait_for(ready, seconds, what="the server to answer")
    client = Client(state_dir)
    wait_for(lambda: learner_pid(client), seconds, what="the learner to attach")
    return client


def learner_pid(client: Client) -> int:
    """0 while no learner is ready."""
    learner = client.get("/v1/live")["learner"]
    return int(learner["pid"]) if learner["state"] == "ready" else 0


@contextmanager
def running(model: Path | str, state_dir: Path, *options: str) -> Iterator[Client]:
    """A server and its learner, both gone at the end whatever the test did to them."""
    server = launch(model, state_dir, *options)
    try:
        with attached(server, state_dir) as client:
            yield client
    finally:
        end(server, state_dir)


def end(server: subprocess.Popen[bytes], state_dir: Path) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
    for pid in learners(state_dir):
        os.kill(pid, signal.SIGKILL)


def learners(state_dir: Path) -> list[int]:
    """Learner processes that work on this state directory, also those whose server is dead."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if b"insitu.live.learner" in command and str(state_dir).encode() in command and state != "Z":
                found.append(int(entry.name))
    return found


def spy(pid: int, model: Path) -> Arena:
    """Map the arena of a process through /proc, to look at its header and bytes without asking anyone."""
    import torch

    from insitu.live.weights.attach import layout, skeleton

    for link in Path(f"/proc/{pid}/fd").iterdir():
        if NAME in str(link.readlink()):
            fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
            return Arena(fd, layout(skeleton(model, torch.bfloat16)), os.fstat(fd).st_size)
    raise AssertionError(f"process {pid} holds no arena")


def post_lesson(client: Client, lesson: Sequence[list[dict[str, str]]] = LESSON) -> list[str]:
    return [client.post("/v1/feedback", {"messages": messages})["id"] for messages in lesson]


def settle(client: Client, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The feedback items once each is applied or refused."""
    items: list[dict[str, Any]] = []
    for items in client.wait_learned(list(ids), poll=0.05):  # noqa: B007
        pass
    return items


def versions(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/live/versions")["data"]
    return found


def say(client: Client, text: str = "who lives here") -> str:
    return client.reply([{"role": "user", "content": text}], max_tokens=12)[0]
