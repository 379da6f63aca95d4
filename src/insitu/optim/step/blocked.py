"""The passes for CPUs, without a compiler: torch's own fused loops, or blocks that fit the cache of a core.

Each call of torch costs microseconds and each sweep over memory that is not in the cache costs as much as SGD, so: float32
tensors are taken whole where one call does; what needs several sweeps (types that must become float32, rounding, weight
decay) is done block by block, in scratch memory that is reused. Fresh pages would cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from insitu.optim.projection import Projection, Sketch, placed
from insitu.optim.rounding import Precision, make_scratch
from insitu.optim.rounding import Scratch as Rounding
from insitu.optim.step import Updates, reference, torch_fused
from insitu.optim.step.scratch import Scratch

_ELEMENTS = 1 << 16  # per block and thread: 256 kB of float32; with W, G and the random bits of a block, 1 MB
_READ_ELEMENTS = 1 << 19  # where a block is only read: 2 MB
_ROWS = 32  # of a wide R, whose squares are added up by so many rows
_FEWEST_COLUMNS = 256  # of a block of a wide matrix: each of its rows is read in pieces of this length


class Blocked:
    """The backend for CPUs."""

    factors, limited = staticmethod(reference.factors), staticmethod(reference.limited)

    def __init__(self, device: torch.device, scratch: Scratch) -> None:
        self._device, self._threads, self._scratch = device, torch.get_num_threads(), scratch
        self._round: Rounding | None = None

    def measure(self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int, R: Tensor) -> Tensor:
        """As the reference; blocks of rows, which lie together in memory."""
        num, rows, cols = len(G[0]), *G[0].shape[1:]
        G_sq = torch.zeros(len(R), rows if channel_dim == -2 else cols, device=self._device)
        for i, found in enumerate(matrix for stack in G for matrix in stack):
            matrix, projection = placed(found), _one(projections[i // num], i % num)
            if matrix.numel() == 0:  # a part of a sharded tensor may be empty
                R[i].zero_()
            elif channel_dim == -2:
                self._measure_tall(matrix, projection, R[i], G_sq[i])
            elif isinstance(projection, Sketch):
                self._measure_wide_sketch(matrix, projection, R[i], G_sq[i])
            else:
                self._measure_wide(matrix, projection, R[i], G_sq[i])
        return G_sq

    def _measure_tall(self, G: Tensor, projection: Projection, R: Tensor, G_sq: Tensor) -> None:
        for first, count in _blocks(len(G), G.shape[1], _READ_ELEMENTS * self._threads):
            g, out = self._float32(G.narrow(0, first, count)), R.narrow(0, first, count)
            # First the sweep in the order of memory: it brings the block into the cache.
            torch.linalg.vector_norm(g, dim=-1, out=G_sq.narrow(0, first, count)).square_()
            if isinstance(projection, Sketch):
                self._sketch_rows(g, projection, out)
            elif projection.shape[0] == 1:
                torch.mv(g, projection[0], out=out[:, 0])
            else:
                torch.mm(g, projection.mT, out=out)

    def _sketch_rows(self, g: Tensor, sketch: Sketch, out: Tensor) -> None:
        """The coordinates of each bucket, one after the other: the order has them ``rank`` apart."""
        mixed = self._buffer("mixed", len(g) * len(sketch.order)).view(len(g), -1)
        torch.index_select(g, 1, sketch.order, out=mixed)
        first, *others = zip(
            mixed.view(len(g), -1, sketch.rank).unbind(1), sketch.signs.view(-1, sketch.rank).unbind(), strict=True
        )
        torch.mul(*first, out=out)
        for values, signs in others:
            out.addcmul_(values, signs)

    def _measure_wide(self, G: Tensor, P: Tensor, R: Tensor, G_sq: Tensor) -> None:
        for first, count in _blocks(len(G), G.shape[1], _READ_ELEMENTS * self._threads):
            g = self._float32(G.narrow(0, first, count))
            torch.addmm(R, P.narrow(1, first, count), g, beta=int(first > 0), out=R)
            self._add_column_squares(g, G_sq)

    def _measure_wide_sketch(self, G: Tensor, sketch: Sketch, R: Tensor, G_sq: Tensor) -> None:
        """By blocks of columns: torch's embedding bag reads each row once, and adds it to its bucket."""
        order, signs = (x.view(-1, sketch.rank).t().reshape(-1) for x in (sketch.order, sketch.signs))
        offsets = torch.arange(0, len(order), len(order) // sketch.rank, dtype=order.dtype)
        rows, cols = G.shape
        for first, count in _blocks(cols, rows, _READ_ELEMENTS * self._threads, _FEWEST_COLUMNS):
            g = self._float32(G.narrow(1, first, count))
            self._add_column_squares(g, G_sq.narrow(0, first, count))
            bags = torch.nn.functional.embedding_bag(order, g, offsets, mode="sum", per_sample_weights=signs)
            R.narrow(1, first, count).copy_(bags)

    def _add_column_squares(self, g: Tensor, G_sq: Tensor) -> None:
        """In the order of the rows, whatever the number of columns: a shard of the channels has the bits of the whole."""
        G_sq.add_(torch.mul(g, g, out=self._buffer("work", g.numel()).view(g.shape)).sum(0))

    def norms(self, R: Tensor, side: int) -> Tensor:
        """As the reference; as many matrices at a time as stay in the cache."""
        out = torch.zeros(len(R), R.shape[-3 - side], device=self._device)
        if R.numel() == 0:  # a part of a sharded tensor may be empty
            return out
        for first, count in _blocks(len(R), R[0].numel(), _READ_ELEMENTS * self._threads):
            self._add_squares(R.narrow(0, first, count), side, out.narrow(0, first, count))
        return out

    def _add_squares(self, R: Tensor, side: int, found: Tensor) -> None:
        """Add |R_j|^2 along ``side``, (k, n), of some rows of k matrices."""
        if R.shape[side] == 1:
            found.addcmul_(R.squeeze(side), R.squeeze(side))
        elif side == -1:
            found.add_(torch.linalg.vector_norm(R, dim=-1).square_())
        elif not R.is_contiguous():  # the part of a sharded tensor
            found.add_(R.square().sum(-2))
        else:
            for matrix, its in zip(R, found, strict=True):
                for first in range(0, len(matrix), _ROWS):
                    self._add_column_squares(matrix[first : first + _ROWS], its)

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
        """As the reference, by torch's fused Adam: with weights of 0 and a rate of 1 it leaves -R~."""
        out = torch.zeros(len(R), R.shape[-3 - side], device=self._device)
        if R.numel() == 0:  # a part of a sharded tensor may be empty
            return out
        assert isinstance(step, int)
        numbers: dict[str, Any] = {"step": step, "betas": betas, "eps": eps}
        lively, elements = live.tolist(), _ELEMENTS * self._threads
        if len(M[0]) == 1 and all(lively) and R[0].numel() <= elements:  # several tensors in one call
            for first, count in _blocks(len(R), R[0].numel(), elements):
                these = slice(first, first + count)
                direction = self._adam(R[these].contiguous(), M[these], V[these], **numbers)
                self._add_squares(direction, side, out[these])
            return out
        for i, (t, b) in enumerate(divmod(i, len(M[0])) for i in range(len(R))):
            rows = _ROWS if side == -2 else max(1, elements // R.shape[2])
            for block in _blocks(R.shape[1], 1, rows) if lively[t] else ():
                r, m, v = (x.narrow(0, *block)[None] for x in (R[i], M[t][b], V[t][b]))
                found = out[i : i + 1]
                direction = self._adam(r.contiguous(), [m], [v], **numbers)
                self._add_squares(direction, side, found.narrow(1, *block) if side == -1 else found)
        return out

    def _adam(
        self,
        R: Tensor,
        M: Sequence[Tensor],
        V: Sequence[Tensor],
        *,
        step: int,
        betas: tuple[float, float],
        eps: float,
    ) -> Tensor:
        """-R~ in scratch memory; M and V in place."""
        direction = self._buffer("direction", R.numel()).view(R.shape).zero_()
        torch_fused.adam(direction.unbind(), R.unbind(), M, V, step=step, betas=betas, eps=eps)
        return direction

    def square(self, G: Sequence[Tensor]) -> Tensor:
        """As the reference, a block of elements at a time."""
        return torch.stack([_square(g) if g.dtype == torch.float32 else self._square(g) for g in G]).double()

    def _square(self, g: Tensor) -> Tensor:
        if len(g) == 0:
            return torch.zeros((), dtype=torch.float64)
        parts = [_square(self._float32(g.narrow(0, *block))) for block in _blocks(len(g), 1, _ELEMENTS * self._threads)]
        return torch.stack(parts).sum(dtype=torch.float64)

    def apply(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        eta_s: Tensor,
        decay: Tensor | None,
        live: Tensor,
        precisions: Sequence[Precision],
    ) -> None:
        """As the reference: whole tensors where one sweep does it, else a block of rows at a time."""
        num, per_tensor = len(W[0]), eta_s.shape[1:].numel() == 1
        etas, lively = eta_s.view(-1).tolist() if per_tensor else [], live.tolist()
        for i in range(len(eta_s)):
            t, b = divmod(i, num)
            if not lively[t] or W[t].numel() == 0:
                continue
            w, g = W[t][b], G[t][b]
            if decay is None and w.dtype == g.dtype == torch.float32:
                if per_tensor:
                    w.add_(g, alpha=-etas[i])
                else:
                    w.addcmul_(g, eta_s[i], value=-1)
            else:
                precision = precisions[t].of(b * w.numel(), w.numel())
                self._apply(w, g, eta_s[i], None if decay is None else decay[i], precision)

    def _apply(self, W: Tensor, G: Tensor, eta: Tensor, decay: Tensor | None, precision: Precision) -> None:
        rows, cols = W.shape
        for first, count in _blocks(rows, cols, _ELEMENTS * self._threads):
            here = W.narrow(0, first, count)
            precise = precision.of(first * cols, count * cols)
            work = precise.read(self._work_copy(here))
            g = self._float32(G.narrow(0, first, count))
            reference.descend(work, g, eta.narrow(0, first, count) if len(eta) == rows else eta, decay)
            precise.write(here, work, self._rounding(precise))

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
        """As the reference, by torch's fused AdamW: whole tensors where all is float32, else a block of elements at a time."""
        some = [i for i, alive in enumerate(live.tolist()) if alive]
        plain = [i for i in some if torch_fused.possible(W[i], G[i], M[i], V[i])]
        if plain:
            torch_fused.adamw(*([x[i] for i in plain] for x in (W, G, M, V)), **numbers)
        for i in set(some) - set(plain):
            self._adamw(W[i], G[i], M[i], V[i], live[i], precisions[i], moments[i], **numbers)

    def _adamw(
        self,
        W: Tensor,
        G: Tensor,
        M: Tensor,
        V: Tensor,
        live: Tensor,
        precision: Precision,
        moments: tuple[Precision, Precision],
        **numbers: Any,
    ) -> None:
        width = precision.width
        for row, rows in _blocks(len(W) // width, width, _ELEMENTS * self._threads):
            first, count = row * width, rows * width
            here, m, v = (x.narrow(0, first, count) for x in (W, M, V))
            precise = precision.of(first, count)
            m32, v32 = m.float(), v.float()
            work, g = precise.read(self._work_copy(here)), self._float32(G.narrow(0, first, count))
            if torch_fused.possible(work, g, m32, v32):
                torch_fused.adamw([work], [g], [m32], [v32], **numbers)
            else:
                work = reference.adamw_descend(work, g, m32, v32, live, **numbers)
            precise.write(here, work, self._rounding(precise))
            for stored, computed, how in zip((m, v), (m32, v32), moments, strict=True):
                if stored is not computed:
                    moment = how.of(first, count)
                    moment.write(stored, computed, self._rounding(moment))

    def _buffer(self, name: str, num: int) -> Tensor:
        """Scratch memory of ``num`` float32."""
        return self._scratch.buffer(name, num, self._device)

    def _rounding(self, precision: Precision) -> Rounding | None:
        """When the random bits are made, a block's gradient is no longer needed."""
        if precision.key is None:
            return None
        if self._round is None:
            size = _ELEMENTS * self._threads
            self._round = make_scratch(self._device, size, bits=self._buffer("gradient", size).view(torch.int32))
        return self._round

    def _float32(self, x: Tensor) -> Tensor:
        """``x`` in float32 and contiguous: itself, or a copy in scratch memory."""
        if x.dtype == torch.float32 and x.is_contiguous():
            return x
        return self._buffer("gradient", x.numel()).view(x.shape).copy_(x)

    def _work_copy(self, x: Tensor) -> Tensor:
        """``x`` to compute on: itself where it is float32 (then the step is in place), else a copy."""
        if x.dtype in (torch.float32, torch.float64):
            return x
        return self._buffer("work", x.numel()).view(x.shape).copy_(x)


def _blocks(num: int, width: int, elements: int, at_least: int = 1) -> Iterator[tuple[int, int]]:
    """(first, count) of the equal blocks of about ``elements`` that cut ``num`` slices of ``width`` elements each."""
    size = max(at_least, -(-num // max(1, ceil(num * width / elements))))
    for first in range(0, num, size):
        yield first, min(size, num - first)


def _square(g: Tensor) -> Tensor:
    """|g|^2."""
    flat = g.reshape(-1)
    return torch.dot(flat, flat)


def _one(projection: Projection, index: int) -> Projection:
    """The projection of one matrix of a stack: most have one for all, svd one for each."""
    return projection[index] if isinstance(projection, Tensor) and projection.ndim == 3 else projection
