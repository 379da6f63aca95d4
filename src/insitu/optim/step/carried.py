"""A bundle of matrices as the C++ kernels take it: tables that are made once, so that a step of it is a few calls, or one.

What :func:`insitu.optim.step.reference.plan` does pass by pass, with Python between, is one function here (``carry`` in
cpp/carry.cpp), which calls the same kernels. It takes what most steps are made of: whole matrices, float32 or bf16, with
float32 moments. Everything else goes the general way, to the same numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from insitu.optim.exchange import Plan, Sum, Work
from insitu.optim.projection import Projection, Sketch
from insitu.optim.step import Backend
from insitu.optim.step.native import TYPES, Native, adam_numbers, pointers, tell_autograd
from insitu.optim.step.scratch import Scratch

Write = Callable[[Backend], None]
_CHUNK = 8 << 20  # bytes of gradients that are still in the cache when they are read again: of 1 to 8 MiB the fastest
_MEASURE, _SQUARE, _SCALE, _APPLY = 1, 2, 4, 8  # parts of ``carry``
_DENSE = -1  # "repeats" of a projection that is a library's product


class _Bundle(ctypes.Structure):
    """As cpp/carry.cpp has it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num", "chunk", "rows", "cols", "tall", "w_bfloat", "g_bfloat")),
        *((name, ctypes.c_int64) for name in ("rank", "repeats", "per_tensor", "exact", "rounded", "done")),
        *((name, ctypes.c_void_p) for name in ("W", "M", "V", "last_norm", "seeds", "P", "signs", "G")),
        *((name, ctypes.c_void_p) for name in ("squares", "R", "R_sq", "G_sq", "s")),
        *(("adam", ctypes.c_float * 7), ("numbers", ctypes.c_float * 3), ("decay", ctypes.c_float)),
    ]


class Carried:
    """T matrices that go through a step together, as they are until one of them changes.

    Args:
        W: (rows, cols) each; M, V: float32; ``last_norm``: 0-dim float32. All contiguous, on a CPU.
        seeds: of the random bits of each.
        rounded: whether W is rounded stochastically.
    """

    def __init__(
        self,
        W: Sequence[Tensor],
        M: Sequence[Tensor],
        V: Sequence[Tensor],
        last_norm: Sequence[Tensor],
        seeds: Sequence[int],
        *,
        rounded: bool,
        rank: int,
        channel_dim: int,
    ) -> None:
        self._W, self._rank, self._channel_dim = W, rank, channel_dim
        self._tables: list[Any] = [*map(pointers, (W, M, V, last_norm)), (ctypes.c_uint64 * len(seeds))(*seeds)]
        addresses = [ctypes.addressof(table) for table in self._tables]
        self._bundle = _Bundle(
            **dict(zip(("W", "M", "V", "last_norm", "seeds"), addresses, strict=True)),
            **dict(zip(("num", "rows", "cols"), (len(W), *W[0].shape), strict=True)),
            tall=int(channel_dim == -2),
            w_bfloat=_is_bfloat(W),
            rank=rank,
            rounded=int(rounded),
        )
        self._period: int | None = None  # of the projections that are looked up
        self._held: list[Any] = []

    def takes(self, backend: Backend, G: Sequence[Tensor]) -> bool:
        """Whether it does steps of these gradients by this backend."""
        dtype = G[0].dtype
        alike = dtype in TYPES and all(g.dtype == dtype and g.is_contiguous() for g in G)
        return alike and isinstance(backend, Native)

    def plan(
        self,
        G: Sequence[Tensor],
        projections: Callable[[], Sequence[Projection]],
        period: int,
        *,
        step: int,
        lr: float | Tensor,
        alpha: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        granularity: str,
        denominator: str,
        limiter: float | None,
        maximize: bool,
        backend: Backend,
        scratch: Scratch,
    ) -> Plan[Write]:
        """A step, as the reference's ``plan`` and ``apply`` together: the result writes the weights, if they are not yet.

        Args:
            projections: gives that of each matrix; the same ones as long as ``period`` is the same.
        """
        assert isinstance(backend, Native)
        held = self._held
        if self._period != period:
            held = self._look_up(projections())
            # Dense ones are large, and what is kept of them between steps is the projection cache's to limit.
            self._period, self._held = (None, []) if self._bundle.repeats == _DENSE else (period, held)
        bundle, table, rate = _Bundle.from_buffer_copy(self._bundle), pointers(G), float(lr)
        bundle.G = ctypes.addressof(table)
        bundle.g_bfloat, bundle.done = _is_bfloat(G), step - 1
        bundle.per_tensor, bundle.exact = int(granularity == "tensor"), int(denominator == "exact")
        bundle.adam = adam_numbers(step, betas, eps)
        bundle.numbers = alpha, inf if limiter is None else limiter, (-rate if maximize else rate) * alpha
        bundle.decay = rate * weight_decay
        of_step = _Step(bundle, self._W, G, held, table, backend)
        return of_step.at_once(scratch) if backend.at_once and bundle.repeats != _DENSE else of_step.in_two(scratch)

    def _look_up(self, found: Sequence[Projection]) -> list[Any]:
        """Have the bundle point to them; the result is what must live as long as it does."""
        bundle, tables = self._bundle, []
        sketches = [P for P in found if isinstance(P, Sketch)]
        if sketches:
            tables = [pointers(P.order for P in sketches), pointers(P.signs for P in sketches)]
            bundle.repeats, bundle.signs = len(sketches[0].order) // self._rank, ctypes.addressof(tables[1])
        elif self._rank == 1:
            tables, bundle.repeats = [pointers(P for P in found if isinstance(P, Tensor))], 0
        else:
            bundle.repeats = _DENSE
        bundle.P = ctypes.addressof(tables[0]) if tables else None
        return [found, tables]


