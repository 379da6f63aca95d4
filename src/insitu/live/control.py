"""The line between learner and server: a Unix socket with a handful of commands.

The server hands out the arena to one learner, then obeys it: ready, refuse, degraded, pause, publish, resume, score, generate.
Whoever asks for the arena while it is lent is told at once by whom (409). The lease ends only with the learner's process: a
connection that breaks is followed by a wait for that process to be gone, and only then does the server look at what it left
behind (``on_writer_gone``).
"""

import asyncio
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from insitu.live.engines.base import Engine, PublishReport, SamplingParams
from insitu.live.lease import Lease
from insitu.live.weights import handles
from insitu.live.weights.arena import Arena
from insitu.live.weights.header import Header


class ControlError(RuntimeError):
    """The server refused a command; the message is its reason."""


class HeldError(ControlError):
    """The weights are lent to another learner, or are being restored after one that died."""


class Weights(Protocol):
    """What the server must have of the weights to hand them out: the arena itself, or the line to the process that has it."""

    @property
    def fd(self) -> int: ...

    @property
    def header(self) -> Header: ...

    def manifest(self) -> dict[str, Any]: ...


class ControlServer:
    """Lends the weights to one learner at a time on ``path``. ``on_writer_gone`` runs when a learner's process has ended,
    before another may attach, and is told whether the learner had paused the engine: it repairs the weights and ends the pause.

    ``proven`` False asks the first learner for proof that the engine reads the arena (:mod:`insitu.live.proof`); ``refusal``
    is why a learner would not attach, ``problem`` why one that did cannot learn for now.
    """

    def __init__(
        self,
        engine: Engine,
        weights: Weights,
        path: Path,
        on_writer_gone: Callable[[bool], None],
        *,
        proven: bool = True,
    ) -> None:
        self._engine = engine
        self.proven = proven
        self.refusal: str | None = None
        self.problem: str | None = None
        self._weights = weights
        self._on_writer_gone = on_writer_gone
        self._listener = handles.listen(path)
        self._thread = threading.Thread(target=self._accept, name="insitu-control", daemon=True)
        self._lease = Lease()
        self._lock = threading.Lock()  # guards the two below
        self._closing = False
        self._connections: set[socket.socket] = set()
        self.learner_pid: int | None = None
        self.learner_ready = False
        self.paused = False

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Idempotent. The learner's connection ends too, so that it notices."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            open_now = list(self._connections)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in open_now:
            with suppress(OSError):  # it may have ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closing:
                    return
                raise
            threading.Thread(target=self._meet, args=(connection,), name="insitu-peer", daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        """One connection. Until it attaches it can ask for nothing else but who has the weights."""
        with connection:
            with self._lock:
                if self._closing:
                    return
                self._connections.add(connection)
            try:
                pid = handles.check_peer(connection)
                while True:
                    message, _ = handles.receive(connection)
                    if message.get("do") == "holder":
                        handles.send(connection, {"pid": self._lease.holder})
                    elif message.get("do") != "attach":
                        handles.send(connection, {"error": "attach first: these weights are not lent to you"})
                    elif self._lease.take(pid):
                        self._lend(connection, pid)
                        return
                    else:
                        handles.send(connection, {"error": self._lease.refusal(), "code": 409})
            except (ConnectionError, handles.HandleError):  # hung up, talks nonsense, or another user
                return
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def _lend(self, connection: socket.socket, pid: int) -> None:
        """Obey the learner that has the lease; when it is gone, repair, and only then is the lease free again."""
        try:
            self.learner_pid = pid
            self._serve(connection)
        finally:
            self.learner_pid = None
            self.learner_ready = False
            self.problem = None
            if not self._closing:
                self._lease.outlive()
                paused, self.paused = self.paused, False
                self._on_writer_gone(paused)  # if it raises, nobody may write any more
            self._lease.free()

    def _serve(self, connection: socket.socket) -> None:
        message: dict[str, Any] = {"do": "attach"}
        while True:
            try:
                if message.get("do") == "attach":
                    handles.send(connection, {**self._weights.manifest(), "proven": self.proven}, self._weights.fd)
                else:
                    handles.send(connection, self._obey(message))
                message, _ = handles.receive(connection)
            except (ConnectionError, handles.HandleError):
                return

    def _obey(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            match message:
                case {"do": "ready"}:
                    self.learner_ready = self.proven = True
                    self.refusal = None
                    return {}
                case {"do": "refuse", "reason": str(reason)}:
                    self.refusal = reason
                    return {}
                case {"do": "degraded", "reason": str() | None as problem}:
                    self.problem = problem
                    return {}
                case {"do": "pause"}:
                    self._engine.pause()
                    self.paused = True
                    return {}
                case {"do": "publish"}:
                    header = self._weights.header
                    if header.writer:
                        raise ValueError("the header still says that a write is going on; stamp it before publishing")
                    return asdict(self._engine.publish(header.label))
                case {"do": "resume"}:
                    self._engine.resume()
                    self.paused = False
                    return {}
                case {"do": "score", "ids": list(ids)}:
                    return {"logprobs": [token.logprob for token in self._engine.score(ids)]}
                case {"do": "generate", "prompts": list(prompts), "max_tokens": int(limit)}:
                    return {"replies": asyncio.run(_greedy(self._engine, prompts, limit))}
                case _:
                    raise ValueError(f"unknown command {message.get('do')!r}")
        except Exception as error:  # told to the learner, which decides; the engine goes on serving
            return {"error": f"{type(error).__name__}: {error}"}


async def _greedy(engine: Engine, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=limit, temperature=0.0, stop_token_ids=engine.info.eos_token_ids)

    async def one(prompt: Sequence[int]) -> list[int]:
        return [token.id async for token in engine.generate(prompt, params)]

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def _attach(connection: socket.socket) -> tuple[Arena, bool]:
    handles.send(connection, {"do": "attach"})
    message, fd = handles.receive(connection, want_fd=True)
    if message.get("code") == 409:
        raise HeldError(str(message.get("error")))
    if fd is None:
        raise handles.HandleError("the server sent no descriptor with its handle")
    try:
        return handles.open_arena(message, fd), bool(message.get("proven"))
    except BaseException:
        os.close(fd)
        raise


def holder(path: Path) -> int | None:
    """The process to which the server at ``path`` has lent its weights. Raises OSError when nobody listens."""
    with handles.connect(path) as line:
        handles.send(line, {"do": "holder"})
        answer, _ = handles.receive(line)
    found = answer.get("pid")
    return found if isinstance(found, int) else None


class EngineClient:
    """The learner's end. Raises HeldError if another has the weights.

    Every method raises ConnectionError when the server is gone, ControlError when it refuses."""

    def __init__(self, path: Path) -> None:
        self._socket = handles.connect(path)
        try:
            self.arena, self.proven = _attach(self._socket)
        except BaseException:
            self._socket.close()
            raise
        self.paused = False

    def close(self) -> None:
        self._socket.close()
        self.arena.close()

    def server_gone(self) -> bool:
        """Whether the other end has closed; does not block."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(0)) and not self._socket.recv(1, socket.MSG_PEEK)

    def _ask(self, **message: Any) -> dict[str, Any]:
        handles.send(self._socket, message)
        answer, _ = handles.receive(self._socket)
        if "error" in answer:
            raise ControlError(answer["error"])
        return answer

    def ready(self) -> None:
        """Tell the server that the weights were verified and lessons are taken."""
        self._ask(do="ready")

    def refuse(self, reason: str) -> None:
        """Tell the server why its weights will not be trained."""
        self._ask(do="refuse", reason=reason)

    def degraded(self, reason: str | None) -> None:
        """Tell the server why nothing is learned for now, or with None that it is over."""
        self._ask(do="degraded", reason=reason)

    def pause(self) -> None:
        """Idempotent: whoever cleans up need not know how far the work had got."""
        if not self.paused:
            self._ask(do="pause")
            self.paused = True

    def publish(self) -> PublishReport:
        return PublishReport(**self._ask(do="publish"))

    def resume(self) -> None:
        self._ask(do="resume")
        self.paused = False

    def score(self, ids: Sequence[int]) -> list[float]:
        return list(self._ask(do="score", ids=list(ids))["logprobs"])

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy replies of the served weights."""
        replies = self._ask(do="generate", prompts=[list(p) for p in prompts], max_tokens=max_tokens)["replies"]
        return [list(reply) for reply in replies]
