"""The Triton kernels of the passes: each reads a matrix once. :mod:`insitu.optim.step.triton` launches them.

A matrix is seen as n channels of m numbers whatever its orientation: strides say which is which, so one kernel serves tall and
wide.

A launch is for many tensors of one shape. ``table`` (int64) has a row for each: its number t in the call, then the addresses of
what is its own, then its numbers. What the call has in one piece (R, ``eta_s``, ``live``) is found by t. The first grid axis
counts the programs of a matrix, the matrices of a tensor (``stack_size``) and the tensors: it is the one that may be long.
"""

# The language of Triton has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from insitu.optim.rounding import MIXER, WEYL
from insitu.optim.seeds import signed

_WEYL, _MIXER = (tl.constexpr(signed(word, 32)) for word in (WEYL, MIXER))
PLAIN, STOCHASTIC, COMPENSATED = (tl.constexpr(i) for i in range(3))  # how a number is stored
# What a row of a table holds: t, addresses and numbers, as the kernels below read them.
MEASURE, DIRECT, APPLY, ADAMW = (tl.constexpr(i) for i in (4, 5, 7, 17))


@triton.jit
def _place(table, COLUMNS: tl.constexpr, stack_size, blocks):
    """This program's row of the table, its matrix among those of the tensor, and of the call, and its block of the matrix."""
    program = tl.program_id(0)
    matrix = program // blocks
    row = table + (matrix // stack_size) * COLUMNS
    stack = (matrix % stack_size).to(tl.int64)
    return row, stack, tl.load(row) * stack_size + stack, program % blocks


@triton.jit
def _pointer(entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry).to(tl.pointer_type(TYPE))
    if ALIGNED:  # only then are 16 bytes loaded at once; said of the address, before the cast, it would be lost
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _float(entry):
    """A float32 whose bits are in the table."""
    return tl.load(entry).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def measure_one(
    table, R, G_sq, stack_size, n, m, g_stack, g_n, g_m,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Rank 1: R_j = P . G_j and |G_j|^2."""
    row, stack, matrix, block = _place(table, MEASURE, stack_size, tl.cdiv(n, BN))
    G, P = _pointer(row + 1, TYPE, ALIGNED), _pointer(row + 2, tl.float32, ALIGNED)
    j = block * BN + tl.arange(0, BN)
    start = G + stack * g_stack + j[:, None].to(tl.int64) * g_n
    r = tl.zeros([BN], tl.float32)
    square = tl.zeros([BN], tl.float32)
    for first in range(0, m, BM):
        i = first + tl.arange(0, BM)
        g = tl.load(start + i[None, :].to(tl.int64) * g_m, (j < n)[:, None] & (i < m)[None, :], 0.0).to(tl.float32)
        r += tl.sum(g * tl.load(P + i, i < m, 0.0)[None, :], 1)
        square += tl.sum(g * g, 1)
    tl.store(R + matrix * n + j, r, j < n)
    tl.store(G_sq + matrix * n + j, square, j < n)


@triton.jit
def measure_dense(
    table, R, G_sq, stack_size, n, m, rank, g_stack, g_n, g_m, p_stack, r_n, r_r,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """R = P G, a tile of channels and ranks in each program; the first programs of a channel also make |G_j|^2."""
    row, stack, matrix, block = _place(table, MEASURE, stack_size, tl.cdiv(n, BN))
    G, P = _pointer(row + 1, TYPE, ALIGNED), _pointer(row + 2, tl.float32, ALIGNED)
    j = block * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BR + tl.arange(0, BR)
    start = G + stack * g_stack + j[:, None].to(tl.int64) * g_n
    found = tl.zeros([BN, BR], tl.float32)
    square = tl.zeros([BN], tl.float32)
    for first in range(0, m, BM):
        i = first + tl.arange(0, BM)
        g = tl.load(start + i[None, :].to(tl.int64) * g_m, (j < n)[:, None] & (i < m)[None, :], 0.0).to(tl.float32)
        p = tl.load(P + stack * p_stack + k[None, :] * m + i[:, None], (k < rank)[None, :] & (i < m)[:, None], 0.0)
        found = tl.dot(g, p, found, input_precision="ieee")
        square += tl.sum(g * g, 1)
    at = R + matrix * n * rank + j[:, None].to(tl.int64) * r_n + k[None, :].to(tl.int64) * r_r
    tl.store(at, found, (j < n)[:, None] & (k < rank)[None, :])
    if tl.program_id(1) == 0:
        tl.store(G_sq + matrix * n + j, square, j < n)


@triton.jit
def measure_sketch(
    table, R, G_sq, stack_size, n, rank, repeats, g_stack, g_n, g_m, r_n, r_r,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Each coordinate once, to its bucket; places that are left over have the sign 0."""
    row, stack, matrix, block = _place(table, MEASURE, stack_size, tl.cdiv(n, BN))
    G = _pointer(row + 1, TYPE, ALIGNED)
    order, signs = _pointer(row + 2, tl.int32, ALIGNED), _pointer(row + 3, tl.float32, ALIGNED)
    j = block * BN + tl.arange(0, BN)
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
        at = R + matrix * n * rank + j[:, None].to(tl.int64) * r_n + k[None, :].to(tl.int64) * r_r
        tl.store(at, found, (j < n)[:, None] & (k < rank)[None, :])
    tl.store(G_sq + matrix * n + j, square, j < n)


@triton.jit
def _moments(r, m, v, live, weight1, weight2, correction1, correction2, eps):
    """New M and V, and R~."""
    r = tl.where(live > 0, r, 0.0)
    m = m * (1 - weight1 * live) + r * (weight1 * live)  # m + (r - m) weight would lose what is small beside m
    v = v * (1 - weight2 * live) + r * r * (weight2 * live)
    return m, v, m / (tl.sqrt_rn(v / correction2) + eps) / correction1


@triton.jit
def direct(
    table, R, live, out, stack_size, n, rank, r_n, r_r, weight1, weight2, eps,
    ALIGNED: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Adam's moments in place, and |R~_j|^2."""
    row, stack, matrix, block = _place(table, DIRECT, stack_size, tl.cdiv(n, BN))
    M, V = _pointer(row + 1, tl.float32, ALIGNED), _pointer(row + 2, tl.float32, ALIGNED)
    M, V, R = M + stack * n * rank, V + stack * n * rank, R + matrix * n * rank
    alive, correction1, correction2 = tl.load(live + tl.load(row)), _float(row + 3), _float(row + 4)
    j = block * BN + tl.arange(0, BN)
    square = tl.zeros([BN], tl.float32)
    for first in range(0, rank, BR):
        k = first + tl.arange(0, BR)
        at = j[:, None].to(tl.int64) * r_n + k[None, :].to(tl.int64) * r_r
        mask = (j < n)[:, None] & (k < rank)[None, :]
        r, m, v = tl.load(R + at, mask, 0.0), tl.load(M + at, mask, 0.0), tl.load(V + at, mask, 1.0)
        m, v, direction = _moments(r, m, v, alive, weight1, weight2, correction1, correction2, eps)
        tl.store(M + at, m, mask)
        tl.store(V + at, v, mask)
        square += tl.sum(tl.where(mask, direction * direction, 0.0), 1)
    tl.store(out + matrix * n + j, square, j < n)


@triton.jit
def _nearest(value, like):
    """``value`` as the type of ``like`` holds it. Of bf16 in bits: what a device or the interpreter rounds to is its own."""
    if like.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return value.to(like.dtype.element_ty)


@triton.jit
def _store(out, residual, at, value, mask, numbers, HOW: tl.constexpr):
    """One number per element, rounded as insitu.optim.rounding does it, to the bit; its numbers are in the table."""
    if HOW == STOCHASTIC:
        base, factor = tl.load(numbers).to(tl.int32), tl.load(numbers + 1).to(tl.int32)
        place = at.to(tl.int32) + tl.load(numbers + 2).to(tl.int32)
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
    table, eta_s, decay, live, stack_size, size, cols, eta_stack, eta_row, eta_col,
    TYPE_W: tl.constexpr, TYPE_G: tl.constexpr, TYPE_RESIDUAL: tl.constexpr, ALIGNED: tl.constexpr,
    DECAY: tl.constexpr, HOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W (1 - decay) - G eta_s."""
    row, stack, matrix, block = _place(table, APPLY, stack_size, tl.cdiv(size, BLOCK))
    W, G = _pointer(row + 1, TYPE_W, ALIGNED), _pointer(row + 2, TYPE_G, ALIGNED)
    residual = _pointer(row + 3, TYPE_RESIDUAL, ALIGNED)
    here = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # in the matrix
    at, mask = stack * size + here, here < size
    w = tl.load(W + at, mask, 0.0).to(tl.float32)
    if HOW == COMPENSATED:
        w += tl.load(residual + at, mask, 0.0).to(tl.float32)
    g = tl.where(tl.load(live + tl.load(row)) > 0, tl.load(G + at, mask, 0.0).to(tl.float32), 0.0)
    eta = tl.load(eta_s + matrix * eta_stack + (here // cols) * eta_row + (here % cols) * eta_col, mask, 0.0)
    if DECAY:
        w *= 1 - tl.load(decay + matrix)
    _store(W, residual, at, w - g * eta, mask, row + 4, HOW)


@triton.jit
def adamw(
    table, live, lr, size, weight1, weight2, eps, decay,
    TYPE_W: tl.constexpr, TYPE_G: tl.constexpr, TYPE_M: tl.constexpr, TYPE_V: tl.constexpr, TYPE_RESIDUAL: tl.constexpr,
    ALIGNED: tl.constexpr, DECAY: tl.constexpr, HOW: tl.constexpr, HOW_M: tl.constexpr, HOW_V: tl.constexpr,
    SIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW, element by element; ``lr`` points to a float32."""
    row, _, t, block = _place(table, ADAMW, 1, tl.cdiv(size, BLOCK))
    W, G = _pointer(row + 1, TYPE_W, ALIGNED), _pointer(row + 2, TYPE_G, ALIGNED)
    M, V = _pointer(row + 3, TYPE_M, ALIGNED), _pointer(row + 4, TYPE_V, ALIGNED)
    residual = _pointer(row + 5, TYPE_RESIDUAL, ALIGNED)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    alive, rate, correction1, correction2 = tl.load(live + t), tl.load(lr), _float(row + 6), _float(row + 7)
    w = tl.load(W + at, mask, 0.0).to(tl.float32)
    if HOW == COMPENSATED:
        w += tl.load(residual + at, mask, 0.0).to(tl.float32)
    g = tl.load(G + at, mask, 0.0).to(tl.float32)
    m, v = tl.load(M + at, mask, 0.0).to(tl.float32), tl.load(V + at, mask, 1.0).to(tl.float32)
    m, v, direction = _moments(g, m, v, alive, weight1, weight2, correction1, correction2, eps)
    if DECAY:
        w *= 1 - alive * (rate * decay)
    _store(W, residual, at, w - direction * (alive * rate * SIGN), mask, row + 8, HOW)
    _store(M, M, at, m, mask, row + 11, HOW_M)
    _store(V, V, at, v, mask, row + 14, HOW_V)
