"""The embedded engine around a tiny random Llama, and what its answers are compared with: a fresh model on the same weights."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from insitu.live.engines.base import SamplingParams, Token
from insitu.live.engines.embedded import EmbeddedEngine

VOCAB = 160
CONTEXT = 256
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Wide enough that the context decides: with the default the logits hardly differ from one another.
        initializer_range=0.25,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        **changes,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def slow(model: Any, seconds: float = 0.004) -> Any:
    """Make each forward take a while, so that an update surely meets requests that are running."""
    model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def frozen(model: Any) -> Any:
    copy = tiny_model()
    copy.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return copy


def plain_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after every token of ``ids``, by a fresh fp32 model that has the weights of ``model``."""
    config = LlamaConfig(**{**model.config.to_dict(), "dtype": torch.float32}, attn_implementation="eager")
    fresh = LlamaForCausalLM(config).eval()
    fresh.load_state_dict({name: tensor.float().clone() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        return fresh(torch.tensor([list(ids)])).logits[0].log_softmax(-1)


def worst_error(history: dict[str, Any], prompt: Sequence[int], tokens: Sequence[Token]) -> float:
    """Largest difference between reported log-probabilities and a fresh forward on the weights of each token's version."""
    text = [*prompt, *ids(tokens)]
    rows = {version: plain_logprobs(model, text) for version, model in history.items()}
    return max(
        abs(token.logprob - rows[token.version][len(prompt) - 1 + i, token.id].item()) for i, token in enumerate(tokens)
    )


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[EmbeddedEngine]:
    settings = {"context_length": CONTEXT, "eos_token_ids": (), **settings}
    engine = EmbeddedEngine(model, model_name="tiny", **settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


async def collect(engine: EmbeddedEngine, prompt: Sequence[int], params: SamplingParams) -> list[Token]:
    async with aclosing(engine.generate(prompt, params)) as stream:
        return [token async for token in stream]


def one(engine: EmbeddedEngine, prompt: Sequence[int], **params: Any) -> list[Token]:
    return asyncio.run(collect(engine, prompt, SamplingParams(**params)))


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def perturb(model: Any, seed: int, size: float) -> None:
    """What the learner does: write the weights in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size)


def update(engine: EmbeddedEngine, model: Any, step: int, size: float = 0.05) -> int:
    engine.pause()
    perturb(model, step, size)
    recomputed = engine.publish(f"0+{step}").recomputed
    engine.resume()
    return recomputed


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.002)


def assert_idle(engine: EmbeddedEngine) -> None:
    """No request is left anywhere, and no cache is in use. Cancellations take a step or two to be obeyed."""
    scheduler = engine._batcher._manager.batch_processor.scheduler
    end = time.monotonic() + 2
    while scheduler.has_pending_requests() and time.monotonic() < end:
        time.sleep(0.01)
    engine.pause()
    assert not engine._batcher.requests
    assert not scheduler.active_requests
    assert not scheduler.waiting_requests
    assert engine.publish(engine.version).recomputed == 0
    engine.resume()
