"""What a serving engine must offer. The embedded Transformers engine and vLLM both implement it.

Two users, two halves:

* the HTTP routes ask for text: :meth:`Engine.generate` and :meth:`Engine.score`;
* the learner, in another process, asks for a safe moment to write the shared weights:
  :meth:`Engine.pause`, then :meth:`Engine.publish`, then :meth:`Engine.resume`. It cannot tell the engines apart.

A *weight version* is written ``"12"`` when committed and ``"12+3"`` for the third step of a job that started from 12 and
has no verdict yet (a trial).
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, in OpenAI's and vLLM's words. ``temperature=0`` is greedy.

    ``seed`` makes a request repeatable: the draw depends on (seed, position), never on what else is in the batch.
    ``top_logprobs`` (0 to 20) asks for that many alternatives beside each chosen token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. ``logprob`` is the model's own log-probability (log-softmax of the raw logits, in nats), before
    temperature and top_p. ``version`` names the weights that produced it."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    version: str


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What :meth:`Engine.publish` did, in figures: running requests whose cache was dropped and recomputed, and seconds."""

    version: str
    recomputed: int
    seconds: float


class EngineError(RuntimeError):
    """The engine cannot serve: its generation loop has died, or the request failed inside it."""


class RequestTooLongError(ValueError):
    """Prompt and max_tokens do not fit the context; the message says by how much."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts the routes and the learner need about what is served."""

    model_name: str
    context_length: int
    eos_token_ids: tuple[int, ...]
    extra: dict[str, str] = field(default_factory=dict)


class Engine(ABC):
    """A serving engine over the shared weights."""

    info: EngineInfo

    @abstractmethod
    def start(self) -> None:
        """Start generating. Blocks until ready."""

    @abstractmethod
    def close(self) -> None:
        """Stop generating; requests still running fail with :class:`EngineError`."""

    @abstractmethod
    def healthy(self) -> bool:
        """Whether requests can be answered (a paused engine is healthy)."""

    @abstractmethod
    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[Token]:
        """Yield tokens as they are made, at most ``max_tokens``, ending after a stop token (which is yielded).

        Closing the iterator early (``aclose``) cancels the request. A request that spans a publish goes on: its cache is
        recomputed under the new weights, the tokens already given stay. Raises :class:`RequestTooLongError`.
        """

    @abstractmethod
    def score(self, ids: Sequence[int], top: int = 0) -> list[Token]:
        """Log-probability of ``ids[i]`` given ``ids[:i]`` for i = 1 .. len-1, by the weights being served.

        Runs its own forward without cache, safe beside generation; in a pause it waits for the end of it, so it never reads
        weights that are being written. Used for ``echo`` and as the probe by which the learner compares what is served with
        what it trains.
        """

    @abstractmethod
    def pause(self) -> None:
        """Return when no forward pass is running and none will start until :meth:`resume`. Requests are kept."""

    @abstractmethod
    def publish(self, version: str) -> PublishReport:
        """Only inside a pause: the weights have changed in place. Drop everything computed from the old ones (running
        requests' caches included, checked), and stamp ``version`` on every token from now on."""

    @abstractmethod
    def resume(self) -> None:
        """End the pause. Requests that were running go on from the token they had reached."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The version stamped on tokens made now."""
