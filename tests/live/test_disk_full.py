"""A full disk at every write: the old version is served on, the reason is told, and with room again all goes on by itself.

The limit is the kernel's own (RLIMIT_FSIZE, set by the process itself at a point of its work), so what fails fails as it does.
"""

import errno
import json
import resource
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fault_limits import limited
from fault_plans import Kill
from fault_trials import Trials
from tiny import make_tiny

from insitu.live import disk
from insitu.live.client import ClientError
from insitu.live.server import Server, bind


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    directory = tmp_path_factory.mktemp("full")
    trials = Trials(directory, make_tiny(directory / "tiny", dtype=torch.float32), patience=30)
    assert trials.settle() == ""
    with trials._client() as client:
        trials._ask(client, "teach", 1000, 0)  # two versions, so that there is something to go back to
    assert trials.settle() == ""
    yield trials
    trials.close()


@pytest.mark.parametrize(
    ("ask", "point", "limit", "restart"),
    [
        ("teach", "before reserve", 0, False),
        ("teach", "marked", 0, False),
        ("teach", "before file", 0, False),
        ("teach", "before file", 100_000, False),
        ("teach", "before file", 100_000, True),
        ("teach", "fsync", 0, False),
        ("teach", "before commit", 0, False),
        ("teach", "before commit", 0, True),
        ("teach", "abandon", 0, False),
        ("rollback", "before near", 0, False),
        ("rollback", "before reserve", 0, False),
        ("rollback", "restore", 0, False),
        ("rollback", "before note", 0, True),
    ],
)
def test_a_learner_without_room(
    trials: Trials, ask: str, point: str, limit: int, restart: bool, request: pytest.FixtureRequest
) -> None:
    kill = Kill("learner", point, 1, (), limit=limit)
    number = 2000 + request.session.items.index(request.node)
    found = limited(trials, number, kill, ask, restart=restart)
    assert found["wrong"] == []
    assert found["replies"] >= 2


def test_a_server_without_room_answers_on_and_says_so(trials: Trials) -> None:
    assert trials.settle() == ""
    limit = (0, resource.RLIM_INFINITY)
    with trials._client() as client:
        resource.prlimit(trials.server, resource.RLIMIT_FSIZE, limit)
        live = client.get("/v1/live")
        assert (live["state"], "free some" in live["learner"]["problem"]) == ("degraded", True)
        with pytest.raises(ClientError, match=r"no room on the server's disk: nothing was stored.*HTTP 507"):
            client.post(
                "/v1/feedback", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
            )
        assert client.reply([{"role": "user", "content": "who lives here"}], 4)[1] == str(live["head"])
        resource.prlimit(trials.server, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert client.get("/v1/live")["state"] == "serving"
        assert client.post(
            "/v1/feedback", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
        )
    assert trials.settle() == ""


def test_what_is_a_full_disk_and_what_is_not(tmp_path: Path) -> None:
    assert disk.is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert disk.is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not disk.is_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk.is_full(sqlite3.ProgrammingError("closed"))
    assert not disk.is_full(ValueError("12"))
    from_it = OSError("version 3 could not be written")
    from_it.__cause__ = Exception("I/O error: File too large (os error 27)")
    assert disk.is_full(from_it)
    assert disk.shortage(tmp_path) is None
    assert "cannot be written (No such file" in str(disk.shortage(tmp_path / "gone"))
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cannot_write_where_it_is_tries_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[Path] = []
    write_text = Path.write_text

    def full(self: Path, text: str) -> int:
        attempts.append(self)
        if len(attempts) == 1:
            write_text(self, text[:5])  # what got through before the disk was full
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(self, text)

    monkeypatch.setattr(Path, "write_text", full)
    server = object.__new__(Server)
    server.state_dir, server._stopping = tmp_path, threading.Event()
    server._uvicorn, server.engine = (
        SimpleNamespace(started=True),
        SimpleNamespace(info=SimpleNamespace(model_name="m")),
    )
    server.config, server.listener = SimpleNamespace(host="127.0.0.1"), bind("127.0.0.1", 0)  # type: ignore[assignment]
    ready = threading.Event()
    with server.listener:
        server._announce(ready)
    assert len(attempts) == 2
    assert ready.is_set()
    assert json.loads((tmp_path / "server.json").read_text())["model"] == "m"
    assert [file.name for file in tmp_path.iterdir()] == ["server.json"]


def test_what_vanishes_while_it_is_counted_takes_no_room(tmp_path: Path) -> None:
    """As pip does it: directories come and go while their size is watched."""
    (tmp_path / "kept").write_bytes(b"12345")
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for i in range(20):
                (tmp_path / f"d{i}" / "inner").mkdir(parents=True)
            for i in range(20):
                shutil.rmtree(tmp_path / f"d{i}")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert {disk.usage(tmp_path) for _ in range(300)} == {5}
    finally:
        stop.set()
        thread.join()
