"""The passes for CPUs, without a compiler: torch's own fused loops, or blocks that fit the cache of a core.

Each call of torch costs microseconds and each sweep over memory that is not in the cache costs as much as SGD, so: float32
tensors are taken whole where one call does; what needs several sweeps (types that must become float32, rounding, weight
decay) is done block by block, in scratch memory that is reused. Fresh pages would cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from insitu.optim.projection import Projection, Sketch
from insitu.optim.rounding import Precision, Scratch, make_scratch
from insitu.optim.step import reference

_ELEMENTS = 1 << 16  # per block and thread: 256 kB of float32; with W, G and the random bits of a block, 1 MB
_READ_ELEMENTS = 1 << 18  # where a block is only read: 1 MB, half of a core's cache
_FEWEST_COLUMNS = 256  # of a block of a wide matrix: each of its rows is read in pieces of this length


class Blocked:
    """The backend for CPUs; holds the scratch memory of one half of an optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._threads = device, torch.get_num_threads()
        self._buffers: dict[str, Tensor] = {}
        self._round: Scratch | None = None

    def measure(
        self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int, per_channel: bool
    ) -> tuple[Tensor, Tensor]:
        """As the reference; blocks of rows, which lie together in memory."""
        num, rows, cols = len(G[0]), *G[0].shape[1:]
        rank = _rank(projections[0])
        shape = (rows, rank) if channel_dim == -2 else (rank, cols)
        R = torch.empty(len(G) * num, *shape, device=self._device)
        G_sq = torch.zeros(len(R), (rows if channel_dim == -2 else cols) if per_channel else 1, device=self._device)
        for i, matrix in enumerate(matrix for stack in G for matrix in stack):
            projection = _one(projections[i // num], i % num)
            if channel_dim == -2:
                self._measure_tall(matrix, projection, R[i], G_sq[i])
            elif isinstance(projection, Sketch):
                self._measure_wide_sketch(matrix, projection, R[i], G_sq[i])
            else:
                self._measure_wide(matrix, projection, R[i], G_sq[i])
        return R, G_sq

    def _measure_tall(self, G: Tensor, projection: Projection, R: Tensor, G_sq: Tensor) -> None:
        for first, count in _blocks(*G.shape, _READ_ELEMENTS * self._threads):
            g, out = self._float32(G.narrow(0, first, count)), R.narrow(0, first, count)
            if isinstance(projection, Sketch):
                self._sketch_rows(g, projection, out)
            elif projection.shape[0] == 1:
                torch.mv(g, projection[0], out=out[:, 0])
            else:
                torch.mm(g, projection.mT, out=out)
            if G_sq.numel() == 1:
                G_sq.add_(_square(g))
            else:
                torch.linalg.vector_norm(g, dim=-1, out=G_sq.narrow(0, first, count)).square_()

    def _sketch_rows(self, g: Tensor, sketch: Sketch, out: Tensor) -> None:
        """The coordinates of each bucket, one after the other: the order has them ``rank`` apart."""
        mixed = torch.index_select(
            g, 1, sketch.order, out=self._buffer("mixed", len(g) * len(sketch.order)).view(len(g), -1)
        )
        each = zip(mixed.split(sketch.rank, 1), sketch.signs.split(sketch.rank), strict=True)
        for k, (values, signs) in enumerate(each):
            if k:
                out.addcmul_(values, signs)
            else:
                torch.mul(values, signs, out=out)

    def _measure_wide(self, G: Tensor, P: Tensor, R: Tensor, G_sq: Tensor) -> None:
        for first, count in _blocks(*G.shape, _READ_ELEMENTS * self._threads):
            g = self._float32(G.narrow(0, first, count))
            torch.addmm(R, P.narrow(1, first, count), g, beta=int(first > 0), out=R)
            self._add_column_squares(g, G_sq)

    def _measure_wide_sketch(self, G: Tensor, sketch: Sketch, R: Tensor, G_sq: Tensor) -> None:
        """By blocks of columns: torch's embedding bag reads each row once, and adds it to its bucket."""
        order, signs = (x.view(-1, sketch.rank).t().reshape(-1) for x in (sketch.order, sketch.signs))
        offsets = torch.arange(0, len(order), len(order) // sketch.rank)
        rows, cols = G.shape
        for first, count in _blocks(cols, rows, _READ_ELEMENTS * self._threads, _FEWEST_COLUMNS):
            g = self._float32(G.narrow(1, first, count))
            bags = torch.nn.functional.embedding_bag(order, g, offsets, mode="sum", per_sample_weights=signs)
            R.narrow(1, first, count).copy_(bags)
            self._add_column_squares(g, G_sq.narrow(0, first, count) if G_sq.numel() > 1 else G_sq)

    def _add_column_squares(self, g: Tensor, G_sq: Tensor) -> None:
        if G_sq.numel() == 1:
            G_sq.add_(_square(g))
            return
        squared = torch.mul(g, g, out=self._buffer("work", g.numel()).view(g.shape))
        G_sq.addmv_(squared.t(), torch.ones(len(g), device=self._device))  # much faster than a sum over rows

    def norms(self, R: Tensor, side: int) -> Tensor:
        """As the reference, a matrix at a time."""
        out = torch.zeros(len(R), R.shape[-3 - side], device=self._device)
        for R_one, found in zip(R, out, strict=True):
            self._add_squares(R_one, side, found)
        return out

    def _add_squares(self, R: Tensor, side: int, found: Tensor) -> None:
        """Add |R_j|^2 of some rows of R: of each row, or of all columns."""
        if side == -1 and R.is_contiguous():
            torch.linalg.vector_norm(R, dim=-1, out=found).square_()
        elif side == -1:  # one process's part of a tensor that is sharded
            found.copy_(R.square().sum(-1))
        else:
            for first, count in _blocks(*R.shape, _READ_ELEMENTS * self._threads):
                self._add_column_squares(R.narrow(0, first, count), found)

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
        """As the reference, by torch's fused Adam: with weights of 0 and a rate of 1 it leaves -R~."""
        out = torch.zeros(len(R), R.shape[-3 - side], device=self._device)
        num, steps = len(M[0]), torch.tensor(float(step))
        lively = live.tolist()
        for i, R_one in enumerate(R):
            t, b = divmod(i, num)
            if not lively[t]:
                continue
            for first, count in _blocks(*R_one.shape, _READ_ELEMENTS * self._threads):
                r, m, v = (x.narrow(0, first, count) for x in (R_one, M[t][b], V[t][b]))
                direction = self._adam(r.contiguous(), m, v, steps, betas, eps)
                self._add_squares(direction, side, out[i].narrow(0, first, count) if side == -1 else out[i])
        return out

    def _adam(self, g: Tensor, m: Tensor, v: Tensor, steps: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
        """-R~ in scratch memory; m and v in place."""
        if not (m.is_contiguous() and v.is_contiguous()):  # the moments of a sharded tensor
            live = torch.ones((), device=self._device)
            return reference.adam_direction(g, m, v, live, step=int(steps), betas=betas, eps=eps).neg_()
        zero = self._buffer("direction", g.numel()).view(g.shape).zero_()
        torch._fused_adam_(
            [zero], [g], [m], [v], [], [steps],
            lr=1.0, beta1=betas[0], beta2=betas[1], weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        return zero

    def square(self, G: Sequence[Tensor]) -> Tensor:
        """As the reference, a block of elements at a time."""
        return torch.stack([_square(g) if g.dtype == torch.float32 else self._square(g) for g in G]).double()

    def _square(self, g: Tensor) -> Tensor:
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
        num, per_tensor = len(W[0]), eta_s[0].numel() == 1
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
        """As the reference: by torch's fused AdamW where all is float32, else a block of elements at a time."""
        some = [i for i, alive in enumerate(live.tolist()) if alive]
        plain = [
            i for i in some if all(x.dtype == torch.float32 and x.is_contiguous() for x in (W[i], G[i], M[i], V[i]))
        ]
        if plain:
            _fused_adamw(*([x[i] for i in plain] for x in (W, G, M, V)), **numbers)
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
        for first, count in _blocks(len(W), 1, _ELEMENTS * self._threads):
            here, m, v = (x.narrow(0, first, count) for x in (W, M, V))
            precise = precision.of(first, count)
            m32, v32 = m.float(), v.float()
            work = precise.read(self._work_copy(here))
            work = reference.adamw_descend(work, self._float32(G.narrow(0, first, count)), m32, v32, live, **numbers)
            precise.write(here, work, self._rounding(precise))
            for stored, computed, how in zip((m, v), (m32, v32), moments, strict=True):
                if stored is not computed:
                    moment = how.of(first, count)
                    moment.write(stored, computed, self._rounding(moment))

    def _buffer(self, name: str, num: int) -> Tensor:
        """Scratch memory of ``num`` float32."""
        known = self._buffers.get(name)
        if known is None or known.numel() < num:
            known = self._buffers[name] = torch.empty(num, device=self._device)
        return known[:num]

    def _rounding(self, precision: Precision) -> Scratch | None:
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


def _fused_adamw(
    W: list[Tensor],
    G: list[Tensor],
    M: list[Tensor],
    V: list[Tensor],
    *,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    torch._fused_adamw_(
        W, G, M, V, [], [torch.tensor(float(step))] * len(W),
        lr=float(lr), beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=maximize,
    )  # fmt: skip


def _blocks(num: int, width: int, elements: int, at_least: int = 1) -> Iterator[tuple[int, int]]:
    """(first, count) of the blocks of about ``elements`` that cut ``num`` slices of ``width`` elements each."""
    size = max(at_least, elements // max(1, width))
    for first in range(0, num, size):
        yield first, min(size, num - first)


def _square(g: Tensor) -> Tensor:
    """|g|^2."""
    flat = g.reshape(-1)
    return torch.dot(flat, flat)


def _rank(projection: Projection) -> int:
    return projection.shape[-2] if isinstance(projection, Tensor) else projection.rank


def _one(projection: Projection, index: int) -> Projection:
    """The projection of one matrix of a stack: most have one for all, svd one for each."""
    return projection[index] if isinstance(projection, Tensor) and projection.ndim == 3 else projection
