"""In vLLM's worker process, beside the model: hands the arena out, refreshes what is derived, puts a version back.

``run/weights.sock`` of the state directory, for this user only. Commands come while the engine is paused, so nothing reads the
weights meanwhile.
"""

import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from socket import socket
from typing import Any

from insitu.live.vllm_plugin.refusals import RefusedError
from insitu.live.weights import handles
from insitu.live.weights.arena import PAGE, Arena
from insitu.live.weights.header import Header, HeaderPage

log = logging.getLogger("insitu.vllm")

SOCKET = "weights.sock"


class WeightServer:
    """Answers for as long as the worker lives."""

    def __init__(self, arena: Arena, run_dir: Path, refresh: Callable[[], int], restore: Callable[[int], None]) -> None:
        self._arena = arena
        self._refresh = refresh
        self._restore = restore
        self._busy = threading.Lock()
        handles.private_directory(run_dir)
        self._lock = (run_dir / "weights.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RefusedError(
                f"another vLLM already serves from {run_dir.parent}; set INSITU_STATE to another directory"
            ) from None
        self._listener = handles.listen(run_dir / SOCKET)

    def start(self) -> None:
        threading.Thread(target=self._accept, name="insitu-weights", daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket) -> None:
        with connection:
            try:
                handles.check_peer(connection)
                while True:
                    self._answer(connection, handles.receive(connection)[0])
            except (handles.HandleError, OSError) as error:  # another user, not our language, or gone
                log.debug("weights socket: %s", error)

    def _answer(self, connection: socket, message: dict[str, Any]) -> None:
        match message:
            case {"do": "attach"}:
                handles.send(connection, {**self._arena.manifest(), "pid": os.getpid()}, self._arena.fd)
            case {"do": "refresh"}:
                handles.send(connection, self._done(self._refresh))
            case {"do": "restore", "version": int(version)}:
                handles.send(connection, self._done(lambda: self._restore(version)))
            case _:
                handles.send(connection, {"error": f"unknown command {message.get('do')!r}"})

    def _done(self, work: Callable[[], Any]) -> dict[str, Any]:
        try:
            with self._busy:
                return {"done": work()}
        except Exception as error:  # told to the API server, which then does not publish
            return {"error": f"{type(error).__name__}: {error}"}


class WeightClient:
    """The API server's end. It looks at page 0 only; the weights are the worker's and the learner's."""

    def __init__(self, run_dir: Path) -> None:
        self._socket = handles.connect(run_dir / SOCKET)
        self._asking = threading.Lock()  # one question at a time: requests and the learner's commands come in threads
        try:
            message, self.fd = self._attach()
        except BaseException:
            self._socket.close()
            raise
        self.pid = int(message["pid"])
        self.num_bytes = int(message["num_bytes"])
        self._page = HeaderPage(mmap.mmap(self.fd, PAGE))

    def close(self) -> None:
        self._socket.close()
        os.close(self.fd)

    @property
    def header(self) -> Header:
        return self._page.header

    def manifest(self) -> dict[str, Any]:
        """A new handle, for one more process."""
        message, fd = self._attach()
        os.close(fd)
        return message

    def arena(self) -> Arena:
        """The weights themselves, mapped here."""
        message, fd = self._attach()
        return handles.open_arena(message, fd)

    def refresh(self) -> int:
        """Recompute derived tensors; raises RefusedError with the worker's reason, ConnectionError when it is gone."""
        return int(self._ask(do="refresh"))

    def restore(self, version: int) -> None:
        """Put a committed version back; raises as :meth:`refresh` does."""
        self._ask(do="restore", version=version)

    def _attach(self) -> tuple[dict[str, Any], int]:
        with self._asking:
            handles.send(self._socket, {"do": "attach"})
            message, fd = handles.receive(self._socket, want_fd=True)
        if fd is None:
            raise handles.HandleError("the worker sent no descriptor with its handle")
        return message, fd

    def _ask(self, **message: Any) -> Any:
        with self._asking:
            handles.send(self._socket, message)
            answer, _ = handles.receive(self._socket)
        if "error" in answer:
            raise RefusedError(str(answer["error"]))
        return answer["done"]
