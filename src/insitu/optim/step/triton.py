"""The passes for CUDA, by the kernels of :mod:`insitu.optim.step.triton_kernels`, with the rounding in the pass that writes.

A stack of matrices is one launch; different tensors are a launch each. Nothing here waits for the device. A step as a whole is
not to be captured as a CUDA graph: the update's number and the keys of the rounding are the host's, and a replay would repeat
them.

On a CPU it runs, slowly, in Triton's interpreter: that is how it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from insitu.optim.projection import Projection, Sketch
from insitu.optim.rounding import Precision, hash_numbers, in_one_period
from insitu.optim.step import reference
from insitu.optim.step import triton_kernels as kernels

_CHANNELS, _SIDE, _RANK, _FLAT = 32, 64, 64, 1024  # sizes of a program's tile


class Triton:
    """The backend for CUDA."""

    def __init__(self) -> None:
        self._plain = reference.Reference()
        self.factors, self.limited = self._plain.factors, self._plain.limited

    def measure(self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int, R: Tensor) -> Tensor:
        """As the reference, in one pass over G (one for each 64 ranks of a dense P)."""
        b, rows, cols = G[0].shape
        n, m = (rows, cols) if channel_dim == -2 else (cols, rows)
        first = projections[0]
        rank = first.shape[-2] if isinstance(first, Tensor) else first.rank
        G_sq = torch.zeros(len(R), n, device=G[0].device)
        if G[0].numel() == 0:  # a part of a sharded tensor may be empty
            R.zero_()
            return G_sq
        r_n, r_r = (rank, 1) if channel_dim == -2 else (1, cols)
        for t, (g, projection) in enumerate(zip(G, projections, strict=True)):
            g = g.contiguous()
            strides = (rows * cols, cols, 1) if channel_dim == -2 else (rows * cols, 1, cols)
            out = R[t * b : (t + 1) * b], G_sq[t * b : (t + 1) * b]
            programs = triton.cdiv(n, _CHANNELS), b
            if isinstance(projection, Sketch):
                repeats = len(projection.order) // rank
                kernels.measure_sketch[programs](
                    g,
                    projection.order,
                    projection.signs,
                    *out,
                    n,
                    rank,
                    repeats,
                    *strides,
                    r_n,
                    r_r,
                    BN=_CHANNELS,
                    BR=_RANK,
                )
            elif rank == 1 and projection.ndim == 2:
                kernels.measure_one[programs](g, projection.contiguous(), *out, n, m, *strides, BN=_CHANNELS, BM=_SIDE)
            else:
                P = projection.contiguous()
                p_stack = rank * m if P.ndim == 3 else 0
                kernels.measure_dense[(*programs, triton.cdiv(rank, _RANK))](
                    g, P, *out, n, m, rank, *strides, p_stack, r_n, r_r, BN=_CHANNELS, BM=_SIDE, BR=_RANK
                )
        return G_sq

    def norms(self, R: Tensor, side: int) -> Tensor:
        """As the reference."""
        norms: Tensor = torch.linalg.vector_norm(R, dim=side)
        return norms.square_()

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
        """As the reference, in one pass over R, M and V."""
        R, b = R.contiguous(), len(M[0])
        n, rank = R.shape[-3 - side], R.shape[side]
        r_n, r_r = (rank, 1) if side == -1 else (1, n)
        out = torch.zeros(len(R), n, device=R.device)
        for t, (m, v) in enumerate(zip(M, V, strict=True)):
            if not (m.is_contiguous() and v.is_contiguous()):
                these = R[t * b : (t + 1) * b], [m], [v], live[t : t + 1]
                out[t * b : (t + 1) * b] = self._plain.direct(*these, side, step=step, betas=betas, eps=eps)
            elif m.numel():
                kernels.direct[(triton.cdiv(n, _CHANNELS), b)](
                    R[t * b], m, v, live[t], out[t * b], n, rank, b, r_n, r_r, *_corrections(step, betas), eps,
                    BN=_CHANNELS, BR=_RANK,
                )  # fmt: skip
        return out

    def square(self, G: Sequence[Tensor]) -> Tensor:
        """As the reference, without a copy in float32."""
        precise = torch.promote_types(G[0].dtype, torch.float32)
        return torch.stack([torch.linalg.vector_norm(g, dtype=precise) for g in G]).double().square_()

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
        num, (_, rows, cols) = len(W[0]), W[0].shape
        eta_row, eta_col = int(eta_s.shape[1] > 1) * eta_s.shape[2], int(eta_s.shape[2] > 1)
        eta_s = eta_s.contiguous()
        for t, (w, g, precision) in enumerate(zip(W, G, precisions, strict=True)):
            if w.numel() == 0:
                continue
            if not _possible(w, precision):
                these = slice(t * num, (t + 1) * num)
                its_decay = None if decay is None else decay[these]
                self._plain.apply([w], [g], eta_s[these], its_decay, live[t : t + 1], [precision])
                continue
            g = g.contiguous()
            for b in range(num):
                precise = precision.of(b * rows * cols, rows * cols)
                how, residual, numbers = _how(precise, w)
                i = t * num + b
                kernels.apply[(triton.cdiv(rows * cols, _FLAT),)](
                    w[b], g[b], eta_s[i], live if decay is None else decay[i], live[t], residual, rows * cols, cols,
                    eta_row, eta_col, *numbers, DECAY=decay is not None, HOW=how, BLOCK=_FLAT,
                )  # fmt: skip

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
        """As the reference, in one pass."""
        rate = torch.full_like(live[0], lr) if not isinstance(lr, Tensor) else lr.to(live.device, torch.float32)
        for t, (w, g, m, v) in enumerate(zip(W, G, M, V, strict=True)):
            stored = ((w, precisions[t]), (m, moments[t][0]), (v, moments[t][1]))
            if not all(_possible(x, precision) and x.is_contiguous() for x, precision in stored):
                self._plain.adamw(
                    [w], [g], [m], [v], live[t : t + 1], [precisions[t]], [moments[t]], step=step, lr=lr, betas=betas, eps=eps,
                    weight_decay=weight_decay, maximize=maximize,
                )  # fmt: skip
                continue
            (how, residual, numbers), (how_m, _, numbers_m), (how_v, _, numbers_v) = (_how(p, x) for x, p in stored)
            kernels.adamw[(triton.cdiv(w.numel(), _FLAT),)](
                w, g.contiguous(), m, v, live[t], rate, residual, w.numel(), *_corrections(step, betas), eps, weight_decay,
                *numbers, *numbers_m, *numbers_v, DECAY=bool(weight_decay), HOW=how, HOW_M=how_m, HOW_V=how_v,
                SIGN=-1 if maximize else 1, BLOCK=_FLAT,
            )  # fmt: skip


def _corrections(step: int, betas: tuple[float, float]) -> tuple[float, ...]:
    return 1 - betas[0], 1 - betas[1], 1 - betas[0] ** step, 1 - betas[1] ** step


def _possible(stored: Tensor, precision: Precision) -> bool:
    """Whether the kernels can store it: up to float32, and elements whose indices follow one another."""
    return stored.dtype != torch.float64 and (
        precision.key is None
        or (
            isinstance(precision.start, int)
            and stored.numel() < 2**31
            and in_one_period(precision.start, stored.numel())
        )
    )


def _how(precision: Precision, stored: Tensor) -> tuple[Any, Tensor, tuple[int, int, int]]:
    if precision.residual is not None:
        return kernels.COMPENSATED.value, precision.residual, (0, 0, 0)
    if precision.key is None:
        return kernels.PLAIN.value, stored, (0, 0, 0)
    assert isinstance(precision.start, int)
    return kernels.STOCHASTIC.value, stored, hash_numbers(precision.key, precision.start)
