"""APOLLO in torchtitan: a configurable optimizer for ``OptimizersContainer``. Written to its interface, not run with it yet.

Put into a training configuration one entry for each role, first match wins:

    OptimizersContainer.Config(
        optimizers=[
            Apollo.Config(pattern=r"tok_embeddings|output|lm_head", role="dense", lr=3e-4),
            Apollo.Config(pattern=r"norm|bias", role="adamw", lr=3e-4),
            Apollo.Config(pattern=r".*", role="matrix", lr=3e-4, weight_decay=0.1),
        ]
    )
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan.components.optimizer import BaseOptimizer

import insitu


class Apollo(insitu.APOLLO, BaseOptimizer):
    """:class:`insitu.APOLLO`, built from a configuration."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseOptimizer.Config):
        role: str = "matrix"
        lr: float = 1e-3
        rank: int = 256
        refresh: int = 200
        projection: str = "gaussian"
        dense: str = "adamw"
        betas: tuple[float, float] = (0.9, 0.999)
        eps: float = 1e-8
        weight_decay: float = 0.0
        seed: int = 0

    def __init__(self, config: Config, *, params: Sequence[dict[str, Any]]) -> None:
        groups = [{**group, "role": config.role} for group in params]
        options = ("lr", "rank", "refresh", "projection", "dense", "betas", "eps", "weight_decay", "seed")
        super().__init__(groups, **{name: getattr(config, name) for name in options})
