"""One step of one tensor. ``reference`` is the mathematics; a backend does its passes over G and W.

A backend is chosen once, when the optimizer is made, and every backend is compared with the reference in the tests.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from insitu.optim.projection import Projection
from insitu.optim.rounding import Precision
from insitu.optim.step.scratch import Scratch

_log = logging.getLogger(__name__)
# Which update this is, from 1. Where a step may be captured only the device knows: then (T,) int64, of each tensor of a call.
Updates = int | Tensor


class Backend(Protocol):
    """The passes over large tensors. Tensors of one shape come together, as lists of T.

    ``live`` (T,) is 1.0 or 0.0: where it is 0.0 nothing of that tensor may change, even if its G holds NaN. A ``Precision``
    says how a tensor is stored; the arithmetic is float32.
    """

    def measure(self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int, R: Tensor) -> Tensor:
        """Write P G of each matrix (b of them in each G) to ``R``, and return |G_j|^2 per channel, (T b, n); both float32."""
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
        step: Updates,
        betas: tuple[float, float],
        eps: float,
    ) -> Tensor:
        """M and V (b, ...), float32, in place, and |R~_j|^2 along ``side``: (T b, n). The content of R is lost."""
        ...

    def factors(self, above_sq: Tensor, below_sq: Tensor, needed_sq: Tensor, G_sq: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`insitu.optim.step.reference.factors`."""
        ...

    def limited(
        self,
        s: Tensor,
        norm_sq: Tensor,
        last_norm: Sequence[Tensor],
        live: Tensor,
        *,
        alpha: float,
        gamma: float,
        eta: float | Tensor,
    ) -> Tensor:
        """As :func:`insitu.optim.step.reference.limited`; the content of s is lost."""
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
        step: Updates,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        """AdamW on flat tensors; W, M and V in place, M and V stored as ``moments`` says."""
        ...


def choose(name: str, device: torch.device, scratch: Scratch | None = None) -> Backend:
    """The backend for tensors on ``device``, with ``scratch`` to use; the one place of choice.

    "auto" is Triton on CUDA where it can be imported; on a CPU, where it never compiles, the C++ kernels if they were compiled
    at installation, else blocks; and the reference anywhere else. "compiled", "native" and "fused" without a compiler warn
    once, and blocks (on CUDA the reference) do the steps.

    Raises:
        ValueError: "triton" where it cannot run, "blocked", "native" or "fused" elsewhere than on a CPU.
    """
    picked, scratch = _picked(name, device.type), scratch or Scratch()
    if picked == "triton":
        from insitu.optim.step.triton import Triton

        return Triton(scratch)
    if picked == "compiled":
        from insitu.optim.step.compiled import Compiled

        return Compiled(_plain(device, scratch))
    if picked in ("native", "fused"):
        from insitu.optim.step.native import Fused, Native

        return (Fused if picked == "fused" else Native)(device, scratch)
    return _plain(device, scratch) if picked == "blocked" else _reference()


@functools.cache
def _picked(name: str, device_type: str) -> str:
    """Decided once, and said."""
    picked = name
    if name == "auto":
        picked = _of_cpu() if device_type == "cpu" else "triton" if _triton_lacks(device_type) is None else "reference"
    elif name in ("blocked", "native", "fused") and device_type != "cpu":
        raise ValueError(f"backend={name!r} on {device_type}: it is for CPUs; use backend='auto'")
    elif name == "triton" and (lack := _triton_lacks(device_type)):
        raise ValueError(f"backend='triton' cannot run on {device_type}: {lack}; use backend='auto'")
    elif name in ("native", "fused", "compiled") and (lack := _compiler_lacks(name, device_type)):
        picked = "blocked" if device_type == "cpu" else "reference"
        warnings.warn(
            f"backend={name!r} on {device_type} finds {lack}: {picked!r} does the steps instead, with the same numbers",
            UserWarning,
            stacklevel=2,
        )
    _log.info("optimizer steps on %s: backend=%r is %r", device_type, name, picked)
    return picked


def _of_cpu() -> str:
    from insitu.optim.step import native

    return "blocked" if native.installed() is None else "native"


def _compiler_lacks(name: str, device_type: str) -> str | None:
    """What is missing to compile, or None."""
    if name in ("native", "fused"):
        from insitu.optim.step import native

        return built if isinstance(built := native.build(), str) else None
    from insitu.optim.step import compiled

    return compiled.missing_compiler(torch.device(device_type))


def _triton_lacks(device_type: str) -> str | None:
    """Why Triton cannot run there, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return "it needs a CUDA device (or TRITON_INTERPRET=1, set before Python starts, to try it slowly on a CPU)"


def _plain(device: torch.device, scratch: Scratch) -> Backend:
    from insitu.optim.step.blocked import Blocked

    return Blocked(device, scratch) if device.type == "cpu" else _reference()


def _reference() -> Backend:
    from insitu.optim.step.reference import Reference

    return Reference()
