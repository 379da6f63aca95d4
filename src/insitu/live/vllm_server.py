"""``insitu serve --engine vllm``: vLLM as a child with the weights in the arena, a learner beside it, and both watched.

vLLM's own application is the front door, with our keys, gate and routes in it (:mod:`insitu.live.vllm_plugin.endpoint`). This
process only starts, watches and ends things; when vLLM dies it is started again and comes up with the last committed version.
"""

import argparse
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx2

from insitu.live import packaged, source
from insitu.live.config import FEEDBACK_PER_MINUTE, MAX_QUEUE, ServeConfig
from insitu.live.control import holder
from insitu.live.events import note
from insitu.live.keeper import LearnerKeeper, held
from insitu.live.keys import Keys, load_keys
from insitu.live.server import StartError, bind, lock
from insitu.live.state import open_store, state_directory
from insitu.live.weights import handles

log = logging.getLogger("insitu.server")

PARENT = "INSITU_PARENT"  # pid of the process without which vLLM is to end
_END_SECONDS = 20.0
_CACHE_GIB = "2"


class VLLMServer:
    """One life of ``insitu serve --engine vllm`` over one state directory."""

    def __init__(self, model: str, config: ServeConfig) -> None:
        if find_spec("vllm") is None:
            raise StartError(
                "--engine vllm needs vLLM in this environment; see docs/guide/vllm.md, or leave --engine out"
            )
        self.config = config
        self.model_name = model if model == packaged.SMOLLM2 else Path(model).name
        self.state_dir = state_directory(config.state_dir)
        self._lock = lock(self.state_dir / "server.lock", self.state_dir)
        with bind(config.host, config.port) as listener:  # a port in use is told at once; vLLM binds it again
            self.port = listener.getsockname()[1]
        _refuse_ranks(config.vllm_args)
        self.keys = load_keys(self.state_dir)
        self.store = open_store(self.state_dir)  # a damaged one is told before vLLM is started
        self.base = source.resolve(model, yes=config.yes)
        cores = sorted(os.sched_getaffinity(0))
        serving = cores[: config.threads or max(1, len(cores) // 2)]
        learning = [core for core in cores if core not in serving] or cores
        self._serving_cores = ",".join(map(str, serving))
        self._keeper = LearnerKeeper(self.state_dir, config.teach, len(learning), learning)
        self._stopping = threading.Event()
        self._vllm: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "::") else self.config.host  # noqa: S104
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serve until :meth:`stop`, SIGINT or SIGTERM."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        delay, was_ready = 1.0, False
        try:
            self._keeper.start()
            while not self._stopping.is_set():
                started = time.monotonic()
                self._vllm = self._start()
                if self._wait_until_ready():
                    was_ready = True
                    self._announce()
                    self._wait_for_end()
                if self._stopping.is_set():
                    return
                (self.state_dir / "server.json").unlink(missing_ok=True)
                code, why = self._vllm.wait(), self._last_words()
                self._end()  # whatever is left of its process group
                note(self.store, "server.stopped", "server", reason=f"vLLM ended with exit code {code}")
                if not was_ready:
                    raise StartError(f"vLLM did not start (exit code {code}): {why}; its log is {self._log}")
                delay = 1.0 if time.monotonic() - started > 120 else min(60.0, delay * 2)
                log.warning("vLLM ended (exit code %s): %s; starting it again in %.0f s", code, why, delay)
                self._stopping.wait(delay)
        finally:
            self.close()

    def stop(self) -> None:
        self._stopping.set()

    def close(self) -> None:
        (self.state_dir / "server.json").unlink(missing_ok=True)
        self._keeper.close()
        told = self._vllm is not None and self._vllm.poll() is None
        self._end()
        if told:
            note(self.store, "server.stopped", "server", reason="it was told to")
        self.store.close()
        self._lock.close()

    @property
    def _log(self) -> Path:
        return self.state_dir / "vllm.log"

    def _start(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(self.base),
            "--load-format",
            "insitu",
        ]
        command += ["--host", self.config.host, "--port", str(self.port), "--served-model-name", self.model_name]
        command += ["--dtype", self.config.dtype, *shlex.split(self.config.vllm_args)]
        plugins = os.environ.get("VLLM_PLUGINS")
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": self._serving_cores,
            "VLLM_NO_USAGE_STATS": "1",
            **_cache_space(self.config.vllm_args),
            **os.environ,
            "VLLM_PLUGINS": f"{plugins},insitu" if plugins else "insitu",
            "INSITU_STATE": str(self.state_dir),
            MAX_QUEUE: str(self.config.max_queue),
            FEEDBACK_PER_MINUTE: str(self.config.feedback_per_minute),
            PARENT: str(os.getpid()),
        }
        with self._log.open("wb") as output:
            # A session of its own: Ctrl-C reaches this process, which ends vLLM in order; and its workers end with it.
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

    def _wait_until_ready(self) -> bool:
        """True once /health is 200; False when vLLM has ended or the learner refuses its weights."""
        assert self._vllm is not None
        while not self._stopping.wait(0.2) and self._vllm.poll() is None:
            try:
                answer = httpx2.get(f"{self.url}/health", timeout=5)
            except httpx2.TransportError:
                continue
            if answer.status_code == 200:
                return True
            if reason := _refusal(self.url, self.keys):
                raise StartError(f"vLLM runs, but its weights cannot be trained in place: {reason}")
        return False

    def _wait_for_end(self) -> None:
        assert self._vllm is not None
        while not self._stopping.wait(0.2) and self._vllm.poll() is None:
            pass

    def _announce(self) -> None:
        facts = {"url": self.url, "pid": os.getpid(), "model": self.model_name}
        partial = self.state_dir / "server.json.partial"
        partial.write_text(json.dumps(facts))
        partial.replace(self.state_dir / "server.json")
        sys.stderr.write(
            f"insitu serves {self.model_name} with vLLM at {self.url}/v1\n"
            f"state and keys: {self.state_dir}\n"
            f"next:           insitu chat --state-dir {self.state_dir}\n"
        )

    def _last_words(self) -> str:
        """The error that vLLM's log gives as the root: the first one, whoever reported it."""
        # A pydantic error counts its findings in its first line, and tells them in the next.
        error = r"(?:[\w.]+\.)?\w+(?:Error|Exception): (?!\d+ validation error)|Value error, "
        found = re.search(rf"(?:^|\s)((?:{error}).*?)(?: \[type=.*)?$", self._log.read_text(errors="replace"), re.M)
        return found[1].strip() if found else "it said nothing"

    def _end(self) -> None:
        """SIGTERM, then SIGKILL for the whole group: vLLM's workers must not outlive it."""
        if self._vllm is None:
            return
        if self._vllm.poll() is None:
            self._vllm.terminate()
            try:
                self._vllm.wait(timeout=_END_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("vLLM did not end within %.0f s; killing it", _END_SECONDS)
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self._vllm.pid, signal.SIGKILL)
        self._vllm.wait()


