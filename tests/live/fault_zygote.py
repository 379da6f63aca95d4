"""A process that has imported everything and started nothing: server, learner and checker are forked from it in milliseconds.

``python fault_zygote.py SIDE OPTIONS_JSON`` answers on ``SIDE/zygote.sock``: a role in, a pid out. What it forked dies with it.
"""

import ctypes
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import fault_check
import fault_points
import torch
import uvicorn  # noqa: F401 - imported for the children
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

from insitu.live import learner, prompts
from insitu.live import server as server_module
from insitu.live.config import TeachConfig
from insitu.live.keeper import LearnerKeeper


class Impatient(threading.Event):
    """A tenth of every wait: deaths are what this is about, so nobody backs off."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(None if timeout is None else min(timeout, 0.5) / 10)


class Forked:
    """What ``Popen`` is to the keeper, of a process that the zygote forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        try:
            self._process = os.pidfd_open(pid)
        except ProcessLookupError:
            self._process, self.returncode = -1, -9

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._process], [], [], 0)[0]:
            self.returncode = -9
        return self.returncode

    def terminate(self) -> None:
        if self._process >= 0:
            signal.pidfd_send_signal(self._process, signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        if self._process >= 0:
            select.select([self._process], [], [], timeout)
        return 0

    kill = terminate


def start(side: Path, role: str) -> int:
    """Ask the zygote for a process of this role."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(side / "zygote.sock"))
        line.sendall(role.encode())
        line.shutdown(socket.SHUT_WR)
        return int(line.recv(32))


def serve(side: Path, options: dict[str, Any]) -> None:
    class Keeper(LearnerKeeper):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._stopping = Impatient()

        def _start(self) -> Any:
            return Forked(start(side, "learner"))

    server_module.LearnerKeeper = Keeper  # type: ignore[misc]
    state_dir = Path((side / "state_dir").read_text())
    server_module.Server(options["model"], fault_check.serve_config(state_dir, options)).run()


def learn(side: Path, options: dict[str, Any]) -> None:
    # One thread in the writes too: two that wait for each other on a busy machine take far longer.
    os.sched_getaffinity = lambda pid: {0}  # type: ignore[assignment]
    learner._GATHER_SECONDS, learner._ROOM_SECONDS = 0.05, 0.1
    prompts.ANCHORS = prompts.ANCHORS[:4]  # a job's time is nearly all theirs
    prompts.CANARIES = prompts.CANARIES[:4]
    learner.run(Path((side / "state_dir").read_text()), TeachConfig(**options["teach"]))


def child(side: Path, options: dict[str, Any], role: str) -> None:
    log = os.open(side / f"{role}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s", force=True)
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if role == "checker":
        fault_check.answer(side, options)
        return
    fault_points.mutate(options["mutant"])
    points = fault_points.Points(role, side)
    if role == "server":
        fault_points.in_server(points)
        serve(side, options)
    else:
        fault_points.in_learner(points)
        learn(side, options)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    side, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    die_with_parent()
    torch.set_num_threads(1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(side / "zygote.partial"))
        listener.listen(8)
        (side / "zygote.partial").rename(side / "zygote.sock")
        listener.settimeout(0.05)
        while True:
            while _reaped():
                pass
            try:
                line, _ = listener.accept()
            except TimeoutError:
                continue
            with line:
                role = line.recv(32).decode()
                if (pid := os.fork()) == 0:
                    listener.close()
                    code = 1
                    try:
                        die_with_parent()
                        child(side, options, role)
                        code = 0
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(code)
                line.sendall(str(pid).encode())


def _reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


if __name__ == "__main__":
    main()
