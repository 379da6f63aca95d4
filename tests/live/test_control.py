"""The line between learner and server: commands and refusals, and a lease that ends only with the learner's process."""

import json
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu.live import lease
from insitu.live.config import ServeConfig
from insitu.live.control import ControlError, ControlServer, EngineClient, HeldError, holder
from insitu.live.engines.base import Engine, EngineError, EngineInfo, PublishReport, SamplingParams, Token
from insitu.live.server import StartError, lock
from insitu.live.vllm_server import keep_learner
from insitu.live.weights import handles
from insitu.live.weights.arena import Arena, plan

PATIENCE = 20.0  # seconds for what must happen; nothing here takes one


class FakeEngine(Engine):
    """Notes what it is told; ``fail`` maps a command to the exception that it raises."""

    def __init__(self) -> None:
        self.info = EngineInfo("tiny", 256, (2,))
        self.calls: list[Any] = []
        self.fail: dict[str, Exception] = {}

    def _note(self, name: str, *what: Any) -> None:
        self.calls.append((name, *what))
        if name in self.fail:
            raise self.fail[name]

    def start(self) -> None:
        self._note("start")

    def close(self) -> None:
        self._note("close")

    def healthy(self) -> bool:
        return True

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[Token]:
        self._note("generate", list(prompt_ids), params)
        for i in range(min(3, params.max_tokens)):
            yield Token(sum(prompt_ids) + i, -0.5, (), "0")

    def score(self, ids: Sequence[int], top: int = 0) -> list[Token]:
        self._note("score", list(ids))
        return [Token(i, -i / 3, (), "0") for i in ids[1:]]

    def pause(self) -> None:
        self._note("pause")

    def publish(self, version: str) -> PublishReport:
        self._note("publish", version)
        return PublishReport(version, recomputed=3, seconds=0.25)

    def resume(self) -> None:
        self._note("resume")

    @property
    def version(self) -> str:
        return "0"


class World:
    """A control server over a fake engine, and what it reported of learners that went away."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "run" / "engine.sock"
        self.engine = FakeEngine()
        self.arena = Arena.create(plan([("a", torch.bfloat16, (3, 5)), ("b", torch.float32, (4,))]))
        self.gone: queue.Queue[bool] = queue.Queue()
        self.when_gone: Callable[[], Any] = lambda: None
        self.server = ControlServer(self.engine, self.arena, self.path, self._on_writer_gone)

    def _on_writer_gone(self, paused: bool) -> None:
        self.when_gone()
        self.gone.put(paused)

    def end(self) -> None:
        self.server.close()
        if self.server._thread.ident is not None:
            self.server._thread.join(PATIENCE)
            assert not self.server._thread.is_alive()
        self.arena.close()


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[World]:
    """Listens, and does not answer before ``server.start()``."""
    world = World(tmp_path)
    yield world
    world.end()


@pytest.fixture
def world(idle: World) -> World:
    idle.server.start()
    return idle


@pytest.fixture
def client(world: World) -> Iterator[EngineClient]:
    """A learner in this process. Its lease would end with the tests themselves, so the server is closed before it is."""
    client = EngineClient(world.path)
    yield client
    world.server.close()
    client.close()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections of this process may break without the wait for its end."""
    monkeypatch.setattr(lease.Lease, "outlive", lambda self: None)


# A learner without torch, for what only a process of its own can show. It does as it is told, one line a command.
_LEARNER = """
import json, os, socket, struct, sys
line = socket.socket(socket.AF_UNIX)
line.connect(sys.argv[1])
def ask(**message):
    body = json.dumps(message).encode()
    line.sendall(struct.pack("<Q", len(body)) + body)
    size = struct.unpack("<Q", line.recv(8, socket.MSG_WAITALL))[0]
    return json.loads(line.recv(size, socket.MSG_WAITALL))
held = ask(do="attach").get("error", "")  # the descriptor that comes with the answer is dropped
print("connected" if not held else held, flush=True)
for wish in sys.stdin:
    if wish == '{"do": "hang up"}\\n':
        line.close()
        print("{}", flush=True)
    else:
        print(json.dumps(ask(**json.loads(wish))), flush=True)
"""


