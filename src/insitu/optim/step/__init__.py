"""One step of one tensor. ``reference`` is the mathematics; a backend does its two passes over G and W.

A backend is chosen once, when the optimizer is made, and every backend is compared with the reference in the tests.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from insitu.optim.projection import Sketch


class Backend(Protocol):
    """The passes over full-size tensors. ``W`` is updated in place; ``key`` is None for rounding to nearest."""

    def measure(self, G: Tensor, projection: Tensor | Sketch, channel_dim: int) -> tuple[Tensor, Tensor]:
        """R = P G, and |G_j|^2 per channel."""
        ...

    def apply(self, W: Tensor, G: Tensor, eta_s: Tensor, decay: Tensor | None, key: int | None) -> None:
        """W <- W (1 - decay) - G eta_s."""
        ...

    def adamw(
        self,
        W: Tensor,
        G: Tensor,
        M: Tensor,
        V: Tensor,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        key: int | None,
    ) -> Tensor:
        """AdamW on a flat tensor, M and V in place; returns ``live``."""
        ...


def choose(name: str, device: torch.device) -> Backend:
    """The backend for tensors on ``device``: "auto" takes blocks on a CPU, where the cache decides."""
    from insitu.optim.step import blocked, reference

    if name == "blocked" or (name == "auto" and device.type == "cpu"):
        return blocked.Blocked(device)
    return reference.Reference()
