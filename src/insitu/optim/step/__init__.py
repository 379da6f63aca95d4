"""One step of one tensor. ``reference`` is the mathematics; a backend does its passes over G and W.

A backend is chosen once, when the optimizer is made, and every backend is compared with the reference in the tests.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from insitu.optim.projection import Projection
from insitu.optim.rounding import Precision


class Backend(Protocol):
    """The passes over full-size tensors. ``W`` is updated in place and stored as ``precision`` says.

    ``live`` is 1.0 or 0.0, 0-dim: where it is 0.0 nothing may change, even if G holds NaN.
    """

    def measure(self, G: Tensor, projection: Projection, channel_dim: int) -> tuple[Tensor, Tensor]:
        """R = P G of each matrix, and |G_j|^2 per channel: (..., n)."""
        ...

    def square(self, G: Tensor) -> Tensor:
        """|G|^2 of a flat tensor, 0-dim float64."""
        ...

    def apply(
        self, W: Tensor, G: Tensor, eta_s: Tensor, decay: Tensor | None, live: Tensor, precision: Precision
    ) -> None:
        """W <- W (1 - decay) - G eta_s."""
        ...

    def adamw(
        self,
        W: Tensor,
        G: Tensor,
        M: Tensor,
        V: Tensor,
        live: Tensor,
        precision: Precision,
        moments: tuple[Precision, Precision],
        *,
        step: int,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        """AdamW on a flat tensor; M and V in place, stored as ``moments`` says."""
        ...


def choose(name: str, device: torch.device) -> Backend:
    """The backend for tensors on ``device``: "auto" takes blocks on a CPU, where the cache decides."""
    from insitu.optim.step import blocked, reference

    if name == "blocked" or (name == "auto" and device.type == "cpu"):
        return blocked.Blocked(device)
    return reference.Reference()