class Process:
    """A learner in a process of its own."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-S", "-c", _LEARNER, path.name]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=path.parent
        )
        self.pid = self.popen.pid
        self._lease = os.pidfd_open(self.pid)

    def attach(self) -> str:
        """What it was told: "connected", or why not."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def begin(self, message: dict[str, Any]) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(message) + "\n")
        self.popen.stdin.flush()

    def answer(self, timeout: float = PATIENCE) -> Any:
        assert self.popen.stdout is not None
        ready, _, _ = select.select([self.popen.stdout], [], [], timeout)
        return json.loads(self.popen.stdout.readline()) if ready else None

    def say(self, message: dict[str, Any]) -> Any:
        self.begin(message)
        return self.answer()

    def ask(self, wish: str) -> Any:
        return self.say({"do": wish})

    def ended(self) -> bool:
        return bool(select.select([self._lease], [], [], 0)[0])

    def close(self) -> None:
        self.popen.kill()
        with suppress(BrokenPipeError):
            self.popen.__exit__(None, None, None)
        os.close(self._lease)


@contextmanager
def learner(world: World) -> Iterator[Process]:
    process = Process(world.path)
    try:
        assert process.attach() == "connected"
        yield process
    finally:
        process.close()


# -- commands ----------------------------------------------------------------------------------------------------------
def test_attaching_gives_the_same_bytes(world: World, client: EngineClient) -> None:
    assert client.arena.slots == world.arena.slots
    assert client.arena.fd != world.arena.fd
    world.arena.views()["b"].copy_(torch.tensor([1.0, -2.0, 3.5, 4.0]))
    assert client.arena.views()["b"].tolist() == [1.0, -2.0, 3.5, 4.0]
    client.arena.views()["a"].fill_(7)
    assert client.arena.sha256() == world.arena.sha256()
    client.arena.stamp(3, 1)
    assert world.arena.header.label == "3+1"
    assert world.arena.header.epoch == client.arena.header.epoch


def test_each_command_reaches_the_engine_and_its_answer_the_learner(world: World, client: EngineClient) -> None:
    client.pause()
    client.arena.stamp(3, 2)
    assert client.publish() == PublishReport("3+2", recomputed=3, seconds=0.25)
    client.resume()
    assert client.score([5, 6, 7]) == [-6 / 3, -7 / 3]
    assert client.generate([[1, 2], [10]], max_tokens=2) == [[3, 4], [10, 11]]
    greedy = SamplingParams(max_tokens=2, temperature=0.0, stop_token_ids=(2,))
    assert world.engine.calls == [
        ("pause",),
        ("publish", "3+2"),
        ("resume",),
        ("score", [5, 6, 7]),
        ("generate", [1, 2], greedy),
        ("generate", [10], greedy),
    ]


def test_the_server_knows_its_learner_and_whether_it_is_ready_and_has_paused(
    world: World, client: EngineClient
) -> None:
    def facts() -> tuple[int | None, bool, bool]:
        return world.server.learner_pid, world.server.learner_ready, world.server.paused

    assert facts() == (os.getpid(), False, False)
    client.ready()
    assert facts() == (os.getpid(), True, False)
    client.pause()
    assert facts() == (os.getpid(), True, True)
    client.resume()
    assert facts() == (os.getpid(), True, False)


# -- proof -------------------------------------------------------------------------------------------------------------
def test_a_server_is_proven_unless_it_says_otherwise_and_the_learner_is_told(
    world: World, client: EngineClient
) -> None:
    assert world.server.proven is True
    assert client.proven is True
    assert world.server.refusal is None


@pytest.mark.usefixtures("in_this_process")
def test_a_server_that_is_not_proven_says_so_until_a_learner_was_ready(idle: World) -> None:
    idle.server.proven = False
    idle.server.start()
    for _ in range(2):  # one that goes away without a word proves nothing
        first = attach(idle)
        assert first.proven is False
        first.pause()
        first.arena.stamp(0, 1)
        first.publish()
        first.resume()
        assert idle.server.proven is False
        first.close()
        assert idle.gone.get(timeout=PATIENCE) is False
    second = attach(idle)
    assert second.proven is False
    second.ready()
    assert idle.server.proven is True
    assert second.proven is False  # what it was told when it attached
    second.close()
    assert idle.gone.get(timeout=PATIENCE) is False
    third = attach(idle)
    assert (third.proven, idle.server.learner_ready) == (True, False)
    idle.server.close()
    third.close()