def _refuse_ranks(vllm_args: str) -> None:
    """More ranks than one, before vLLM complains that its cores, which we chose, are too few for them."""
    for flags in (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp")):
        asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        asked.add_argument(*flags, dest="ranks", nargs="?", default="1", const="1")
        given, _ = asked.parse_known_args([each.replace("_", "-") for each in shlex.split(vllm_args)])
        if given.ranks != "1":
            raise StartError(f"{flags[0]} {given.ranks}: the weights would lie in several processes; leave it out")


def _cache_space(vllm_args: str) -> dict[str, str]:
    """On CPU vLLM fills most of the memory with its cache unless told otherwise, and the learner needs some too."""
    return {} if "--kv-cache-memory-bytes" in vllm_args else {"VLLM_CPU_KVCACHE_SPACE": _CACHE_GIB}


def _refusal(url: str, keys: Keys) -> str | None:
    """Why the learner will not attach, if it said so."""
    try:
        answer = httpx2.get(f"{url}/v1/live", headers={"authorization": f"Bearer {keys.api}"}, timeout=5)
        return answer.json()["learner"].get("refusal") if answer.status_code == 200 else None
    except httpx2.TransportError:
        return None


def serve(model: str, config: ServeConfig) -> None:
    """Start vLLM and a learner, and keep them until told to stop."""
    VLLMServer(model, config).run()


def keep_learner(control: Path, config: ServeConfig) -> None:
    """``insitu serve --attach SOCKET``: only a learner, for a server that somebody else started and keeps."""
    if control.name != "engine.sock" or not control.is_socket():
        raise StartError(f"{control} is not the control socket of an insitu server (STATE/run/engine.sock)")
    state_dir = handles.private_directory(control.resolve().parent.parent)
    until = time.monotonic() + _END_SECONDS
    try:
        # One that has ended keeps the lease until what it left behind is undone.
        while (other := holder(control)) and not Path(f"/proc/{other}").exists() and time.monotonic() < until:
            time.sleep(0.1)
    except OSError as error:
        raise StartError(f"nobody listens on {control}: {error.strerror or error}; start the server first") from error
    if other is not None or held(state_dir / "learner.lock"):
        who = "a learner" if other is None else f"process {other}"
        raise StartError(f"{who} already trains these weights; only one learner may: end it first")
    keeper = LearnerKeeper(state_dir, config.teach, config.threads or max(1, len(os.sched_getaffinity(0)) // 2))
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    keeper.start()
    sys.stderr.write(f"a learner works on {state_dir}; its log is {state_dir / 'learner.log'}\n")
    stopping.wait()
    keeper.close()
