"""One step of one tensor. ``reference`` is the mathematics; a backend does its passes over G and W.

A backend is chosen once, when the optimizer is made, and every backend is compared with the reference in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from insitu.optim.projection import Projection
from insitu.optim.rounding import Precision


class Backend(Protocol):
    """The passes over large tensors. Tensors of one shape come together, as lists of T.

    ``live`` (T,) is 1.0 or 0.0: where it is 0.0 nothing of that tensor may change, even if its G holds NaN. A ``Precision``
    says how a tensor is stored; the arithmetic is float32.
    """

    def measure(
        self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int, per_channel: bool
    ) -> tuple[Tensor, Tensor]:
        """R = P G of each matrix (b of them in each G), and |G_j|^2 per channel, (T b, n); both float32.

        Where ``per_channel`` is not asked for, |G|^2 as any number of parts will do: (T b, any).
        """
        ...

    def norms(self, R: Tensor, side: int) -> Tensor:
        """|R_j|^2 along ``side``: (T b, n)."""
        ...

    def direct(
        self,
        R: Tensor,
        M: Sequence[Tensor],
        V: Sequence[Tensor],
        live: Tensor,
        side: int,
        *,
        step: int,
        betas: tuple[float, float],
        eps: float,
    ) -> Tensor:
        """M and V (b, ...), float32, in place, and |R~_j|^2 along ``side``: (T b, n). The content of R is lost."""
        ...

    def square(self, G: Sequence[Tensor]) -> Tensor:
        """|G|^2 of flat tensors: (T,) float64."""
        ...

    def apply(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        eta_s: Tensor,
        decay: Tensor | None,
        live: Tensor,
        precisions: Sequence[Precision],
    ) -> None:
        """W <- W (1 - decay) - G eta_s, in place; ``eta_s`` (T b, rows or 1, cols or 1), ``decay`` (T b,)."""
        ...

    def adamw(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        M: Sequence[Tensor],
        V: Sequence[Tensor],
        live: Tensor,
        precisions: Sequence[Precision],
        moments: Sequence[tuple[Precision, Precision]],
        *,
        step: int,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        """AdamW on flat tensors; W, M and V in place, M and V stored as ``moments`` says."""
        ...


def choose(name: str, device: torch.device) -> Backend:
    """The backend for tensors on ``device``: "auto" takes blocks on a CPU, where the cache decides."""
    from insitu.optim.step import blocked, reference

    if name == "blocked" or (name == "auto" and device.type == "cpu"):
        return blocked.Blocked(device)
    return reference.Reference()
