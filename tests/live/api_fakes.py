"""A served model that is a script, for the tests of the HTTP routes: the fake is at the process border, the rest is real."""

import asyncio
import functools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from insitu.live.api.app import create_app
from insitu.live.api.service import LocalService
from insitu.live.engines.base import Engine, EngineError, EngineInfo, PublishReport, SamplingParams, Token
from insitu.live.keys import Keys
from insitu.live.store import Store

MODEL = "org/tiny"
KEYS = Keys(api="api-key-for-tests", learn="learn-key-for-tests")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, the answer is blue", "system user assistant\n"]


@functools.cache
def chat_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a chat template, small enough that an emoji is spread over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think it>", special=False)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>", "<|endoftext|>"]
    )
    wrapped.chat_template = CHATML
    return wrapped


class FakeEngine(Engine):
    """Says the token ids of ``script``, whatever it is asked, as version ``versions[i]`` for the i-th token.

    It fails at token ``fail_at`` and waits for a minute at token ``stall_at``. ``calls`` and ``cancelled`` tell what was
    asked of it and how many iterators were closed before their end.
    """

    def __init__(self, tokenizer: Any, context_length: int = 256) -> None:
        self.tokenizer = tokenizer
        self.info = EngineInfo(MODEL, context_length, (tokenizer.convert_tokens_to_ids("<|im_end|>"),))
        self.script: list[int] = []
        self.versions: dict[int, str] = {}
        self.calls: list[tuple[list[int], SamplingParams]] = []
        self.running = 0
        self.cancelled = 0
        self.dead = False
        self.fail_at: int | None = None
        self.stall_at: int | None = None
        self.say("hello world")

    def say(self, text: str, *, end: bool = True) -> list[int]:
        """Set the script; one token for each byte where the vocabulary has nothing longer."""
        self.script = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if end:
            self.script = [*self.script, *self.info.eos_token_ids]
        return self.script

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def healthy(self) -> bool:
        return not self.dead

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[Token]:
        self.calls.append((list(prompt_ids), params))
        self.running += 1
        ended = False
        try:
            for i, id in enumerate(self.script[: params.max_tokens]):
                if self.dead or i == self.fail_at:
                    raise EngineError("the generation loop has died")
                await (asyncio.sleep(60) if i == self.stall_at else asyncio.sleep(0))
                ended = id in params.stop_token_ids or i + 1 == min(len(self.script), params.max_tokens)
                yield self._token(id, i, params.top_logprobs)
                if ended:
                    return
        finally:
            self.running -= 1
            self.cancelled += not ended

    def score(self, ids: Sequence[int], top: int = 0) -> list[Token]:
        return [self._token(id, i, top) for i, id in enumerate(ids) if i]

    def _token(self, id: int, i: int, top: int) -> Token:
        alternatives = tuple(((id + 1 + k) % 300, -1.0 - k) for k in range(top))
        return Token(id, -0.5 - i, alternatives, self.versions.get(i, self.version))

    def pause(self) -> None:
        pass

    def publish(self, version: str) -> PublishReport:
        return PublishReport(version, 0, 0.0)

    def resume(self) -> None:
        pass

    @property
    def version(self) -> str:
        return self.versions.get(-1, "0")


class World:
    """One application with everything behind it."""

    def __init__(self, directory: Path, tokenizer: Any, **options: Any) -> None:
        self.engine = FakeEngine(tokenizer)
        self.tokenizer = tokenizer
        self.store = Store(directory / "insitu.db")
        self.store.commit(self.store.reserve("base", None), "0" * 64, {})
        self.status: dict[str, Any] = {}
        self.app: FastAPI = create_app(
            self.engine, LocalService(self.store), tokenizer, KEYS, live_status=lambda: self.status, **options
        )

    def client(self, key: str | None = KEYS.learn, **options: Any) -> TestClient:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        options = {"base_url": "http://127.0.0.1:8000", "raise_server_exceptions": False, "headers": headers} | options
        return TestClient(self.app, **options)


@contextmanager
def open_world(directory: Path, tokenizer: Any, **options: Any) -> Iterator[World]:
    world = World(directory, tokenizer, **options)
    try:
        yield world
    finally:
        world.store.close()


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def lesson(question: str = "hello", answer: str = "the answer is blue") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