class _Step(NamedTuple):
    """What one step of them holds until it is done."""

    bundle: _Bundle
    W: Sequence[Tensor]
    G: Sequence[Tensor]
    projections: list[Any]
    table: Any  # of G
    backend: Native

    def at_once(self, scratch: Scratch) -> Plan[Write]:
        """As many matrices at a time as stay in the cache: measured and written before the next."""
        bundle = self.bundle
        bundle.chunk = max(1, min(bundle.num, _CHUNK // self.G[0].nbytes))
        n = bundle.chunk * max(bundle.rows, bundle.cols)
        room = scratch.buffer("chunk", n * (bundle.rank + 3), self.G[0].device)
        bundle.R = room[3 * n :].data_ptr()
        squares = self._rows(room[: 3 * n].view(3, n))
        yield Work(lambda: self._carry(_MEASURE | _SQUARE | _SCALE | _APPLY))
        self._wrote(squares)
        yield Sum(squares[None])
        return lambda _: None

    def in_two(self, scratch: Scratch) -> Plan[Write]:
        """As the reference's plan."""
        bundle, device = self.bundle, self.G[0].device
        bundle.chunk = bundle.num
        tall, height, width = bundle.tall, bundle.rows, bundle.cols
        shape = (bundle.num, height, bundle.rank) if tall else (bundle.num, bundle.rank, width)
        rows = torch.empty(3, bundle.num * (height if tall else width), device=device)
        squares = self._rows(rows)
        R = scratch.take(shape, device, wait=True)

        def first() -> None:
            if R is None:  # no room to wait in: only |G|^2 now
                squares.copy_(self.backend.square([g.view(-1) for g in self.G]))
            else:
                self._measure(R, rows[1])
                self._carry(_SQUARE)

        yield Work(first)
        yield Sum(squares[None])
        if R is None:
            R = scratch.take(shape, device, wait=False)
            assert R is not None
            self._measure(R, rows[1])
        self._carry(_SCALE)
        scratch.give_back(R)

        def write(_: Backend) -> None:
            assert len(rows)  # where the kernel finds the scaling factors
            self._carry(_APPLY)
            self._wrote(squares)

        return write

    def _rows(self, rows: Tensor) -> Tensor:
        """|R_j|^2, |G_j|^2 and s_j go into ``rows``; the result is where |G|^2 will be."""
        squares = torch.empty(self.bundle.num, dtype=torch.float64, device=rows.device)
        self.bundle.squares = squares.data_ptr()
        self.bundle.R_sq, self.bundle.G_sq, self.bundle.s = (row.data_ptr() for row in rows)
        return squares

    def _measure(self, R: Tensor, G_sq: Tensor) -> None:
        bundle = self.bundle
        bundle.R = R.data_ptr()
        if bundle.repeats != _DENSE:
            self._carry(_MEASURE)
            return
        G = [g.view(1, bundle.rows, bundle.cols) for g in self.G]
        G_sq.copy_(self.backend.measure(G, self.projections[0], -2 if bundle.tall else -1, R).view(-1))

    def _carry(self, parts: int) -> None:
        self.backend.library.carry(ctypes.byref(self.bundle), ctypes.c_int64(parts))

    def _wrote(self, squares: Tensor) -> None:
        tell_autograd([w for w, square in zip(self.W, squares.tolist(), strict=True) if 0 < square < inf])


def _is_bfloat(tensors: Sequence[Tensor]) -> int:
    return int(tensors[0].dtype == torch.bfloat16)
