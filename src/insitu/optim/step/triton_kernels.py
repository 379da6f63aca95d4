"""The Triton kernels of the passes: each reads a matrix once. :mod:`insitu.optim.step.triton` launches them.

A matrix is seen as n channels of m numbers whatever its orientation: strides say which is which, so one kernel serves tall and
wide. The second grid axis counts the matrices of a stack.
"""

# The language of Triton has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from insitu.optim.rounding import MIXER, WEYL

_WEYL, _MIXER = (tl.constexpr((word + 2**31) % 2**32 - 2**31) for word in (WEYL, MIXER))
PLAIN, STOCHASTIC, COMPENSATED = (tl.constexpr(i) for i in range(3))  # how a number is stored


@triton.jit
def measure_one(G, P, R, G_sq, n, m, g_stack, g_n, g_m, BN: tl.constexpr, BM: tl.constexpr):
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
def measure_dense(
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
def measure_sketch(
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
    m = m * (1 - weight1 * live) + r * (weight1 * live)  # m + (r - m) weight would lose what is small beside m
    v = v * (1 - weight2 * live) + r * r * (weight2 * live)
    return m, v, m / (tl.sqrt_rn(v / correction2) + eps) / correction1


@triton.jit
def direct(
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
    if HOW == STOCHASTIC:
        place = at.to(tl.int32) + odd
        word = base + (place >> 1) * _WEYL
        word = (word ^ (word >> 15)) * factor
        word = (word ^ (word >> 15)) * _MIXER
        random = (word >> ((place & 1) << 4)) & 0xFFFF
        value = ((value.to(tl.int32, bitcast=True) + random) & -65536).to(tl.float32, bitcast=True)
    stored = _nearest(value, out)
    tl.store(out + at, stored, mask)
    if HOW == COMPENSATED:
        tl.store(residual + at, _nearest(value - stored.to(tl.float32), residual), mask)


@triton.jit
def apply(
    W, G, eta_s, decay, live, residual, size, cols, eta_row, eta_col, base, factor, odd,
    DECAY: tl.constexpr, HOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W (1 - decay) - G eta_s of one matrix."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    w = tl.load(W + at, mask, 0.0).to(tl.float32)
    if HOW == COMPENSATED:
        w += tl.load(residual + at, mask, 0.0).to(tl.float32)
    g = tl.where(tl.load(live) > 0, tl.load(G + at, mask, 0.0).to(tl.float32), 0.0)
    eta = tl.load(eta_s + (at // cols) * eta_row + (at % cols) * eta_col, mask, 0.0)
    if DECAY:
        w *= 1 - tl.load(decay)
    _store(W, residual, at, w - g * eta, mask, base, factor, odd, HOW)


@triton.jit
def adamw(
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
    if HOW == COMPENSATED:
        w += tl.load(residual + at, mask, 0.0).to(tl.float32)
    g = tl.load(G + at, mask, 0.0).to(tl.float32)
    m, v = tl.load(M + at, mask, 0.0).to(tl.float32), tl.load(V + at, mask, 1.0).to(tl.float32)
    m, v, direction = _moments(g, m, v, alive, weight1, weight2, correction1, correction2, eps)
    if DECAY:
        w *= 1 - alive * (rate * decay)
    _store(W, residual, at, w - direction * (alive * rate * SIGN), mask, w_base, w_factor, w_odd, HOW)
    _store(M, M, at, m, mask, m_base, m_factor, m_odd, HOW_M)
    _store(V, V, at, v, mask, v_base, v_factor, v_odd, HOW_V)
