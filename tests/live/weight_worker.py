"""vLLM's worker as a test has it: a real socket over a small arena, whose commands do what the test says."""

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from insitu.live.vllm_plugin.worker import SOCKET, WeightClient, WeightServer
from insitu.live.weights import handles
from insitu.live.weights.arena import Arena, Slot, plan


class Ending(WeightServer):
    """A worker's thread lives as long as its process; in a test it ends when nobody listens any more."""

    def _accept(self) -> None:
        with suppress(OSError):
            super()._accept()


class Worker:
    """A worker in this process. ``refresh`` is what it does; ``refreshed`` counts, ``restored`` lists."""

    def __init__(self, state_dir: Path) -> None:
        self.run_dir = state_dir / "run"
        whole = Arena.create(plan([("qkv", torch.bfloat16, (8, 4)), ("embed", torch.bfloat16, (12, 4))]))
        q, embed = whole.slots
        # What layout.derive makes of it: names of the checkpoint, two padded rows left out.
        self.arena = whole.renamed(
            [
                Slot("q", q.offset, "bfloat16", (4, 4)),
                Slot("kv", q.offset + 32, "bfloat16", (4, 4)),
                Slot("embed", embed.offset, "bfloat16", (10, 4)),
            ]
        )
        self.refreshed = 0
        self.refresh: Callable[[], int] = lambda: 3
        self.restored: list[int] = []
        self.server = Ending(self.arena, self.run_dir, self._refresh, self._restore)
        self.server.start()
        self.clients: list[WeightClient] = []

    def _refresh(self) -> int:
        self.refreshed += 1
        return self.refresh()

    def _restore(self, version: int) -> None:
        if version == 99:
            raise ValueError("version 99 does not exist")
        self.restored.append(version)
        self.arena.views()["q"].fill_(version)
        self.arena.stamp(version)

    def connect(self) -> WeightClient:
        self.clients.append(WeightClient(self.run_dir))
        return self.clients[-1]

    def raw(self) -> socket.socket:
        line = handles.connect(self.run_dir / SOCKET)
        line.settimeout(20)
        return line

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server._listener.shutdown(socket.SHUT_RDWR)
        self.server._listener.close()
        self.server._lock.close()
        self.arena.close()
