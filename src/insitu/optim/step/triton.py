"""The passes for CUDA: Triton kernels that read each matrix once, with the rounding in the pass that writes the weights.

A matrix is seen as n channels of m numbers whatever its orientation: strides say which is which, so one kernel serves tall and
wide. A stack of matrices is one launch (the second grid axis); different tensors are a launch each. Nothing here waits for the
device. A step as a whole is not to be captured as a CUDA graph: the update's number and the keys of the rounding are the
host's, and a replay would repeat them.

On a CPU it runs, slowly, in Triton's interpreter: that is how it is tested.
"""

# Kernels are written in the language of Triton, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from insitu.optim.projection import Projection, Sketch
from insitu.optim.rounding import MIXER, WEYL, Precision, hash_numbers, in_one_period
from insitu.optim.step import reference

_WEYL, _MIXER = (tl.constexpr((word + 2**31) % 2**32 - 2**31) for word in (WEYL, MIXER))
_PLAIN, _STOCHASTIC, _COMPENSATED = (tl.constexpr(i) for i in range(3))  # how a number is stored
_CHANNELS, _SIDE, _RANK, _FLAT = 32, 64, 64, 1024  # sizes of a program's tile


@triton.jit
def _measure_one(G, P, R, G_sq, n, m, g_stack, g_n, g_m, BN: tl.constexpr, BM: tl.constexpr):
    """Rank 1: R_j = P . G_j and |G_j|^2."""
    stack = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    start = G + stack * g_stack + j[:, None].to(tl.int64) * g_n
    r = tl.zeros([BN], tl.float32)
    square = tl.zeros([BN], tl.float32)
    for first in range(0, m, BM):
        i = first + tl.arange(0, BM)
        g = tl.load(start + i[None, :].to(tl.int64) * g_m, (j < n)[:, None] & (i < m)[None, :], 0.0).to(tl.float32)
        r += tl.sum(g * tl.load(P + i, i < m, 0.0)[None, :], 1)
        square += tl.sum(g * g, 1)
    tl.store(R + stack * n + j, r, j < n)
    tl.store(G_sq + stack * n + j, square, j < n)


