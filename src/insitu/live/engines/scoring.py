"""Scoring given text with the served weights, beside generation.

Continuous batching drives its module with a paged cache and its own attention masks, and may rewrite the configuration that
all its layers share; a plain forward of that same module can then lose its causal mask. So scoring has a module of its own.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from insitu.live.engines.base import Token
from insitu.live.engines.sampling import describe

_ROWS = 256  # log-softmax in fp32 over this many positions at a time


def twin(model: Any) -> Any:
    """A second module over the very same parameter tensors, with a configuration and buffers of its own."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, shared)


@torch.no_grad()
def score(model: Any, ids: Sequence[int], top: int, version: str) -> list[Token]:
    """Log-probability of ``ids[i]`` given ``ids[:i]`` for i = 1 .. len-1, in one forward without cache."""
    input_ids = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1]
    tokens: list[Token] = []
    for start in range(0, len(logits), _ROWS):
        rows = logits[start : start + _ROWS]
        chosen = list(ids[start + 1 : start + 1 + len(rows)])
        tokens += [Token(*scored, version) for scored in describe(rows, chosen, [top] * len(rows))]
    return tokens