@pytest.mark.usefixtures("in_this_process")
def test_a_refusal_is_kept_when_its_learner_ends_and_taken_back_by_one_that_is_ready(idle: World) -> None:
    idle.server.proven = False
    idle.server.start()
    first = EngineClient(idle.path)
    first.refuse("'lm_head.weight' is a private copy")
    first.close()
    assert idle.gone.get(timeout=PATIENCE) is False
    assert (idle.server.refusal, idle.server.proven) == ("'lm_head.weight' is a private copy", False)
    second = attach(idle)
    assert idle.server.refusal is not None  # attaching alone takes nothing back
    second.refuse("another reason")
    assert (idle.server.refusal, idle.server.proven, idle.server.learner_ready) == ("another reason", False, False)
    second.ready()
    assert (idle.server.refusal, idle.server.proven, idle.server.learner_ready) == (None, True, True)
    assert idle.engine.calls == []  # none of this is the engine's business
    idle.server.close()
    second.close()


def test_a_refusal_by_a_later_learner_does_not_unprove_the_server(world: World, client: EngineClient) -> None:
    client.ready()
    client.refuse("the version's file is gone")
    assert (world.server.refusal, world.server.proven) == ("the version's file is gone", True)


def test_a_server_of_an_earlier_insitu_that_does_not_say_is_not_proven(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = handles.send

    def without(connection: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
        send(connection, {k: v for k, v in message.items() if k != "proven"}, fd)

    monkeypatch.setattr(handles, "send", without)
    client = EngineClient(world.path)
    assert client.proven is False
    world.server.close()
    client.close()


# -- what goes wrong ---------------------------------------------------------------------------------------------------
def test_what_the_engine_raises_arrives_as_a_control_error_and_the_server_goes_on(
    world: World, client: EngineClient
) -> None:
    asked: dict[str, Callable[[], Any]] = {
        "pause": client.pause,
        "publish": client.publish,
        "resume": client.resume,
        "score": lambda: client.score([1, 2]),
        "generate": lambda: client.generate([[1]], 2),
    }
    for name, ask in asked.items():
        world.engine.fail = {name: EngineError(f"{name} does not work")}
        with pytest.raises(ControlError, match=f"EngineError: {name} does not work"):
            ask()
    assert not world.server.paused
    world.engine.fail = {}
    assert client.score([1, 2]) == [-2 / 3]


def test_publishing_while_the_header_says_that_a_write_goes_on_is_refused(world: World, client: EngineClient) -> None:
    client.pause()
    client.arena.mark_writing()
    with pytest.raises(ControlError, match="stamp it before publishing"):
        client.publish()
    assert world.engine.calls == [("pause",)]
    client.arena.stamp(0, 1)
    client.publish()
    assert world.engine.calls == [("pause",), ("publish", "0+1")]


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"do": "stop"},
        {"do": None},
        {"do": ["pause"]},
        {"do": "refuse"},
        {"do": "refuse", "reason": 5},
        {"do": "score"},
        {"do": "score", "ids": 5},
        {"do": "generate", "prompts": [[1]]},
        {"do": "generate", "prompts": [5], "max_tokens": 3},
        {"do": "generate", "prompts": [[1]], "max_tokens": "3"},
    ],
    ids=json.dumps,
)
def test_a_command_that_makes_no_sense_is_refused_and_the_server_goes_on(
    world: World, client: EngineClient, message: dict[str, Any]
) -> None:
    with pytest.raises(ControlError):
        client._ask(**message)
    client.pause()
    assert world.server.paused


# -- lives and deaths --------------------------------------------------------------------------------------------------
def test_server_gone_turns_true_when_the_server_closes(world: World, client: EngineClient) -> None:
    assert not client.server_gone()
    handles.send(client._socket, {"do": "pause"})
    assert _soon(lambda: world.server.paused)
    select.select([client._socket], [], [], PATIENCE)
    assert not client.server_gone()  # an answer that nobody has read yet is no end
    assert handles.receive(client._socket) == ({}, None)
    world.server.close()
    world.server._thread.join(PATIENCE)
    assert client.server_gone()
    for ask in (client.resume, client.publish, client.ready, lambda: client.score([1, 2])):
        with pytest.raises(ConnectionError):
            ask()
    assert world.gone.empty()  # the server ends: nobody is left to repair for


