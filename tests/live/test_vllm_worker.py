"""The socket of vLLM's worker: it hands the arena out, to this user only, and there is one for each state directory."""

import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from weight_worker import Worker

from insitu.live import control
from insitu.live.control import ControlServer
from insitu.live.lease import Lease
from insitu.live.vllm_plugin.refusals import RefusedError
from insitu.live.vllm_plugin.worker import SOCKET, WeightClient, WeightServer
from insitu.live.weights import handles
from insitu.live.weights.handles import HandleError


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "state").mkdir(mode=0o700)
    world = Worker(tmp_path / "state")
    yield world
    world.close()


# -- attach ------------------------------------------------------------------------------------------------------------
def test_an_api_server_sees_the_header_and_who_holds_the_weights_without_mapping_them(world: Worker) -> None:
    client = world.connect()
    assert client.pid == os.getpid()
    assert client.num_bytes == world.arena.num_bytes
    assert client.header == world.arena.header
    world.arena.stamp(3, 1)
    assert client.header.label == "3+1"
    world.arena.mark_writing()
    assert client.header.writer == os.getpid()
    assert client.fd != world.arena.fd
    assert os.fstat(client.fd).st_ino == os.fstat(world.arena.fd).st_ino


def test_the_arena_it_hands_on_is_the_same_memory_under_the_checkpoints_names(world: Worker) -> None:
    arena = world.connect().arena()
    assert arena.slots == world.arena.slots
    assert (arena.num_bytes, arena.header) == (world.arena.num_bytes, world.arena.header)
    arena.views()["kv"].fill_(2.5)
    assert (world.arena.views()["kv"] == 2.5).all()
    assert not (world.arena.views()["q"] == 2.5).any()
    arena.close()


def test_a_manifest_may_be_asked_for_again_and_leaves_no_descriptor_open(world: Worker) -> None:
    client = world.connect()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    told = [client.manifest() for _ in range(3)]
    assert {name: told[0][name] for name in world.arena.manifest()} == world.arena.manifest()
    assert told[0] == told[1] == told[2]
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    handles.open_arena(told[0], os.dup(client.fd)).close()


def test_a_learner_is_given_the_workers_memory_through_the_api_server(
    world: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hops: worker, control line of the API server, learner. The API server never maps the weights."""
    monkeypatch.setattr(Lease, "outlive", lambda self: None)
    line = ControlServer(None, world.connect(), tmp_path / "control" / "engine.sock", lambda paused: None)  # type: ignore[arg-type]
    line.start()
    learner = control.EngineClient(tmp_path / "control" / "engine.sock")
    learner.arena.views()["embed"].fill_(-3)
    learner.arena.stamp(8, 2)
    assert (world.arena.views()["embed"] == -3).all()
    assert world.arena.header.label == "8+2"
    assert [slot.name for slot in learner.arena.slots] == ["q", "kv", "embed"]
    line.close()
    learner.close()
    line._thread.join(20)


def test_the_socket_is_for_the_owner_only(world: Worker) -> None:
    assert (world.run_dir / SOCKET).stat().st_mode & 0o777 == 0o600
    assert world.run_dir.stat().st_mode & 0o777 == 0o700


def test_an_api_server_that_went_away_may_come_again(world: Worker) -> None:
    for _ in range(3):
        client = world.connect()
        assert client.refresh() == 3
        client.close()
        world.clients.remove(client)
    assert world.refreshed == 3


def test_where_no_worker_is_connecting_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="does not exist"):
        WeightClient(tmp_path / "nowhere")


# -- what is not our language ------------------------------------------------------------------------------------------
NOT_OURS = [{}, {"do": "pause"}, {"do": None}, {"do": ["attach"]}, {"do": "restore"}, {"do": "restore", "version": "1"}]


@pytest.mark.parametrize("message", NOT_OURS)
def test_an_unknown_command_is_told_and_the_line_goes_on(world: Worker, message: dict[str, object]) -> None:
    with world.raw() as line:
        handles.send(line, message)
        answer, fd = handles.receive(line, want_fd=True)
        assert fd is None
        assert f"unknown command {message.get('do')!r}" in answer["error"]
        handles.send(line, {"do": "refresh"})
        assert handles.receive(line) == ({"done": 3}, None)


@pytest.mark.parametrize("data", [b"", b"\x02", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x03\0\0\0\0\0\0\0{a}"])
def test_nonsense_ends_its_connection_and_not_the_worker(world: Worker, data: bytes) -> None:
    with world.raw() as line:
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):  # if it had not read all of it
            assert line.recv(100) == b""
    assert world.connect().refresh() == 3


def test_another_users_process_gets_no_descriptor(world: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(connection: socket.socket) -> int:
        raise HandleError("the other end belongs to uid 12345")

    line = world.raw()
    other = world.raw()
    with monkeypatch.context() as patched:
        patched.setattr(handles, "check_peer", foreign)
        with socket.socket(socket.AF_UNIX) as stranger:
            patched.chdir(world.run_dir)
            stranger.settimeout(20)
            stranger.connect(SOCKET)
            assert socket.recv_fds(stranger, 100, 4)[:2] == (b"", [])
    line.close()
    other.close()
    assert world.connect().refresh() == 3


def test_a_worker_that_sends_no_descriptor_is_refused(world: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    send = handles.send
    monkeypatch.setattr(handles, "send", lambda line, message, fd=None: send(line, message))
    with pytest.raises(HandleError, match="no descriptor"):
        WeightClient(world.run_dir)


# -- one for each directory --------------------------------------------------------------------------------------------
def test_a_second_worker_on_the_same_directory_is_refused_and_the_first_goes_on(world: Worker) -> None:
    client = world.connect()
    with pytest.raises(RefusedError, match=rf"another vLLM already serves from {world.run_dir.parent}.*INSITU_STATE"):
        WeightServer(world.arena, world.run_dir, lambda: 99, lambda version: None)
    gc.collect()
    assert client.refresh() == 3
    assert world.connect().refresh() == 3  # its socket was not replaced


_WORKER = """
import sys, time
from pathlib import Path
import torch
from insitu.live.vllm_plugin.worker import WeightServer
from insitu.live.weights.arena import Arena, plan

arena = Arena.create(plan([("w", torch.float32, (3,))]))
arena.views()["w"].fill_(1.5)
WeightServer(arena, Path(sys.argv[1]), lambda: int(arena.views()["w"][0]), lambda version: None).start()
print("started", flush=True)
time.sleep(600)
"""


def test_a_worker_in_a_process_of_its_own_shares_its_memory_and_leaves_the_directory_when_it_is_killed(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", _WORKER, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"started\n"
            client = WeightClient(run_dir)
            arena = client.arena()
            assert client.pid == worker.pid
            assert arena.views()["w"].tolist() == [1.5] * 3
            arena.views()["w"][0] = 42
            assert client.refresh() == 42  # the worker sees what was written here
            with pytest.raises(RefusedError, match="already serves"):
                WeightServer(arena, run_dir, lambda: 0, lambda version: None)
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            with pytest.raises(ConnectionError):
                client.refresh()
            assert arena.views()["w"][0] == 42  # the memory outlives it
            successor = WeightServer(arena, run_dir, lambda: 7, lambda version: None)  # and the directory is free
            successor._listener.close()
            successor._lock.close()
            arena.close()
            client.close()
        finally:
            worker.kill()
