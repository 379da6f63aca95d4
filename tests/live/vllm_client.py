"""vLLM's engine client on an event loop of its own thread, as the API server has it: a table says what it answers."""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from insitu.live.engines.base import EngineInfo, SamplingParams, Token
from insitu.live.engines.vllm import VLLMEngine

WORDS = 40  # vocabulary
CONTEXT = 16
FINAL_ONLY = "final only"


def logprob(position: int, id: int) -> float:
    """What this model says of a token at a position: any number that no other pair has."""
    return -((id * 7 + position * 11) % WORDS) / 8 - position / 1000 - 0.01


def best_at(position: int) -> list[int]:
    """Every token, the likeliest first."""
    return sorted(range(WORDS), key=lambda word: -logprob(position, word))


def row(position: int, wanted: int, top: int) -> dict[int, SimpleNamespace]:
    """vLLM's log-probabilities of one position: the wanted token first, then the best ones, each with its rank."""
    ranked = best_at(position)
    chosen = [wanted, *(id for id in ranked[:top] if id != wanted)]
    return {id: SimpleNamespace(logprob=logprob(position, id), rank=ranked.index(id) + 1) for id in chosen}


class FakeVLLM:
    """Notes what it is told; ``fail`` maps a method to what it raises, ``replies`` are the tokens of each request."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.calls: list[Any] = []
        self.fail: dict[str, Exception] = {}
        self.errored = False
        self.cache_resets = True
        self.model_config = SimpleNamespace(is_multimodal_model=False)
        self.reply = [5, 9, 2]
        self.spans: list[SimpleNamespace] | None = None
        self.silent = False
        self.stuck = threading.Event()
        self.hang = False
        self.running = 0

    def _note(self, name: str, *what: Any) -> None:
        assert asyncio.get_running_loop() is self.loop, "vLLM's client belongs to one event loop"
        self.calls.append((name, *what) if what else name)
        if name in self.fail:
            raise self.fail[name]

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        await asyncio.sleep(0)
        self._note("pause", mode, clear_cache)

    async def resume_generation(self) -> None:
        self._note("resume")

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self._note("reset_prefix_cache", reset_running_requests, reset_connector)
        return self.cache_resets

    async def reset_mm_cache(self) -> None:
        self._note("reset_mm_cache")

    async def reset_encoder_cache(self) -> None:
        self._note("reset_encoder_cache")

    async def update_weight_version(self, new_version: str) -> None:
        self._note("version", new_version)

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self._note("generate", prompt, params, request_id)
        self.running += 1
        try:
            if self.hang:
                self.stuck.set()
                await asyncio.sleep(60)
            ids = prompt["prompt_token_ids"]
            if not self.silent:
                yield self._output(ids, params)
        finally:
            self.running -= 1

    def _output(self, ids: list[int], params: Any) -> Any:
        top = getattr(params, "prompt_logprobs", None)
        asked = None if top is None else [None, *(row(i, ids[i], top) for i in range(1, len(ids)))]
        reply = self.reply[: params.max_tokens]
        top = getattr(params, "logprobs", None)
        rows = None if top is None else [row(len(ids) + i, id, top) for i, id in enumerate(reply)]
        answer = SimpleNamespace(index=0, token_ids=reply, logprobs=rows, weight_versions=self.spans)
        return SimpleNamespace(prompt_logprobs=asked, outputs=[answer], finished=True)

    @property
    def names(self) -> list[str]:
        return [call if isinstance(call, str) else call[0] for call in self.calls]


class Weights:
    """The worker: its refresh is noted among the client's calls."""

    def __init__(self, client: FakeVLLM) -> None:
        self.client = client
        self.fail: Exception | None = None

    def refresh(self) -> int:
        self.client.calls.append("refresh")
        if self.fail is not None:
            raise self.fail
        return 0


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(20)
        self.loop.close()


def stand_in_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three names that the engine imports of vLLM."""
    vllm, inputs, sampling = (ModuleType(name) for name in ("vllm", "vllm.inputs", "vllm.sampling_params"))
    vllm.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    inputs.TokensPrompt = dict  # type: ignore[attr-defined]
    sampling.RequestOutputKind = SimpleNamespace(FINAL_ONLY=FINAL_ONLY)  # type: ignore[attr-defined]
    for module in (vllm, inputs, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)


class World:
    """An engine bound to its client on the event loop of the API server."""

    def __init__(self) -> None:
        self.server = Loop()
        self.client = FakeVLLM(self.server.loop)
        self.weights = Weights(self.client)
        self.engine = VLLMEngine(EngineInfo("tiny", CONTEXT, (2,)), "4")
        self.server.run(self.engine.bind(self.client, self.weights))
        assert self.client.calls == [("version", "4")]
        self.client.calls.clear()

    def generate(self, prompt: list[int], **params: Any) -> list[Token]:
        """As the control line does: on an event loop of the caller's own."""

        async def collect() -> list[Token]:
            return [token async for token in self.engine.generate(prompt, SamplingParams(**params))]

        return asyncio.run(collect())
