"""The server process: the arena, the embedded engine, the HTTP front door, and a learner kept alive beside them.

Start-up puts the last committed version into the arena and checks it bit for bit; the learner is a child process that attaches
through the control socket. When a learner dies, whatever it left in the weights is undone before the next answer.
"""

import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import IO, Any

import torch

from insitu.live import disk, packaged, source
from insitu.live.checkpoint import checkpoint_files, read
from insitu.live.config import ServeConfig
from insitu.live.control import ControlServer
from insitu.live.engines.embedded import EmbeddedEngine
from insitu.live.events import note
from insitu.live.keeper import LearnerKeeper
from insitu.live.keys import load_keys
from insitu.live.repair import repair
from insitu.live.state import open_store, state_directory
from insitu.live.versions import Versions
from insitu.live.weights import attach
from insitu.live.weights.arena import DTYPES, Arena, resident

log = logging.getLogger("insitu.server")


class StartError(RuntimeError):
    """The server cannot start; the message says why and the way out."""


class Server:
    """One life of a server over one state directory. ``start`` makes it ready, ``run`` serves until told to stop."""

    def __init__(self, model: str, config: ServeConfig) -> None:
        self.config = config
        self.model_name = model if model == packaged.SMOLLM2 else Path(model).name
        self.state_dir = state_directory(config.state_dir)
        self._lock = lock(self.state_dir / "server.lock", self.state_dir)
        self.listener = bind(config.host, config.port)
        self.keys = load_keys(self.state_dir)
        self.store = open_store(self.state_dir)
        base = source.resolve(model, yes=config.yes)
        cores = len(os.sched_getaffinity(0))
        self._serve_threads = config.threads or max(1, cores // 2)
        self._learn_threads = max(1, cores - self._serve_threads)
        torch.set_num_threads(self._serve_threads)
        self.versions = Versions(self.state_dir, base, self.store)
        skeleton = attach.skeleton(base, DTYPES[config.dtype])
        self.arena = Arena.create(attach.layout(skeleton))
        self._views = self.arena.views()
        self._aliases = attach.tied(skeleton)
        self._load(base)
        self.tokenizer = _tokenizer(base)
        served = attach.build(base, self.arena, requires_grad=False)
        self.engine = EmbeddedEngine(
            served,
            model_name=self.model_name,
            # A model of a very long context is served with as much of it as there is room for.
            context_length=min(int(served.config.max_position_embeddings), config.cache_tokens),
            eos_token_ids=_eos_token_ids(base, served, self.tokenizer),
            version=self.arena.header.label,
            max_requests=config.max_requests,
            cache_tokens=config.cache_tokens,
        )
        self.control = ControlServer(self.engine, self.arena, self.state_dir / "run" / "engine.sock", self._repair)
        self._keeper = LearnerKeeper(self.state_dir, config.teach, self._learn_threads)
        self._stopping = threading.Event()
        self.failure: str | None = None
        self._uvicorn: Any = None

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "::") else self.config.host  # noqa: S104
        return f"http://{host}:{self.listener.getsockname()[1]}"

    # -- weights -------------------------------------------------------------------------------------------------------
    def _load(self, base: Path) -> None:
        """Fill the arena with the base checkpoint, then with the last committed version of it."""
        with torch.no_grad():
            attach.fill(self._views, read(checkpoint_files(base)), self._aliases)
        self.versions.bring_up(self.arena, self._aliases, self.model_name)

    def _repair(self, paused: bool) -> None:
        """A learner's process has ended: undo what it did not commit, and let requests go on."""
        found = self.arena.header
        note(self.store, "learner.died", "learner", found=found.label, paused=paused)
        try:
            head = self.store.head()
            assert head is not None

            def restore() -> None:
                self.versions.restore(head, self.arena, self._aliases)
                note(self.store, "repair.done", f"version {head}", found=found.label, torn=bool(found.writer))

            repair(self.engine, self.arena.header, head, restore, paused)
        except Exception as error:  # nobody may be answered from weights of which nothing is known
            self.failure = f"the last committed version could not be restored: {error}"
            log.critical("%s; stopping", self.failure)
            self.stop()

    # -- life ----------------------------------------------------------------------------------------------------------
    def run(self, ready: threading.Event | None = None) -> None:
        """Serve until :meth:`stop`, SIGINT or SIGTERM."""
        import uvicorn

        from insitu.live.api.app import create_app
        from insitu.live.api.limits import Limits
        from insitu.live.api.service import LocalService

        note(
            self.store, "server.started", "server", pid=os.getpid(), engine="embedded", version=self.arena.header.label
        )
        self.engine.start()
        self.control.start()
        self._keeper.start()
        app = create_app(
            self.engine,
            LocalService(self.store),
            self.tokenizer,
            self.keys,
            live_status=self.live_status,
            allowed_hosts=[self.config.host, *self.config.allowed_hosts],
            limits=Limits(self.config.max_queue, self.config.feedback_per_minute),
        )
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        announce = threading.Thread(target=self._announce, args=(ready,), daemon=True)
        announce.start()
        if threading.current_thread() is threading.main_thread():
            # uvicorn raises the signal that stopped it once more when it is done, and with the default handler this process
            # would be gone before close(), and its learner left behind.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self.stop())
        try:
            self._uvicorn.run(sockets=[self.listener])
        finally:
            self.close()
        if self.failure:
            raise StartError(self.failure)

    def stop(self) -> None:
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def close(self) -> None:
        """End the learner, then the engine. Nothing needs saving: what is committed is on disk."""
        self._stopping.set()
        (self.state_dir / "server.json").unlink(missing_ok=True)
        self.control.close()
        self._keeper.close()
        self.engine.close()
        note(self.store, "server.stopped", "server", pid=os.getpid(), reason=self.failure or "it was told to")
        self.store.close()
        self._lock.close()

    def _announce(self, ready: threading.Event | None) -> None:
        """Tell the command line where the server is, once it answers."""
        while not self._uvicorn.started:
            if self._stopping.wait(0.02):
                return
        facts = {"url": self.url, "pid": os.getpid(), "model": self.engine.info.model_name}
        partial = self.state_dir / "server.json.partial"
        while True:
            try:
                partial.write_text(json.dumps(facts))
                partial.replace(self.state_dir / "server.json")
                break
            except OSError as error:  # it serves all the same; only our own command line cannot find it yet
                log.error("%s cannot be written: %s; trying again", self.state_dir / "server.json", error)
                if self._stopping.wait(1.0):
                    return
        if ready is not None:
            ready.set()

    def live_status(self) -> dict[str, Any]:
        """Facts of this process for GET /v1/live."""
        header = self.arena.header
        pid = self.control.learner_pid
        state = "absent" if pid is None else "ready" if self.control.learner_ready else "attaching"
        return {
            "weight_version": header.label,
            "paused": self.control.paused,
            "trial": bool(header.step or header.writer),
            "learner": {"state": state, "pid": pid, "problem": self.control.problem or disk.shortage(self.state_dir)},
            "arena": {"bytes": self.arena.num_bytes, "pid": os.getpid(), **resident()},
        }


def serve(model: str, config: ServeConfig) -> None:
    """Start a server and run it until it is told to stop."""
    server = Server(model, config)
    ready = threading.Event()

    def greet() -> None:
        if ready.wait():
            sys.stderr.write(
                f"insitu serves {server.model_name} (version {server.arena.header.label}) at {server.url}/v1\n"
                f"state and keys: {server.state_dir}\n"
                f"next:           insitu chat --state-dir {server.state_dir}\n"
            )

    threading.Thread(target=greet, daemon=True).start()
    server.run(ready)


def bind(host: str, port: int) -> socket.socket:
    """Bind before anything slow, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from error
    return listener


def lock(path: Path, state_dir: Path) -> IO[str]:
    """Hold the state directory as its only server, until the process ends."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StartError(
            f"another server already runs on {state_dir}; stop it, or choose another --state-dir"
        ) from None
    return file


def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def _eos_token_ids(base: Path, model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a reply: the generation config's, where chat models keep their end of turn, and the tokenizer's."""
    from transformers import GenerationConfig

    config = (
        GenerationConfig.from_pretrained(base)
        if (base / "generation_config.json").exists()
        else model.generation_config
    )
    found = config.eos_token_id
    ids = {*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)
