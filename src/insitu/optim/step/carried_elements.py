"""A bundle of small tensors that take AdamW, such as norms and biases, as the C++ kernels take it: see carried.py.

A model has as many of them as matrices, and to gather the numbers of each in Python costs more than their arithmetic.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from insitu.optim.exchange import Plan, Sum, Work
from insitu.optim.step import Backend
from insitu.optim.step.native import TYPES, Native, adamw_numbers, pointers, tell_autograd

Write = Callable[[Backend], None]
_SQUARE, _APPLY = 2, 8  # parts of ``carry_adamw``


class _Elements(ctypes.Structure):
    """As cpp/carry.cpp has it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num", "size", "w_bfloat", "g_bfloat", "rounded", "done")),
        *((name, ctypes.c_void_p) for name in ("W", "M", "V", "seeds", "G", "squares")),
        ("numbers", ctypes.c_float * 9),
    ]


class CarriedElements:
    """Whole tensors of one size, as they are until one of them changes.

    Args:
        W: float32 or bf16; M, V: float32. All flat, contiguous, on a CPU, of at most ``native.PIECE`` elements.
        seeds: of the random bits of each.
        rounded: whether W is rounded stochastically.
    """

    def __init__(
        self, W: Sequence[Tensor], M: Sequence[Tensor], V: Sequence[Tensor], seeds: Sequence[int], *, rounded: bool
    ) -> None:
        self._W = W
        self._tables: list[Any] = [*map(pointers, (W, M, V)), (ctypes.c_uint64 * len(seeds))(*seeds)]
        addresses = [ctypes.addressof(table) for table in self._tables]
        self._elements = _Elements(
            **dict(zip(("W", "M", "V", "seeds"), addresses, strict=True)),
            num=len(W),
            size=W[0].numel(),
            w_bfloat=int(W[0].dtype == torch.bfloat16),
            rounded=int(rounded),
        )

    def takes(self, backend: Backend, G: Sequence[Tensor]) -> bool:
        """Whether it does steps of these gradients by this backend."""
        dtype = G[0].dtype
        return isinstance(backend, Native) and dtype in TYPES and all(g.dtype == dtype and g.is_contiguous() for g in G)

    def plan(self, G: Sequence[Tensor], backend: Backend, **numbers: Any) -> Plan[Write]:
        """A step, as :func:`insitu.optim.elementwise.adamw` has it."""
        assert isinstance(backend, Native)
        elements, table = _Elements.from_buffer_copy(self._elements), pointers(G)
        squares = torch.empty(len(G), dtype=torch.float64)
        elements.G, elements.squares = ctypes.addressof(table), squares.data_ptr()
        elements.g_bfloat, elements.done = int(G[0].dtype == torch.bfloat16), numbers["step"] - 1
        elements.numbers = adamw_numbers(**numbers)
        carry = backend.library.carry_adamw
        yield Work(lambda: carry(ctypes.byref(elements), ctypes.c_int64(_SQUARE)))
        yield Sum(squares[None])

        def write(_: Backend) -> None:
            assert len(table) == len(G)  # where the kernel finds the gradients
            carry(ctypes.byref(elements), ctypes.c_int64(_APPLY))
            tell_autograd([w for w, square in zip(self._W, squares.tolist(), strict=True) if 0 < square < inf])

        return write
