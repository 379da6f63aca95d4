"""One answer in the making: the engine's tokens to pieces of text, stop strings, the reason it ended, the versions it spans."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from insitu.live.api.detokenize import Detokenizer
from insitu.live.engines.base import Engine, SamplingParams, Token


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token and where its text begins in the answer."""

    token: Token
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, ready to be sent, and the tokens that began in it."""

    text: str
    tokens: list[TextToken]


class StopStrings:
    """Finds the first stop string in text that comes in pieces, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that certainly is no part of a stop string."""
        text = self._held + text
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            # The one that is complete first, however the text was cut into pieces.
            self.found, self._held = True, ""
            return text[: min(hits)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(slots=True)
class Answer:
    """What is known so far of an answer; complete when :meth:`pieces` has ended. ``versions`` are in order of use."""

    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    versions: list[str] = field(default_factory=list)

    def used(self, version: str) -> None:
        if version not in self.versions:
            self.versions.append(version)

    async def pieces(
        self,
        engine: Engine,
        detokenizer: Detokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stops: Sequence[str],
    ) -> AsyncGenerator[Piece]:
        """Generate. Closing this iterator cancels the request in the engine; so does a stop string."""
        decoder = detokenizer.decoder()
        matcher = StopStrings(stops)
        decoded = 0  # characters, those held back by the matcher included
        waiting: list[TextToken] = []
        # An engine's iterator is a generator: the interface asks for aclose, the type for AsyncIterator has none.
        async with aclosing(cast(Any, engine.generate(prompt_ids, params))) as tokens:
            async for token in tokens:
                self.num_tokens += 1
                self.used(token.version)
                if token.id in params.stop_token_ids:
                    self.finish_reason = "stop"
                    break
                new = decoder.push(token.id)
                waiting.append(TextToken(token, decoded))
                decoded += len(new)
                if text := matcher.push(new):
                    self.text += text
                    # Not yet those that begin in the text held back: a stop string may cut them off.
                    yield Piece(text, _take(waiting, len(self.text)))
                elif self.num_tokens == 1:
                    yield Piece("", [])  # tells that it has begun, and with which version
                if matcher.found:
                    self.finish_reason = "stop"
                    return
        if not self.versions:
            self.used(engine.version)
        rest = matcher.push(decoder.flush())
        if matcher.found:
            self.finish_reason = "stop"
        else:
            rest += matcher.flush()
            self.finish_reason = self.finish_reason or "length"
        self.text += rest
        if matcher.found:
            waiting = _take(waiting, len(self.text))
        if rest or waiting:
            yield Piece(rest, waiting)


async def begin(pieces: AsyncGenerator[Piece]) -> Piece | None:
    """The first piece, if there is one: with it the version is known, and the request cannot fail for its own faults any more.
    If it fails until then, ``pieces`` is closed."""
    try:
        return await anext(pieces, None)
    except BaseException:
        await pieces.aclose()
        raise


def _take(waiting: list[TextToken], end: int) -> list[TextToken]:
    """Remove and return the tokens that begin before ``end``."""
    taken = [item for item in waiting if item.offset < end]
    del waiting[: len(taken)]
    return taken
