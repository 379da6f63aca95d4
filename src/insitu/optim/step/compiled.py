"""The passes by torch.compile: the formulas of the reference, each matrix read once, with the rounding in the same pass.

What a formula depends on (learning rate, limiter, keys of the rounding) enters as tensors, and shapes are dynamic: a graph is
compiled once per formula, type and layout, and never again because a number has changed. Compiling takes seconds at the first
step, so ``auto`` never picks this on a CPU. What a library's fused loop does as well (dense products, Adam) is left to it.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from insitu.optim.projection import Projection, Sketch
from insitu.optim.rounding import Precision, hash_numbers, hashed_bits, in_one_period
from insitu.optim.step import reference

if TYPE_CHECKING:
    from insitu.optim.step import Backend


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this device, in words; None where nothing is missing."""
    if device.type == "cpu":
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler

            compiler = get_cpp_compiler()
        except Exception as error:  # Inductor raises a class of its own, which is private
            return f"no C++ compiler ({error})"
        return None if shutil.which(compiler) else f"no C++ compiler ({compiler})"
    from torch.utils._triton import has_triton

    return None if has_triton() else f"Triton, by which torch.compile makes kernels for {device.type}"


class Compiled:
    """A backend; ``plain`` does what compiling does not make faster, and what was compiled here cannot do."""

    def __init__(self, plain: Backend) -> None:
        self._plain = plain
        self.norms, self.direct, self.square = plain.norms, plain.direct, plain.square
        self.factors, self.limited = plain.factors, plain.limited

    def measure(self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int, R: Tensor) -> Tensor:
        """As the reference, in one pass over G; a dense product of more than one row is the library's."""
        first = projections[0]
        if G[0].numel() == 0 or (isinstance(first, Tensor) and (first.ndim == 3 or first.shape[0] > 1)):
            return self._plain.measure(G, projections, channel_dim, R)
        parts = []
        for stack, projection in zip(G, projections, strict=True):
            for g in stack:
                if isinstance(projection, Sketch):
                    order, signs = (x.view(-1, projection.rank) for x in (projection.order.long(), projection.signs))
                    parts.append(_compiled(_measure_sketch, g.dtype, channel_dim)(g, order, signs, channel_dim))
                else:
                    parts.append(_compiled(_measure_one, g.dtype, channel_dim)(g, projection, channel_dim))
        torch.stack([found for found, _ in parts], out=R)
        return torch.stack([G_sq for _, G_sq in parts])

    def apply(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        eta_s: Tensor,
        decay: Tensor | None,
        live: Tensor,
        precisions: Sequence[Precision],
    ) -> None:
        """As the reference, in one pass over W and G."""
        num = len(W[0])
        for t, (w, g, precision) in enumerate(zip(W, G, precisions, strict=True)):
            these = slice(t * num, (t + 1) * num)
            if not _possible(w, precision):
                its_decay = None if decay is None else decay[these]
                self._plain.apply([w], [g], eta_s[these], its_decay, live[t : t + 1], [precision])
                continue
            for b in range(num):
                eta, precise = eta_s[t * num + b], precision.of(b * w[b].numel(), w[b].numel())
                how = (precise.key is not None, precise.residual is not None, decay is not None)
                _compiled(_apply, w.dtype, g.dtype, eta.shape[0] == 1, eta.shape[1] == 1, *how)(
                    w[b],
                    g[b],
                    eta,
                    None if decay is None else decay[t * num + b],
                    live[t],
                    None if precise.residual is None else precise.residual.view(w[b].shape),
                    _numbers(precise),
                )

    def adamw(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        M: Sequence[Tensor],
        V: Sequence[Tensor],
        live: Tensor,
        precisions: Sequence[Precision],
        moments: Sequence[tuple[Precision, Precision]],
        **numbers: Any,
    ) -> None:
        """The library's: see :class:`insitu.optim.step.blocked.Blocked`."""
        self._plain.adamw(W, G, M, V, live, precisions, moments, **numbers)


def _measure_one(G: Tensor, P: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    G = G.float()
    if channel_dim == -2:
        return (G * P).sum(1, keepdim=True), G.square().sum(1)
    return (G * P.mT).sum(0, keepdim=True), G.square().sum(0)


def _measure_sketch(G: Tensor, order: Tensor, signs: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """``order`` and ``signs`` (k, r): the k coordinates of each bucket are a column."""
    G = G.float()
    if channel_dim == -2:
        return (G[:, order] * signs).sum(1), G.square().sum(1)
    return (G[order] * signs[..., None]).sum(0), G.square().sum(0)


def _apply(
    W: Tensor,
    G: Tensor,
    eta_s: Tensor,
    decay: Tensor | None,
    live: Tensor,
    residual: Tensor | None,
    numbers: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """What :class:`insitu.optim.step.reference.Reference` does, rounding included."""
    work = reference.work_copy(W)
    if residual is not None:
        work = work + residual
    work = reference.descend(work, torch.where(live > 0, G, 0.0), eta_s, decay)
    if numbers is not None:
        index = torch.arange(W.numel(), dtype=torch.int32, device=W.device).view(W.shape)
        work = ((work.view(torch.int32) + hashed_bits(*numbers, index)) & -65536).view(torch.float32)
    if residual is None:
        W.copy_(work)
        return
    # Written out in bits: a compiler that keeps float32 where bf16 is stored would find that nothing is missing.
    bits = work.view(torch.int32)
    stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).view(torch.float32)
    W.copy_(stored)
    residual.copy_(work - stored)


@functools.cache
def _compiled(formula: Callable[..., Any], *_kind: Any) -> Callable[..., Any]:
    """One compiled function per formula and kind of argument: Dynamo counts the graphs of a code object, and gives up."""
    own = FunctionType(formula.__code__.replace(), formula.__globals__, formula.__name__)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _possible(W: Tensor, precision: Precision) -> bool:
    """Whether what is compiled can store it: residuals of bf16, and elements whose index fits the hash."""
    if W.numel() == 0 or (precision.residual is not None and W.dtype != torch.bfloat16):
        return False
    if precision.key is None:
        return True
    return isinstance(precision.start, int) and W.numel() < 2**31 and in_one_period(precision.start, W.numel())


def _numbers(precision: Precision) -> tuple[Tensor, Tensor, Tensor] | None:
    """0-dim tensors, so that another step is not another graph."""
    if precision.key is None:
        return None
    assert isinstance(precision.start, int)
    base, factor, odd = (torch.tensor(n, dtype=torch.int32) for n in hash_numbers(precision.key, precision.start))
    return base, factor, odd
