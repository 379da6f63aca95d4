"""Somebody's own ``vllm serve``, and learners that come and go beside it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from models import make
from processes import learner_pid, learners, post_lesson, settle, versions, wait_for

from conftest import VLLM_ARGS, Serve
from insitu.live.client import Client, ClientError
from insitu.live.server import bind
from insitu.live.vllm_plugin.worker import WeightClient

pytestmark = pytest.mark.timeout(600)
QUICK = ("--teach.max-steps", "4", "--teach.learning-rate", "1e-3", "--teach.max-canary-kl", "100")
# Long enough to be ended in the middle of.
SLOW = ("--teach.max-steps", "400", "--teach.target-loss", "0", "--teach.learning-rate", "1e-5")
PROVEN = "one element of"  # what the learner's log says of the write probe


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("attach") / "state"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture(scope="module")
def vllm(serve: Serve, state_dir: Path) -> Iterator[Client]:
    """``vllm serve`` without ``insitu serve``: nothing but a load format and two variables."""
    model = make("llama", state_dir.parent / "model")
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--load-format", "insitu"]
    environment = {**os.environ, "INSITU_STATE": str(state_dir), "VLLM_PLUGINS": "insitu", "OMP_NUM_THREADS": "1"}
    with (state_dir / "vllm.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", *VLLM_ARGS.split()],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        (state_dir / "server.json").write_text(f'{{"url": "http://127.0.0.1:{port}", "model": "tiny"}}')
        with Client(state_dir) as client:
            wait_for(lambda: process.poll() is not None or _state(client), 180, "vLLM to answer")
            yield client
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with suppress(ProcessLookupError):  # all of its group have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _state(client: Client) -> str:
    try:
        return str(client.get("/v1/live")["state"])
    except ClientError:
        return ""


@contextmanager
def learning(state_dir: Path, client: Client, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """``insitu serve --attach``, with its learner ready."""
    command = [
        sys.executable,
        "-m",
        "insitu.cli",
        "serve",
        "--attach",
        str(state_dir / "run" / "engine.sock"),
        *options,
    ]
    with (state_dir / "attached.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or learner_pid(client), 120, "the learner to attach")
        assert process.poll() is None, (state_dir / "attached.log").read_text()
        yield process
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0
        assert learners(state_dir) == []


def say(client: Client) -> tuple[str, str]:
    return client.reply([{"role": "user", "content": "who lives here"}], 12)


def test_nobody_is_answered_before_a_learner_has_compared_the_weights(vllm: Client) -> None:
    assert _state(vllm) == "starting"
    for path in ("/health", "/v1/chat/completions", "/tokenize"):
        answer = vllm.http.request("GET" if path == "/health" else "POST", path, json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert "learner" in answer.json()["error"]["message"]


def test_learners_come_and_go_and_the_server_serves_on(vllm: Client, state_dir: Path) -> None:
    log = state_dir / "learner.log"
    with learning(state_dir, vllm, *QUICK):
        first = learner_pid(vllm)
        assert vllm.request("GET", "/health").is_success
        assert log.read_text().count(PROVEN) == 1
        untaught = say(vllm)
        assert untaught[1] == "0"
        assert {item["weight_version"] for item in settle(vllm, post_lesson(vllm))} == {"1"}
        taught = say(vllm)
        assert (taught[0] != untaught[0], taught[1]) == (True, "1")

    wait_for(lambda: vllm.get("/v1/live")["learner"]["state"] == "absent", 30, "the learner's end to be noticed")
    assert vllm.request("GET", "/health").is_success
    assert say(vllm) == taught
    lesson = [{"role": "user", "content": "who is new"}, {"role": "assistant", "content": "a bird"}]
    waiting = post_lesson(vllm, [lesson])
    assert vllm.get(f"/v1/feedback/{waiting[0]}")["status"] == "queued"

    with learning(state_dir, vllm, *QUICK):
        assert learner_pid(vllm) != first
        assert log.read_text().count(PROVEN) == 1, (
            "this server has been proven: nobody writes a probe into live weights"
        )
        (item,) = settle(vllm, waiting)
        assert (item["status"], item["weight_version"]) == ("applied", "2")
        assert say(vllm)[1] == "2"
        assert vllm.post("/v1/live/versions/1/rollback")["status"] == "done"
        assert say(vllm) == (taught[0], "3")
        assert [version["status"] for version in versions(vllm)] == ["committed"] * 4


def test_a_learner_that_is_ended_in_a_trial_leaves_the_committed_version(vllm: Client, state_dir: Path) -> None:
    reply, head = say(vllm), versions(vllm)[-1]
    with learning(state_dir, vllm, *SLOW):
        lost = post_lesson(vllm, [[{"role": "user", "content": "slowly"}, {"role": "assistant", "content": "a snail"}]])
        wait_for(lambda: "+" in vllm.get("/v1/live")["weight_version"], 60, "a trial")
    wait_for(lambda: vllm.get("/v1/live")["learner"]["state"] == "absent", 30, "the learner's end to be noticed")
    with closing(WeightClient(state_dir / "run")) as weights, closing(weights.arena()) as arena:
        assert (arena.header.label, arena.sha256()) == (str(head["id"]), head["sha256"])
    assert say(vllm) == reply
    with learning(state_dir, vllm, *QUICK):
        (item,) = settle(vllm, lost)
        assert item["status"] == "applied"
        assert [version["status"] for version in versions(vllm)[-2:]] == ["lost", "committed"]
