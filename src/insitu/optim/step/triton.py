"""The passes for CUDA, by the kernels of :mod:`insitu.optim.step.triton_kernels`, with the rounding in the pass that writes.

The tensors of a call are one launch, by a table of their addresses; of several types, or ways to store them, a launch for each.
Nothing here waits for the device. What differs from step to step stands in the tables: in a step that may be captured as part
of a CUDA graph the device itself writes it there, from its own count of the updates.

On a CPU it runs, slowly, in Triton's interpreter: that is how it is tested.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, ItemsView, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from insitu.optim.projection import Projection, Sketch
from insitu.optim.rounding import Precision, hash_numbers, in_one_period
from insitu.optim.step import Updates, reference
from insitu.optim.step import triton_kernels as kernels
from insitu.optim.step.scratch import Scratch

Key = TypeVar("Key", bound=Hashable)
Column = Sequence[int] | Tensor  # a number for each tensor of a launch, from the host or on the device
_CHANNELS, _SIDE, _RANK, _FLAT = 32, 64, 64, 1024  # sizes of a program's tile
_STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_READ = {**_STORED, torch.float64: tl.float64}  # gradients


class Triton:
    """The backend for CUDA."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
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
        strides = (rows * cols, cols, 1) if channel_dim == -2 else (rows * cols, 1, cols)
        r_n, r_r = (rank, 1) if channel_dim == -2 else (1, cols)
        G, P = [g.contiguous() for g in G], list(map(_laid_out, projections))
        kinds = [p.ndim if isinstance(p, Tensor) else (len(p.order) // rank,) for p in projections]
        for (dtype, kind), mine in _alike(zip((g.dtype for g in G), kinds, strict=True)):
            table, aligned = self._table(mine, (G, [p for p, _ in P], [p for _, p in P]))
            programs, types = len(mine) * b * triton.cdiv(n, _CHANNELS), {"TYPE": _READ[dtype], "ALIGNED": aligned}
            if isinstance(kind, tuple):
                kernels.measure_sketch[(programs,)](
                    table, R, G_sq, b, n, rank, *kind, *strides, r_n, r_r, **types, BN=_CHANNELS, BR=_RANK
                )
            elif rank == 1 and kind == 2:
                kernels.measure_one[(programs,)](table, R, G_sq, b, n, m, *strides, **types, BN=_CHANNELS, BM=_SIDE)
            else:
                p_stack = rank * m if kind == 3 else 0
                kernels.measure_dense[(programs, triton.cdiv(rank, _RANK))](
                    table, R, G_sq, b, n, m, rank, *strides, p_stack, r_n, r_r, **types, BN=_CHANNELS, BM=_SIDE, BR=_RANK
                )  # fmt: skip
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
        step: Updates,
        betas: tuple[float, float],
        eps: float,
    ) -> Tensor:
        """As the reference, in one pass over R, M and V."""
        R, b = R.contiguous(), len(M[0])
        n, rank = R.shape[-3 - side], R.shape[side]
        r_n, r_r = (rank, 1) if side == -1 else (1, n)
        out = torch.zeros(len(R), n, device=R.device)
        if R.numel() == 0:
            return out
        taken = [all(x.dtype == torch.float32 and x.is_contiguous() for x in each) for each in zip(M, V, strict=True)]
        for take, mine in _alike(taken):
            if not take:
                for t in mine:
                    these = R[t * b : (t + 1) * b], [M[t]], [V[t]], live[t : t + 1]
                    out[t * b : (t + 1) * b] = self._plain.direct(*these, side, step=_of(step, t), betas=betas, eps=eps)
                continue
            table, aligned = self._table(mine, (M, V), _corrections(step, betas, mine))
            kernels.direct[(len(mine) * b * triton.cdiv(n, _CHANNELS),)](
                table, R, live.contiguous(), out, b, n, rank, r_n, r_r, *_weights(betas), eps,
                ALIGNED=aligned, BN=_CHANNELS, BR=_RANK,
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
        b, rows, cols = W[0].shape
        if W[0].numel() == 0:
            return
        per_row, per_col = (int(length > 1) for length in eta_s.shape[1:])
        etas = eta_s[0].numel(), per_row * eta_s.shape[2], per_col
        factors = eta_s.contiguous(), (live if decay is None else decay).contiguous(), live.contiguous()
        G, stored = [g.contiguous() for g in G], list(map(_stored, W, precisions))
        for kind, mine in _alike(_kind(g, w) for g, w in zip(G, stored, strict=True)):
            if kind is None:
                for t in mine:
                    these = slice(t * b, (t + 1) * b)
                    its_decay = None if decay is None else decay[these]
                    self._plain.apply([W[t]], [G[t]], eta_s[these], its_decay, live[t : t + 1], [precisions[t]])
                continue
            type_g, (how, type_w, type_residual) = kind
            residuals = [each.residual for each in stored]
            table, aligned = self._table(mine, (W, G, residuals), _random(stored[t] for t in mine))
            kernels.apply[(len(mine) * b * triton.cdiv(rows * cols, _FLAT),)](
                table, *factors, b, rows * cols, cols, *etas, TYPE_W=type_w, TYPE_G=type_g, TYPE_RESIDUAL=type_residual,
                ALIGNED=aligned, DECAY=decay is not None, HOW=how, BLOCK=_FLAT,
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
        step: Updates,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        """As the reference, in one pass."""
        size = W[0].numel()
        if size == 0:
            return
        rate = torch.full_like(live[0], lr) if not isinstance(lr, Tensor) else lr.to(live.device, torch.float32)
        G, hows = [g.contiguous() for g in G], [(how, *of) for how, of in zip(precisions, moments, strict=True)]
        stored = [tuple(map(_stored, each, how)) for *each, how in zip(W, M, V, hows, strict=True)]
        for kind, mine in _alike(_kind(g, *each) for g, each in zip(G, stored, strict=True)):
            if kind is None:
                for t in mine:
                    self._plain.adamw(
                        [W[t]], [G[t]], [M[t]], [V[t]], live[t : t + 1], [precisions[t]], [moments[t]],
                        step=_of(step, t), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize,
                    )  # fmt: skip
                continue
            type_g, (how, type_w, type_residual), (how_m, type_m, _), (how_v, type_v, _) = kind
            bits = [column for i in range(3) for column in _random(stored[t][i] for t in mine)]
            residuals = [of_w.residual for of_w, _, _ in stored]
            table, aligned = self._table(mine, (W, G, M, V, residuals), [*_corrections(step, betas, mine), *bits])
            kernels.adamw[(len(mine) * triton.cdiv(size, _FLAT),)](
                table, live.contiguous(), rate, size, *_weights(betas), eps, weight_decay,
                TYPE_W=type_w, TYPE_G=type_g, TYPE_M=type_m, TYPE_V=type_v, TYPE_RESIDUAL=type_residual, ALIGNED=aligned,
                DECAY=bool(weight_decay), HOW=how, HOW_M=how_m, HOW_V=how_v, SIGN=-1 if maximize else 1, BLOCK=_FLAT,
            )  # fmt: skip

    def _table(
        self, mine: Sequence[int], own: Sequence[Sequence[Tensor]], numbers: Sequence[Column] = ()
    ) -> tuple[Tensor, bool]:
        """The table of a launch, on the device: for each tensor its place t in the call, addresses of ``own[...][t]``, numbers.

        Also whether all addresses are multiples of 16.
        """
        rows, every = [], 0
        for i, t in enumerate(mine):
            addresses = [of_all[t].data_ptr() for of_all in own]
            for address in addresses:
                every |= address
            rows.append((t, *addresses, *(0 if isinstance(column, Tensor) else column[i] for column in numbers)))
        table = self._scratch.upload(rows, own[0][mine[0]].device)
        for j, column in enumerate(numbers, 1 + len(own)):
            if isinstance(column, Tensor):
                table[:, j] = column
        return table, every % 16 == 0


class _Stored(NamedTuple):
    """What the kernels must know to store a tensor."""

    kind: tuple[int, Any, Any] | None  # how, and the types of the tensor and of its residual; None: they cannot
    residual: Tensor  # any tensor if there is none
    numbers: tuple[int, int, int] = (0, 0, 0)  # of its random bits
    key: Tensor | None = None  # or from what the device is to compute them


def _stored(x: Tensor, precision: Precision) -> _Stored:
    """The kernels store up to float32, without gaps, and round elements whose indices follow one another."""
    key, start, residual, groups = precision
    rest = x if residual is None else residual
    possible = x.dtype in _STORED and rest.dtype in _STORED and x.is_contiguous() and rest.is_contiguous()
    if groups is not None or not possible:
        return _Stored(None, rest)
    types = _STORED[x.dtype], _STORED[rest.dtype]
    if residual is not None:
        return _Stored((kernels.COMPENSATED.value, *types), rest)
    if key is None:
        return _Stored((kernels.PLAIN.value, *types), rest)
    if not isinstance(start, int) or x.numel() >= 2**31 or not in_one_period(start, x.numel()):
        return _Stored(None, rest)
    if isinstance(key, Tensor):
        return _Stored((kernels.STOCHASTIC.value, *types), rest, key=key) if start == 0 else _Stored(None, rest)
    return _Stored((kernels.STOCHASTIC.value, *types), rest, hash_numbers(key, start))


def _kind(g: Tensor, *stored: _Stored) -> tuple[Any, ...] | None:
    """What must be equal for one launch; None where the kernels cannot."""
    kinds = [each.kind for each in stored]
    return None if g.dtype not in _READ or None in kinds else (_READ[g.dtype], *kinds)


def _alike(kinds: Iterable[Key]) -> ItemsView[Key, list[int]]:
    """Which tensors, by their place in the call, are of each kind."""
    alike: dict[Key, list[int]] = {}
    for t, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(t)
    return alike.items()


def _laid_out(projection: Projection) -> tuple[Tensor, Tensor]:
    """What a kernel reads of it; a dense one is one tensor, twice."""
    if isinstance(projection, Sketch):
        return projection.order, projection.signs
    P = projection.float().contiguous()
    return P, P


def _of(step: Updates, t: int) -> Updates:
    return step[t : t + 1] if isinstance(step, Tensor) else step


def _weights(betas: tuple[float, float]) -> tuple[float, float]:
    return 1 - betas[0], 1 - betas[1]


def _corrections(step: Updates, betas: tuple[float, float], mine: Sequence[int]) -> list[Column]:
    """1 - beta^t for both betas, the bits of float32."""
    if isinstance(step, Tensor):
        updates = torch.stack([step[t] for t in mine]).double()
        return [(1 - beta**updates).float().view(torch.int32) for beta in betas]
    return [struct.unpack("i", struct.pack("f", 1 - beta**step)) * len(mine) for beta in betas]


def _random(stored: Iterable[_Stored]) -> list[Column]:
    """The numbers of the random bits of each tensor."""
    stored = list(stored)
    keys = [each.key for each in stored if each.key is not None]
    if keys:
        base, factor, odd = hash_numbers(torch.stack(keys), 0)
        return [base, factor, [odd] * len(keys)]
    return list(zip(*(each.numbers for each in stored), strict=True))