@triton.jit
def _measure_dense(
    G, P, R, G_sq, n, m, rank, g_stack, g_n, g_m, p_stack, r_n, r_r,
    BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """R = P G, a tile of channels and ranks in each program; the first programs of a channel also make |G_j|^2."""
    stack = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    k = block * BR + tl.arange(0, BR)
    start = G + stack * g_stack + j[:, None].to(tl.int64) * g_n
    found = tl.zeros([BN, BR], tl.float32)
    square = tl.zeros([BN], tl.float32)
    for first in range(0, m, BM):
        i = first + tl.arange(0, BM)
        g = tl.load(start + i[None, :].to(tl.int64) * g_m, (j < n)[:, None] & (i < m)[None, :], 0.0).to(tl.float32)
        p = tl.load(P + stack * p_stack + k[None, :] * m + i[:, None], (k < rank)[None, :] & (i < m)[:, None], 0.0)
        found = tl.dot(g, p, found, input_precision="ieee")
        square += tl.sum(g * g, 1)
    at = R + stack * n * rank + j[:, None].to(tl.int64) * r_n + k[None, :].to(tl.int64) * r_r
    tl.store(at, found, (j < n)[:, None] & (k < rank)[None, :])
    if block == 0:
        tl.store(G_sq + stack * n + j, square, j < n)


@triton.jit
def _measure_sketch(
    G, order, signs, R, G_sq, n, rank, repeats, g_stack, g_n, g_m, r_n, r_r, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """Each coordinate once, to its bucket; places that are left over have the sign 0."""
    stack = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    start = G + stack * g_stack + j[:, None].to(tl.int64) * g_n
    square = tl.zeros([BN], tl.float32)
    for first in range(0, rank, BR):
        k = first + tl.arange(0, BR)
        found = tl.zeros([BN, BR], tl.float32)
        for repeat in range(repeats):
            sign = tl.load(signs + repeat * rank + k, k < rank, 0.0)
            i = tl.load(order + repeat * rank + k, k < rank, 0)
            g = tl.load(start + i[None, :] * g_m, (j < n)[:, None] & (sign != 0)[None, :], 0.0).to(tl.float32)
            found += g * sign[None, :]
            square += tl.sum(g * g, 1)
        at = R + stack * n * rank + j[:, None].to(tl.int64) * r_n + k[None, :].to(tl.int64) * r_r
        tl.store(at, found, (j < n)[:, None] & (k < rank)[None, :])
    tl.store(G_sq + stack * n + j, square, j < n)


@triton.jit
def _moments(r, m, v, live, weight1, weight2, correction1, correction2, eps):
    """New M and V, and R~."""
    r = tl.where(live > 0, r, 0.0)
    m = m + (r - m) * (weight1 * live)
    v = v + (r * r - v) * (weight2 * live)
    return m, v, m / (tl.sqrt_rn(v / correction2) + eps) / correction1


@triton.jit
def _direct(
    R, M, V, live, out, n, rank, stack_size, r_n, r_r, weight1, weight2, correction1, correction2, eps,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Adam's moments in place, and |R~_j|^2."""
    stack = tl.program_id(1).to(tl.int64)
    alive = tl.load(live)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    square = tl.zeros([BN], tl.float32)
    for first in range(0, rank, BR):
        k = first + tl.arange(0, BR)
        at = stack * n * rank + j[:, None].to(tl.int64) * r_n + k[None, :].to(tl.int64) * r_r
        mask = (j < n)[:, None] & (k < rank)[None, :]
        r, m, v = tl.load(R + at, mask, 0.0), tl.load(M + at, mask, 0.0), tl.load(V + at, mask, 1.0)
        m, v, direction = _moments(r, m, v, alive, weight1, weight2, correction1, correction2, eps)
        tl.store(M + at, m, mask)
        tl.store(V + at, v, mask)
        square += tl.sum(tl.where(mask, direction * direction, 0.0), 1)
    tl.store(out + stack * n + j, square, j < n)


@triton.jit
def _nearest(value, like):
    """``value`` as the type of ``like`` holds it. Of bf16 in bits: what a device or the interpreter rounds to is its own."""
    if like.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return value.to(like.dtype.element_ty)


@triton.jit
def _store(out, residual, at, value, mask, base, factor, odd, HOW: tl.constexpr):
    """One number per element, rounded as insitu.optim.rounding does it, to the bit."""
    if HOW == _STOCHASTIC:
        place = at.to(tl.int32) + odd
        word = base + (place >> 1) * _WEYL
        word = (word ^ (word >> 15)) * factor
        word = (word ^ (word >> 15)) * _MIXER
        random = (word >> ((place & 1) << 4)) & 0xFFFF
        value = ((value.to(tl.int32, bitcast=True) + random) & -65536).to(tl.float32, bitcast=True)
    stored = _nearest(value, out)
    tl.store(out + at, stored, mask)
    if HOW == _COMPENSATED:
        tl.store(residual + at, _nearest(value - stored.to(tl.float32), residual), mask)


@triton.jit
def _apply(
    W, G, eta_s, decay, live, residual, size, cols, eta_row, eta_col, base, factor, odd,
    DECAY: tl.constexpr, HOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W (1 - decay) - G eta_s of one matrix."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    w = tl.load(W + at, mask, 0.0).to(tl.float32)
    if HOW == _COMPENSATED:
        w += tl.load(residual + at, mask, 0.0).to(tl.float32)
    g = tl.where(tl.load(live) > 0, tl.load(G + at, mask, 0.0).to(tl.float32), 0.0)
    eta = tl.load(eta_s + (at // cols) * eta_row + (at % cols) * eta_col, mask, 0.0)
    if DECAY:
        w *= 1 - tl.load(decay)
    _store(W, residual, at, w - g * eta, mask, base, factor, odd, HOW)


@triton.jit
def _adamw(
    W, G, M, V, live, lr, residual, size, weight1, weight2, correction1, correction2, eps, decay,
    w_base, w_factor, w_odd, m_base, m_factor, m_odd, v_base, v_factor, v_odd,
    DECAY: tl.constexpr, HOW: tl.constexpr, HOW_M: tl.constexpr, HOW_V: tl.constexpr, SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW, element by element; ``lr`` points to a float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    alive, rate = tl.load(live), tl.load(lr)
    w = tl.load(W + at, mask, 0.0).to(tl.float32)
    if HOW == _COMPENSATED:
        w += tl.load(residual + at, mask, 0.0).to(tl.float32)
    g = tl.load(G + at, mask, 0.0).to(tl.float32)
    m, v = tl.load(M + at, mask, 0.0).to(tl.float32), tl.load(V + at, mask, 1.0).to(tl.float32)
    m, v, direction = _moments(g, m, v, alive, weight1, weight2, correction1, correction2, eps)
    if DECAY:
        w *= 1 - alive * (rate * decay)
    _store(W, residual, at, w - direction * (alive * rate * SIGN), mask, w_base, w_factor, w_odd, HOW)
    _store(M, M, at, m, mask, m_base, m_factor, m_odd, HOW_M)
    _store(V, V, at, v, mask, v_base, v_factor, v_odd, HOW_V)


class Triton:
    """The backend for CUDA."""

    def __init__(self) -> None:
        self._plain = reference.Reference()

    def measure(
        self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int
    ) -> tuple[Tensor, Tensor]:
        """As the reference, in one pass over G (one for each 64 ranks of a dense P)."""
        b, rows, cols = G[0].shape
        n, m = (rows, cols) if channel_dim == -2 else (cols, rows)
        first = projections[0]
        rank = first.shape[-2] if isinstance(first, Tensor) else first.rank
        shape = (rows, rank) if channel_dim == -2 else (rank, cols)
        R = torch.zeros(len(G) * b, *shape, device=G[0].device)
        G_sq = torch.zeros(len(R), n, device=G[0].device)
        if G[0].numel() == 0:  # a part of a sharded tensor may be empty
            return R, G_sq
        r_n, r_r = (rank, 1) if channel_dim == -2 else (1, cols)
        for t, (g, projection) in enumerate(zip(G, projections, strict=True)):
            g = g.contiguous()
            strides = (rows * cols, cols, 1) if channel_dim == -2 else (rows * cols, 1, cols)
            out = R[t * b : (t + 1) * b], G_sq[t * b : (t + 1) * b]
            programs = triton.cdiv(n, _CHANNELS), b
            if isinstance(projection, Sketch):
                repeats = len(projection.order) // rank
                _measure_sketch[programs](
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
                _measure_one[programs](g, projection.contiguous(), *out, n, m, *strides, BN=_CHANNELS, BM=_SIDE)
            else:
                P = projection.contiguous()
                p_stack = rank * m if P.ndim == 3 else 0
                _measure_dense[(*programs, triton.cdiv(rank, _RANK))](
                    g, P, *out, n, m, rank, *strides, p_stack, r_n, r_r, BN=_CHANNELS, BM=_SIDE, BR=_RANK
                )
        return R, G_sq

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
                _direct[(triton.cdiv(n, _CHANNELS), b)](
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
                _apply[(triton.cdiv(rows * cols, _FLAT),)](
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
            _adamw[(triton.cdiv(w.numel(), _FLAT),)](
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
        return _COMPENSATED.value, precision.residual, (0, 0, 0)
    if precision.key is None:
        return _PLAIN.value, stored, (0, 0, 0)
    assert isinstance(precision.start, int)
    return _STOCHASTIC.value, stored, hash_numbers(precision.key, precision.start)