def test_where_no_server_is_connecting_is_an_os_error(world: World) -> None:
    world.server.close()
    with pytest.raises(OSError, match="refused"):
        EngineClient(world.path)


def test_a_learner_killed_while_paused_is_reported_only_after_its_process_ended(world: World) -> None:
    with learner(world) as process:
        assert (process.ask("ready"), process.ask("pause")) == ({}, {})
        assert world.server.learner_ready
        ended: list[bool] = []
        world.when_gone = lambda: ended.append(process.ended())
        os.kill(process.pid, signal.SIGKILL)
        assert world.gone.get(timeout=PATIENCE) is True
        assert ended == [True]
    assert (world.server.paused, world.server.learner_ready, world.server.learner_pid) == (False, False, None)


def test_a_learner_that_had_resumed_is_reported_as_not_paused(world: World) -> None:
    with learner(world) as process:
        assert (process.ask("pause"), process.ask("resume")) == ({}, {})
    assert world.gone.get(timeout=PATIENCE) is False


def test_a_learner_that_hangs_up_and_lives_on_keeps_the_lease_until_it_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_GRACE_SECONDS", 60)
    with learner(world) as process:
        assert process.ask("pause") == {}
        process.ask("hang up")
        with pytest.raises(queue.Empty):
            world.gone.get(timeout=0.5)
        assert world.server.paused  # nobody is answered from weights that it may still be writing
        assert not process.ended()
        process.popen.terminate()
        assert world.gone.get(timeout=PATIENCE) is True
        assert process.ended()


def test_a_learner_that_hangs_up_and_does_not_end_is_killed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_GRACE_SECONDS", 0.2)
    with learner(world) as process:
        ended: list[bool] = []
        world.when_gone = lambda: ended.append(process.ended())
        assert process.ask("pause") == {}
        process.ask("hang up")
        assert world.gone.get(timeout=PATIENCE) is True
        assert ended == [True]
        assert process.popen.wait(PATIENCE) == -signal.SIGKILL


def test_a_second_learner_is_told_at_once_who_has_the_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_GRACE_SECONDS", 60)
    assert holder(world.path) is None
    with learner(world) as first:
        assert first.ask("pause") == {}
        assert holder(world.path) == first.pid
        told = f"the weights are lent to process {first.pid}: end it, or wait until what it left behind is undone"
        with pytest.raises(HeldError) as refused:
            EngineClient(world.path)
        assert str(refused.value) == told
        second = Process(world.path)
        assert second.attach() == told
        assert second.ask("attach") == {"error": told, "code": 409}
        assert "attach first" in second.ask("resume")["error"]  # it may not meddle either
        first.ask("hang up")
        assert second.ask("attach")["code"] == 409  # until the first one's process has ended
        during: list[Any] = []
        world.when_gone = lambda: during.append(second.ask("attach")["code"])  # and what it left behind is repaired
        os.kill(first.pid, signal.SIGKILL)
        assert world.gone.get(timeout=PATIENCE) is True
        assert during == [409]
        assert _soon(lambda: second.ask("attach").get("format") == 1)
        assert (world.server.learner_pid, holder(world.path)) == (second.pid, second.pid)
        world.when_gone = lambda: None
        second.close()
    assert world.gone.get(timeout=PATIENCE) is False
    assert world.engine.calls == [("pause",)]


def test_a_learner_started_by_hand_beside_another_ends_with_one_line(world: World) -> None:
    with learner(world) as first, pytest.raises(StartError) as told:
        keep_learner(world.path, ServeConfig())
    assert str(told.value) == f"process {first.pid} already trains these weights; only one learner may: end it first"
    assert world.gone.get(timeout=PATIENCE) is False
    assert _soon(lambda: holder(world.path) is None)
    with (
        lock(world.path.parent.parent / "learner.lock", world.path),
        pytest.raises(StartError, match="a learner already"),
    ):
        keep_learner(world.path, ServeConfig())  # one that has not attached yet
    world.server.close()
    with pytest.raises(StartError, match="start the server first"):
        keep_learner(world.path, ServeConfig())


