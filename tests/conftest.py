"""What holds for every test: no network, offline hub, one seed of everything random unless the test says otherwise."""

import os
import socket
from importlib.metadata import distributions
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# vLLM needs an environment of its own (make vllm-env); its tests are run there, by make test-vllm. tests/gpu needs a GPU.
_HAVE_VLLM = any(True for _ in distributions(name="vllm"))
collect_ignore = [*([] if _HAVE_VLLM else ["vllm"]), *([] if torch.cuda.is_available() else ["gpu"])]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only loopback and Unix sockets: a test that reaches out fails at once."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
