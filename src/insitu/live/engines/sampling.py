"""Choosing the next token, and saying how probable it was.

One request's draw is a function of (seed, position) and of the distribution, of nothing else: not of the other requests in
the batch, not of how often the engine was paused. So a request can be repeated, and goes on rightly after its cache was
dropped and recomputed. The way: one uniform number per (seed, position), laid over the cumulative distribution in vocabulary
order. (Sorted order would do too, but there two almost equal tokens change places for a rounding error.)
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a lower temperature is greedy: dividing by it would only overflow
_NUCLEUS_GUESSES = (256, 4096)  # sorting a whole vocabulary takes milliseconds, and the nucleus is nearly always small


class Draw(NamedTuple):
    """What the choice of one token depends on, beside the logits."""

    temperature: float
    top_p: float
    seed: int
    position: int


class Scored(NamedTuple):
    """A token with the model's own log-probability (nats), and its best alternatives, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is the same on every machine and in every version of torch and numpy."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """``probs`` (V) with zeros outside the smallest set of most probable tokens whose sum reaches ``top_p``."""
    for guess in (*_NUCLEUS_GUESSES, len(probs)):
        values, indices = probs.topk(min(guess, len(probs)))
        cumulative = values.double().cumsum(0)
        if cumulative[-1] >= top_p or len(values) == len(probs):
            break
    inside = cumulative - values < top_p  # the sum *before* this token: the one that crosses the line still belongs
    return torch.zeros_like(probs).index_copy_(0, indices[inside], values[inside])


def pick(logits: Tensor, draw: Draw) -> int:
    """The token that ``draw`` takes from ``logits`` (V): temperature first, then top_p, as OpenAI and vLLM do."""
    if draw.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    probs = ((logits - logits.max()) / draw.temperature).softmax(0)
    if draw.top_p < 1:
        probs = nucleus(probs, draw.top_p)
    cumulative = probs.cumsum(0, dtype=torch.float64)
    total = cumulative[-1].item()
    if not 0 < total < math.inf:
        return int(logits.argmax())  # broken weights; the NaN shows in the log-probability
    # Strictly below the total, so that rounding cannot lead past the last token that has any probability.
    target = min(uniform(draw.seed, draw.position) * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(cumulative, target, right=True))


def describe(logits: Tensor, chosen: Sequence[int], num_top: Sequence[int]) -> list[Scored]:
    """Log-probabilities of ``chosen[i]`` under row i of ``logits`` (N, V), with ``num_top[i]`` alternatives."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(chosen, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(chosen)
    widest = min(max(num_top, default=0), logprobs.shape[1])
    if widest:
        values, indices = logprobs.topk(widest)
        pairs = zip(indices.tolist(), values.tolist(), num_top, strict=True)
        tops = [tuple(zip(ids[:n], vals[:n], strict=True)) for ids, vals, n in pairs]
    return [Scored(*row) for row in zip(chosen, own, tops, strict=True)]
