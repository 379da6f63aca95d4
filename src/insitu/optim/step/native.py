"""The passes for CPUs in C++ (the folder cpp), compiled when the package was installed, else at the first step in seconds.

All tensors of one shape are one call, each matrix is read once, and rounding is part of the pass that writes: what torch's
calls one by one cannot do. ``auto`` takes it where it was compiled at installation, and compiles nothing itself. What it cannot
take (other types than float32 and bf16, strides, dense products, compensated storage) is done by
:mod:`insitu.optim.step.blocked`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from insitu.optim.projection import Projection, Sketch
from insitu.optim.rounding import Precision, hash_numbers, in_one_period
from insitu.optim.step import Updates, kernels
from insitu.optim.step.blocked import Blocked
from insitu.optim.step.scratch import Scratch

_log = logging.getLogger(__name__)
PIECE = 1 << 14  # elements that are added up in float32
TYPES = (torch.float32, torch.bfloat16)


@functools.cache
def installed() -> ctypes.CDLL | None:
    """The kernels that were compiled at installation, or None if there are none for this machine."""
    path = kernels.installed()
    try:
        return None if path is None else ctypes.CDLL(str(path))
    except OSError as error:  # a library that it needs is not there
        _log.info("%s is not used: %s", path, error)
        return None


@functools.cache
def build() -> ctypes.CDLL | str:
    """The kernels, compiled now if they were not at installation; or why there are none."""
    if (library := installed()) is not None:
        return library
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "native.so"
        reason = kernels.compile_to(out)
        return ctypes.CDLL(str(out)) if reason is None else reason


class Native(Blocked):
    """The backend; makes the kernels if they are not there yet."""

    at_once = False  # whether a matrix may be written before the gradients of the others are known to be finite

    def __init__(self, device: torch.device, scratch: Scratch) -> None:
        super().__init__(device, scratch)
        library = build()
        assert isinstance(library, ctypes.CDLL), library  # ``choose`` has looked
        self.library = library
        # |R_j|^2 of an R that is on its way to ``norms``, by its id.
        self._norms: dict[int, tuple[ref[Tensor], Tensor]] = {}

    def measure(self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int, R: Tensor) -> Tensor:
        """As the reference, in one pass over G; a dense product of more than one row is the library's."""
        first, dtype, (b, rows, cols) = projections[0], G[0].dtype, G[0].shape
        rank = first.rank if isinstance(first, Sketch) else first.shape[-2]
        dense = isinstance(first, Tensor) and (first.ndim == 3 or rank > 1)
        part = isinstance(first, Sketch) and not first.whole  # of the coordinates: its blocks have gaps
        if dense or part or G[0].numel() == 0 or not all(g.dtype == dtype in TYPES for g in G):
            return super().measure(G, projections, channel_dim, R)
        G = [g.contiguous() for g in G]
        tall = channel_dim == -2
        G_sq = torch.empty(len(R), rows if tall else cols, device=self._device)
        R_sq = torch.empty_like(G_sq)
        self._norms[id(R)] = ref(R), R_sq
        shape = (len(R), _matrices(G), int(dtype == torch.bfloat16), rows, cols, int(tall))
        if isinstance(first, Sketch):
            sketches = [projection for projection in projections if isinstance(projection, Sketch)]
            orders = [sketch.order for sketch in sketches for _ in range(b)]
            signs = [sketch.signs for sketch in sketches for _ in range(b)]
            repeats = len(first.order) // rank
            self._call("measure_sketch", *shape, pointers(orders), pointers(signs), rank, repeats, R, R_sq, G_sq)
        else:
            vectors = [P.contiguous() for P in projections if isinstance(P, Tensor) for _ in range(b)]
            self._call("measure_one", *shape, pointers(vectors), R, G_sq)
            torch.mul(R.view_as(R_sq), R.view_as(R_sq), out=R_sq)
        return G_sq

    def square(self, G: Sequence[Tensor]) -> Tensor:
        """As the reference, in one pass."""
        dtype, size = G[0].dtype, G[0].numel()
        if size == 0 or not all(g.dtype == dtype in TYPES and g.numel() == size for g in G):
            return super().square(G)
        G = [g.contiguous() for g in G]
        out = torch.empty(len(G), -(-size // PIECE), dtype=torch.float64, device=self._device)
        self._call("square", len(G), pointers(G), int(dtype == torch.bfloat16), size, PIECE, out)
        return out.sum(1)

    def norms(self, R: Tensor, side: int) -> Tensor:
        """As the reference; of a sketch they were found when it was made."""
        known, R_sq = self._norms.pop(id(R), (None, R))
        if known is not None and known() is R:
            return R_sq
        if R.numel() == 0:
            return super().norms(R, side)
        R, out = R.contiguous(), torch.empty(len(R), R.shape[-3 - side], device=self._device)
        self._call("norms", *R.shape, int(side == -1), R, out)
        return out

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
        """As the reference, in one pass over R, M and V."""
        if R.numel() == 0 or not all(x.is_contiguous() for x in (*M, *V)):
            return super().direct(R, M, V, live, side, step=step, betas=betas, eps=eps)
        R, out = R.contiguous(), torch.empty(len(R), R.shape[-3 - side], device=self._device)
        each_live = live.repeat_interleave(len(M[0]))
        assert isinstance(step, int)
        numbers = (ctypes.c_float * 7)(*adam_numbers(step, betas, eps))
        self._call("direct", *R.shape, int(side == -1), R, _matrices(M), _matrices(V), each_live, numbers, out)
        return out

    def factors(self, above_sq: Tensor, below_sq: Tensor, needed_sq: Tensor, G_sq: Tensor) -> tuple[Tensor, Tensor]:
        """As the reference, in one call: thirty small ones, with those of ``limited``, cost as much as a pass over a matrix."""
        (k, n), inputs = above_sq.shape, [x.contiguous() for x in (above_sq, below_sq, needed_sq, G_sq)]
        s = torch.empty(k, n, device=self._device)
        norm_sq = torch.empty(k, dtype=torch.float64, device=self._device)
        self._call("factors", k, n, *inputs, s, norm_sq)
        return s, norm_sq

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
        """As the reference, in one call."""
        s, norm_sq, live = s.contiguous(), norm_sq.contiguous(), live.contiguous()
        numbers = (ctypes.c_float * 3)(alpha, gamma, float(eta) * alpha)
        self._call("limited", *s.shape, len(s) // len(last_norm), s, norm_sq, pointers(last_norm), live, numbers)
        return s

    def apply(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        eta_s: Tensor,
        decay: Tensor | None,
        live: Tensor,
        precisions: Sequence[Precision],
    ) -> None:
        """As the reference, in one pass over W and G; tensors that are to stand still are left out."""
        b, alive = len(W[0]), live.tolist()
        some = [t for t in range(len(W)) if alive[t] and W[t].numel()]
        mine = [t for t in some if _alike(W, G, t) and _by_kernel(W[t], G[t], precisions[t])]
        for t in set(some) - set(mine):
            these = slice(t * b, (t + 1) * b)
            others = eta_s[these], None if decay is None else decay[these], live[t : t + 1]
            if _in_float32(W[t], G[t], precisions[t]):
                work = W[t].float().contiguous()
                self.apply([work], [G[t]], *others, [Precision()])
                precisions[t].write(W[t], work)
            else:
                super().apply([W[t]], [G[t]], *others, [precisions[t]])
        if not mine:
            return
        _, rows, cols = W[0].shape
        if len(mine) < len(W):
            chosen = torch.tensor([t * b + i for t in mine for i in range(b)])
            eta_s, decay = eta_s[chosen], None if decay is None else decay[chosen]
        eta_s, pieces = eta_s.contiguous(), [precisions[t] for t in mine]
        if b > 1:
            pieces = [precision.of(i * rows * cols, rows * cols) for precision in pieces for i in range(b)]
        eta_strides = (eta_s[0].numel(), int(eta_s.shape[1] > 1) * eta_s.shape[2], int(eta_s.shape[2] > 1))
        written, read = [W[t] for t in mine], [G[t].contiguous() for t in mine]
        types = [int(x[0].dtype == torch.bfloat16) for x in (written, read)]
        tables = _matrices(written), types[0], _matrices(read), types[1]
        self._call("apply", len(eta_s), *tables, rows, cols, eta_s, *eta_strides, decay, _hashes(pieces))
        tell_autograd(written)

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
        """As the reference, in one pass; tensors that are to stand still are left out."""
        some = [t for t, alive in enumerate(live.tolist()) if alive and W[t].numel()]
        plain = [t for t in some if all(x.dtype == torch.float32 and x.is_contiguous() for x in (M[t], V[t]))]
        mine = [t for t in plain if _alike(W, G, t) and _by_kernel(W[t], G[t], precisions[t])]
        for t in set(some) - set(mine):
            others, how = ([G[t]], [M[t]], [V[t]], live[t : t + 1]), [moments[t]]
            if t in plain and _in_float32(W[t], G[t], precisions[t]):
                work = W[t].float().contiguous()
                self.adamw([work], *others, [Precision()], how, **numbers)
                precisions[t].write(W[t], work)
            else:
                super().adamw([W[t]], *others, [precisions[t]], how, **numbers)
        if not mine:
            return
        values = (ctypes.c_float * 9)(*adamw_numbers(**numbers))
        written, read = [W[t] for t in mine], [G[t].contiguous() for t in mine]
        types = [int(x[0].dtype == torch.bfloat16) for x in (written, read)]
        tables = pointers(written), types[0], pointers(read), types[1]
        states = [pointers(x[t] for t in mine) for x in (M, V)]
        hashes = _hashes([precisions[t] for t in mine])
        self._call("adamw", len(mine), *tables, *states, W[0].numel(), values, hashes)
        tell_autograd(written)

    def _call(self, name: str, *values: Tensor | int | ctypes.Array[ctypes.c_void_p] | object) -> None:
        arguments: list[object] = []
        for value in values:
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                arguments.append(ctypes.c_void_p(value.data_ptr()))
            else:
                arguments.append(ctypes.c_int64(value) if isinstance(value, int) else value)
        getattr(self.library, name)(*arguments)


class Fused(Native):
    """As native, but a matrix is written while its gradient is still in the cache, wherever that is possible."""

    at_once = True


def pointers(tensors: Iterable[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Their addresses, as a table; whoever uses it holds them."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _matrices(stacks: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Pointers to each matrix of contiguous stacks."""
    if len(stacks[0]) == 1:
        return pointers(stacks)
    addresses: list[int] = []
    size = stacks[0].shape[1:].numel() * stacks[0].element_size()
    for stack in stacks:
        start = stack.data_ptr()
        addresses += range(start, start + stack.shape[0] * size, size)
    return (ctypes.c_void_p * len(addresses))(*addresses)


def adam_numbers(step: int, betas: tuple[float, float], eps: float) -> tuple[float, ...]:
    """What the kernels need of them, as ``Adam`` in cpp/adam.h has it."""
    beta1, beta2 = betas
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta1**step, 1 / (1 - beta2**step), eps


def adamw_numbers(
    *,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> tuple[float, ...]:
    """As ``adamw`` in cpp/kernels.h has them."""
    rate = float(lr)
    return *adam_numbers(step, betas, eps), 1 - rate * weight_decay, -rate if maximize else rate


def _hashes(precisions: Sequence[Precision]) -> ctypes.Array[ctypes.c_int64] | None:
    """The three numbers of each piece, or None where nothing is rounded stochastically."""
    if precisions[0].key is None:
        return None
    numbers: list[int] = []
    for precision in precisions:
        assert isinstance(precision.key, int)
        assert isinstance(precision.start, int)
        numbers += hash_numbers(precision.key, precision.start)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _alike(W: Sequence[Tensor], G: Sequence[Tensor], t: int) -> bool:
    """Whether one is of the types of the first: all tensors of a call are."""
    return W[t].dtype == W[0].dtype and G[t].dtype == G[0].dtype


def _in_float32(W: Tensor, G: Tensor, precision: Precision) -> bool:
    """Whether the kernels can compute it. A shard whose elements are no neighbours then has the bits of its whole tensor."""
    return W.dtype in TYPES and G.dtype in TYPES and precision.residual is None


def _by_kernel(W: Tensor, G: Tensor, precision: Precision) -> bool:
    """Whether they can also round it."""
    if not (_in_float32(W, G, precision) and W.is_contiguous()):
        return False
    if precision.key is None:
        return True
    return isinstance(precision.start, int) and W.numel() < 2**31 and in_one_period(precision.start, W.numel())


def tell_autograd(written: Sequence[Tensor]) -> None:
    """A weight that a backward pass still needs must be known to have changed."""
    torch.autograd.graph.increment_version(written)
