"""Server and learner in one process, without HTTP and sockets: the real engine, arena, store, guard and transaction.

For benchmarks that teach many jobs with many settings: nothing is started anew between two jobs.
"""

import asyncio
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from insitu.data.chat import encode_prompt
from insitu.live.config import ServeConfig, TeachConfig
from insitu.live.engines.base import Engine, PublishReport, SamplingParams
from insitu.live.learner import Learner
from insitu.live.records import Version
from insitu.live.server import Server
from insitu.live.store import Store
from insitu.live.weights.arena import Arena


class Line:
    """What :class:`insitu.live.control.EngineClient` offers, by direct calls."""

    proven = True

    def __init__(self, engine: Engine, arena: Arena) -> None:
        self.engine, self.arena = engine, arena
        self.paused = False

    def ready(self) -> None:
        pass

    def refuse(self, reason: str) -> None:
        raise RuntimeError(reason)

    def pause(self) -> None:
        if not self.paused:
            self.engine.pause()
            self.paused = True

    def publish(self) -> PublishReport:
        return self.engine.publish(self.arena.header.label)

    def resume(self) -> None:
        self.engine.resume()
        self.paused = False

    def score(self, ids: Sequence[int]) -> list[float]:
        return [token.logprob for token in self.engine.score(ids)]

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, together: int = 8) -> list[list[int]]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=self.engine.info.eos_token_ids)

        async def one(prompt: Sequence[int], turn: asyncio.Semaphore) -> list[int]:
            async with turn:
                return [token.id async for token in self.engine.generate(prompt, params)]

        async def all_of_them() -> list[list[int]]:
            turn = asyncio.Semaphore(together)
            return list(await asyncio.gather(*(one(prompt, turn) for prompt in prompts)))

        return asyncio.run(all_of_them())


@dataclass
class World:
    """One served model and its learner; version 0 is the model as it was shipped."""

    store: Store
    line: Line
    learner: Learner

    def say(self, prompts: Sequence[str], max_tokens: int, together: int = 1) -> list[str]:
        """Greedy replies. One at a time where texts are compared: in bf16 a reply can depend on the batch."""
        tokenizer = self.learner.served.tokenizer
        asked = [encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
        told = self.line.generate(asked, max_tokens, together)
        return [tokenizer.decode(reply, skip_special_tokens=True) for reply in told]

    def teach(self, name: str, examples: Sequence[Any], config: TeachConfig) -> tuple[Version | None, list[str]]:
        """One job. Its version (None if no example got that far), and the reasons for which examples were refused."""
        before = len(self.store.versions())
        ids = [
            self.store.add_feedback("messages", {"messages": messages}, f"{name} {i}")[0].id
            for i, messages in enumerate(examples)
        ]
        self.learner.config = config
        self.learner.teach(self.store.queued(len(ids)))
        items = [self.store.feedback(id) for id in ids]
        made = self.store.versions()[before:]
        return (made[0] if made else None), sorted({item.reason for item in items if item and item.reason})

    def back_to_start(self) -> bool:
        """Serve version 0 again; whether the arena then holds its bytes."""
        if self.store.head() != 0:
            self.learner.roll_back(self.store.add_rollback(0))
        first = self.store.version(0)
        assert first is not None
        return self.line.arena.sha256() == first.sha256


@contextmanager
def world(model: str) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="insitu-bench-") as directory:
        server = Server(model, ServeConfig(state_dir=Path(directory) / "state", port=0, yes=True))
        server.listener.close()
        # The learner's half too, since nobody is served meanwhile; never more than there are cores to run on.
        torch.set_num_threads(min(torch.get_num_threads() * 2, len(os.sched_getaffinity(0))))
        server.engine.start()
        try:
            line = Line(server.engine, server.arena)
            base = Path(str(server.store.get_meta("base")))
            learner = Learner(line, server.store, base, server.state_dir, TeachConfig())  # type: ignore[arg-type]
            yield World(server.store, line, learner)
        finally:
            server.close()
