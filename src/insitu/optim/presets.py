"""The published recipes, by name: ``APOLLO(insitu.param_groups(model), **insitu.preset("apollo-130m"))``.

Pretraining (Zhu et al. 2024, arXiv 2412.05270, section 5 and appendix; the models are LLaMAs of that size): warmup over 10 % of
the steps, then cosine to 10 % (:func:`insitu.optim.schedule.warmup_cosine`), no decay, no clipping. Fine-tuning (their table
of commonsense reasoning): 100 steps of warmup, then linear.

These are the authors' alpha and eps, which are not our defaults: with r = d / 4 and alpha = 1 an update is half as large as
AdamW's, so lr=0.01 there is like 0.005. With ``alpha="auto"`` AdamW's learning rate is the one to start from.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

_PRETRAIN: dict[str, Any] = {
    "lr": 0.01,
    "refresh": 200,
    "alpha": 1.0,
    "projection": "gaussian",
    "granularity": "channel",
    "limiter": 1.01,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "dense": "adamw",
}
_FINETUNE: dict[str, Any] = {**_PRETRAIN, "lr": 3e-4}
_MINI: dict[str, Any] = {"rank": 1, "granularity": "tensor", "alpha": sqrt(128)}

PRESETS: dict[str, dict[str, Any]] = {
    # rank: a quarter of the hidden size; 256 for 7B. For 1B the paper has alpha 1/2 at rank 512.
    "apollo-60m": {**_PRETRAIN, "rank": 128},
    "apollo-130m": {**_PRETRAIN, "rank": 192},
    "apollo-350m": {**_PRETRAIN, "rank": 256},
    "apollo-1b": {**_PRETRAIN, "rank": 512, "alpha": 0.5},
    "apollo-7b": {**_PRETRAIN, "rank": 256},
    # alpha = sqrt(128) at every size, but sqrt(192) in the authors' script for 130M.
    "apollo-mini-60m": {**_PRETRAIN, **_MINI},
    "apollo-mini-130m": {**_PRETRAIN, **_MINI, "alpha": sqrt(192)},
    "apollo-mini-350m": {**_PRETRAIN, **_MINI},
    "apollo-mini-1b": {**_PRETRAIN, **_MINI},
    "apollo-mini-7b": {**_PRETRAIN, **_MINI},
    # After insitu.quantize(model, group_size=128), the group size of the paper's int8 table; eps is that of the authors' int8
    # optimizer. Their other numbers for it are not known to us: rank, alpha and learning rate are those of the float recipes.
    "q-apollo-60m": {**_PRETRAIN, "rank": 128, "eps": 1e-8},
    "q-apollo-130m": {**_PRETRAIN, "rank": 192, "eps": 1e-8},
    "q-apollo-350m": {**_PRETRAIN, "rank": 256, "eps": 1e-8},
    "q-apollo-mini-60m": {**_PRETRAIN, **_MINI, "eps": 1e-8},
    "q-apollo-mini-130m": {**_PRETRAIN, **_MINI, "alpha": sqrt(192), "eps": 1e-8},
    "q-apollo-mini-350m": {**_PRETRAIN, **_MINI, "eps": 1e-8},
    "apollo-finetune": {**_FINETUNE, "rank": 32, "alpha": sqrt(5)},
    "apollo-mini-finetune": {**_FINETUNE, **_MINI},
}


def preset(name: str) -> dict[str, Any]:
    """The options of a published recipe, for :class:`insitu.APOLLO`; change what you like in the dict.

    Raises:
        ValueError: no such recipe.

    >>> preset("apollo-mini-7b")["rank"]
    1
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: expected one of {', '.join(sorted(PRESETS))}")
    return dict(PRESETS[name])
