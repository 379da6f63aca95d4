"""Plain ``vllm serve`` processes for the benchmarks, and clients that stream from them."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from insitu.live.control import EngineClient
from insitu.live.keys import load_keys
from insitu.live.weights import handles

VLLM_ARGS = [
    "--max-model-len",
    "2048",
    "--kv-cache-memory-bytes",
    "1G",
    "--dtype",
    "bfloat16",
    "--served-model-name",
    "m",
]


class Server:
    """A plain ``vllm serve`` on core 0; with ``insitu`` its weights are in the arena and this process is its learner."""

    def __init__(self, base: Path, directory: Path, *, insitu: bool = True, python_path: str = "") -> None:
        self.base, self.state_dir = base, handles.private_directory(directory / "state")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(base),
            "--port",
            str(self.port),
            *VLLM_ARGS,
        ]
        command += ["--host", "127.0.0.1", *(["--load-format", "insitu"] if insitu else [])]
        environment = {
            **os.environ,
            "INSITU_STATE": str(self.state_dir),
            "VLLM_PLUGINS": "insitu" if insitu else "",
            "VLLM_CPU_OMP_THREADS_BIND": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": python_path,
        }
        self.log = directory / "vllm.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        key = load_keys(self.state_dir).api if insitu else "none"
        self.http = httpx2.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"authorization": f"Bearer {key}"}, timeout=120
        )
        path = "/v1/live" if insitu else "/health"
        while not self._answers(path):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def _answers(self, path: str) -> bool:
        try:
            return self.http.get(path).status_code == 200
        except httpx2.TransportError:
            return False

    def end(self) -> None:
        self.http.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def attach(self) -> EngineClient:
        """As a learner; this process answers for the weights, so the gate is opened without a probe."""
        engine = EngineClient(self.state_dir / "run" / "engine.sock")
        engine.ready()
        return engine

    def chat(self, text: str, max_tokens: int) -> dict[str, Any]:
        """A streamed greedy reply: ids and log-probabilities of its tokens, when each came, and the spans of versions."""
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        body |= {"stream": True, "logprobs": True, "return_token_ids": True, "ignore_eos": True}
        found: dict[str, Any] = {"prompt": [], "ids": [], "logprobs": [], "times": [], "spans": []}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                told = json.loads(line.removeprefix("data: "))
                if "error" in told:
                    raise RuntimeError(told["error"])
                found["prompt"] = told.get("prompt_token_ids") or found["prompt"]
                found["spans"] = told.get("weight_version_spans") or found["spans"]
                for choice in told["choices"]:
                    found["ids"] += choice.get("token_ids") or []
                    found["logprobs"] += [c["logprob"] for c in (choice.get("logprobs") or {}).get("content") or []]
                    found["times"].append(time.monotonic())
        return found


@contextmanager
def server(base: Path, **options: Any) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="insitu-bench-") as directory:
        made = Server(base, Path(directory), **options)
        try:
            yield made
        finally:
            made.end()


@contextmanager
def clients(
    of: Server, count: int, max_tokens: int, prefix: str = ""
) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """``count`` threads that stream replies one after the other; yields the replies and the failures, which both grow."""
    stopping, replies, failed = threading.Event(), [], []

    def run(number: int) -> None:
        turn = 0
        while not stopping.is_set():
            turn += 1
            try:
                replies.append(of.chat(f"{prefix}Tell me about the number {number * 1000 + turn}.", max_tokens))
            except Exception as error:  # counted: the claim is that there is none
                failed.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield replies, failed
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