def test_of_many_that_attach_at_once_exactly_one_gets_the_weights(world: World) -> None:
    for _ in range(5):
        racing = [Process(world.path) for _ in range(8)]
        try:
            told = [process.attach() for process in racing]
            (winner,) = [process for process, word in zip(racing, told, strict=True) if word == "connected"]
            assert sum(f"process {winner.pid}" in word for word in told) == len(racing) - 1
            assert world.server.learner_pid == winner.pid
        finally:
            for process in racing:
                process.close()
        assert world.gone.get(timeout=PATIENCE) is False
        assert world.gone.empty()
        assert _soon(lambda: holder(world.path) is None)


def test_asking_who_has_the_weights_takes_no_lease(world: World) -> None:
    for _ in range(3):
        assert holder(world.path) is None
    with handles.connect(world.path) as line:
        handles.send(line, {"do": "pause"})
        assert "attach first" in handles.receive(line)[0]["error"]
    assert world.gone.empty()
    assert world.engine.calls == []


def test_a_problem_is_known_until_it_is_over_or_its_learner_is_gone(world: World) -> None:
    with learner(world) as process:
        assert process.ask("ready") == {}
        assert world.server.problem is None
        process.say({"do": "degraded", "reason": "no room"})
        assert (world.server.problem, world.server.learner_ready) == ("no room", True)
        process.say({"do": "degraded", "reason": None})
        assert world.server.problem is None
        process.say({"do": "degraded", "reason": "no room"})
    assert world.gone.get(timeout=PATIENCE) is False
    assert world.server.problem is None


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    "data",
    [b"", b"\x02", b"\xff" * 64, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 40_000) + b"[" * 40_000],
    ids=["nothing", "half a length", "a huge length", "no object", "too deep"],
)
def test_nonsense_ends_the_connection_and_not_the_server(world: World, data: bytes) -> None:
    with handles.connect(world.path) as line:
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):  # what it had not read is answered with a reset
            assert line.recv(1) == b""
    assert world.gone.empty()  # it had not attached
    client = EngineClient(world.path)
    client.pause()
    assert world.server.paused
    world.server.close()
    client.close()


def test_a_learner_that_died_before_it_was_answered_does_not_end_the_server(idle: World) -> None:
    process = Process(idle.path)
    process.close()  # connected perhaps, killed and reaped while nobody answered
    idle.server.start()
    with learner(idle) as process:
        assert process.ask("pause") == {}
    assert idle.gone.get(timeout=PATIENCE) is True


@pytest.mark.usefixtures("in_this_process")
def test_another_users_process_gets_no_answer_and_no_descriptor(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = struct.pack("3i", os.getpid(), os.getuid() + 1, 0)
    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "getsockopt", lambda *_: peer)
        patched.chdir(world.path.parent)
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(PATIENCE)
            line.connect(world.path.name)
            with suppress(ConnectionError):
                handles.send(line, {"do": "attach"})
                data, fds, _, _ = socket.recv_fds(line, 4096, 4)
                assert (data, fds) == (b"", [])
    assert world.engine.calls == []
    client = EngineClient(world.path)
    client.pause()
    world.server.close()
    client.close()


def test_a_handle_that_is_refused_leaves_no_descriptor_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease.Lease, "outlive", lambda self: None)
    monkeypatch.setattr(Arena, "manifest", lambda arena: {"format": 9})
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(handles.HandleError, match="format 9"):
        EngineClient(world.path)
    assert world.gone.get(timeout=PATIENCE) is False
    assert _soon(lambda: len(os.listdir("/proc/self/fd")) == before)  # noqa: PTH208


def attach(world: World) -> EngineClient:
    """As soon as the lease is free: a learner that is gone is reported a moment before."""
    assert _soon(lambda: holder(world.path) is None)
    return EngineClient(world.path)


def _soon(condition: Callable[[], bool]) -> bool:
    waited = threading.Event()
    for _ in range(200):
        if condition():
            return True
        waited.wait(0.01)
    return False
