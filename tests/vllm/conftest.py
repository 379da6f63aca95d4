"""Real vLLM servers for the tests, started as a user starts them."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "live"))  # tiny models and process helpers are the same as there

from processes import running  # noqa: E402

from insitu.live.client import Client  # noqa: E402

VLLM_ARGS = "--max-model-len 512 --kv-cache-memory-bytes 256M --enforce-eager"
Serve = Callable[..., AbstractContextManager[Client]]


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """``serve(model, state_dir, *options)``: a server of ``insitu serve --engine vllm``, gone at the end of the block."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE / "stubs"), before]))

    def start(
        model: Path | str, state_dir: Path, *options: str, vllm_args: str = VLLM_ARGS
    ) -> AbstractContextManager[Client]:
        return running(model, state_dir, "--engine", "vllm", f"--vllm-args={vllm_args}", *options)

    yield start
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def inject(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``inject(name)``: every process of the servers that this test starts has the defect of that folder of mutants/."""
    mutants = HERE / "mutants"
    assert serve is not None

    def put(name: str) -> None:
        assert (mutants / name / "sitecustomize.py").exists()
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([f"{mutants / name}", f"{mutants}", os.environ["PYTHONPATH"]]))

    return put
