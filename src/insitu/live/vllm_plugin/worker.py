"""In vLLM's worker process, beside the model: hands the arena to the API server process, and refreshes what is derived.

``run/weights.sock`` of the state directory, for this user only. Commands come while the engine is paused, so nothing reads the
weights meanwhile.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from socket import socket
from typing import Any

from insitu.live.vllm_plugin.refusals import RefusedError
from insitu.live.weights import handles
from insitu.live.weights.arena import Arena

log = logging.getLogger("insitu.vllm")

SOCKET = "weights.sock"


class WeightServer:
    """Answers for as long as the worker lives."""

    def __init__(self, arena: Arena, aliases: Mapping[str, str], run_dir: Path, refresh: Callable[[], int]) -> None:
        self._arena = arena
        self._aliases = dict(aliases)
        self._refresh = refresh
        self._refreshing = threading.Lock()
        handles.private_directory(run_dir)
        self._lock = (run_dir / "weights.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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
                facts = {**handles.manifest(self._arena), "aliases": self._aliases, "pid": os.getpid()}
                handles.send(connection, facts, self._arena.fd)
            case {"do": "refresh"}:
                handles.send(connection, self._refreshed())
            case _:
                handles.send(connection, {"error": f"unknown command {message.get('do')!r}"})

    def _refreshed(self) -> dict[str, Any]:
        try:
            with self._refreshing:
                return {"refreshed": self._refresh()}
        except Exception as error:  # told to the API server, which then does not publish
            return {"error": f"{type(error).__name__}: {error}"}


class WeightClient:
    """The API server's end."""

    def __init__(self, run_dir: Path) -> None:
        self._socket = handles.connect(run_dir / SOCKET)
        handles.send(self._socket, {"do": "attach"})
        message, fd = handles.receive(self._socket, want_fd=True)
        if fd is None:
            raise handles.HandleError("the worker sent no descriptor with its handle")
        self.arena = handles.open_arena(message, fd)
        self.pid = int(message["pid"])
        self.aliases: dict[str, str] = {str(k): str(v) for k, v in dict(message["aliases"]).items()}

    def close(self) -> None:
        self._socket.close()
        self.arena.close()

    def refresh(self) -> int:
        """Recompute derived tensors; raises RefusedError with the worker's reason, ConnectionError when it is gone."""
        handles.send(self._socket, {"do": "refresh"})
        answer, _ = handles.receive(self._socket)
        if "error" in answer:
            raise RefusedError(str(answer["error"]))
        return int(answer["refreshed"])
