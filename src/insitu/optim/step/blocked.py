"""The passes for CPUs: the formulas of the reference on blocks that fit the cache of a core.

A full-size float32 copy of a bf16 matrix costs more in page faults and memory traffic than the arithmetic on it. Here a
block of G becomes float32 in scratch memory that is reused, is measured or applied there, and W is written once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from insitu.optim.projection import Projection
from insitu.optim.rounding import Precision, make_scratch
from insitu.optim.step import reference

_ELEMENTS = 1 << 16  # per block and thread: 256 kB of float32; with W, G and the random bits of a block, 1 MB
_NARROWEST = 256  # columns of a block of a wide matrix: each of its rows is read in pieces of this length


class Blocked:
    """The backend for CPUs; holds the scratch memory of one optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self._size = _ELEMENTS * torch.get_num_threads()
        self._grad = torch.empty(self._size, device=device)
        self._work = torch.empty(self._size, device=device)
        # When the random bits are made, the block's gradient is no longer needed.
        self._scratch = make_scratch(device, self._size, bits=self._grad.view(torch.int32))

    def measure(self, G: Tensor, projection: Projection, channel_dim: int) -> tuple[Tensor, Tensor]:
        """As the reference, a block of channels at a time."""
        if G.numel() == 0:  # a part of a sharded tensor may be empty
            return reference.measure(G, projection, channel_dim)
        if len(G) == 1:
            R, G_sq = self._measure_matrix(G[0], projection, channel_dim)
            return R[None], G_sq[None]
        each = [  # svd has a projection for each matrix
            self._measure_matrix(g, _one(projection, i), channel_dim) for i, g in enumerate(G)
        ]
        return torch.stack([R for R, _ in each]), torch.stack([G_sq for _, G_sq in each])

    def _measure_matrix(self, G: Tensor, projection: Projection, channel_dim: int) -> tuple[Tensor, Tensor]:
        projection = _one(projection, 0)
        if channel_dim == -1 and isinstance(projection, Tensor):
            return self._measure_wide(G, projection)
        num, width = G.shape[channel_dim], G.shape[-3 - channel_dim]
        parts = [
            reference.measure(_float32(G.narrow(channel_dim, first, count), self._grad), projection, channel_dim)
            for first, count in self._blocks(num, width, 1 if channel_dim == -2 else _NARROWEST)
        ]
        return torch.cat([R for R, _ in parts], channel_dim), torch.cat([G_sq for _, G_sq in parts])

    def _measure_wide(self, G: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
        """By blocks of rows, which lie together in memory."""
        R, G_sq = (torch.zeros(num, G.shape[1], device=G.device) for num in (P.shape[0], 1))
        for first, count in self._blocks(*G.shape):
            g = _float32(G.narrow(0, first, count), self._grad)
            R.addmm_(P.narrow(1, first, count), g)
            G_sq.add_(g.square().sum(0))
        return R, G_sq[0]

    def square(self, G: Tensor) -> Tensor:
        """As the reference, a block of elements at a time."""
        blocks = (_float32(G.narrow(0, *block), self._grad) for block in self._blocks(G.numel(), 1))
        return torch.stack([torch.zeros((), device=G.device), *(torch.dot(g, g) for g in blocks)]).double().sum()

    def apply(
        self, W: Tensor, G: Tensor, eta_s: Tensor, decay: Tensor | None, live: Tensor, precision: Precision
    ) -> None:
        """As the reference, a block of rows at a time."""
        if W.numel() == 0 or not live:  # free to ask on a CPU
            return
        rows, cols = W.shape[1:]
        for i in range(len(W)):
            eta = eta_s[i]
            for first, count in self._blocks(rows, cols):
                here = W[i].narrow(0, first, count)
                precise = precision.of((i * rows + first) * cols, count * cols)
                work = precise.read(_work_copy(here, self._work))
                grad = _float32(G[i].narrow(0, first, count), self._grad)
                reference.descend(work, grad, eta.narrow(0, first, count) if len(eta) == rows else eta, decay)
                precise.write(here, work, self._scratch)

    def adamw(
        self,
        W: Tensor,
        G: Tensor,
        M: Tensor,
        V: Tensor,
        live: Tensor,
        precision: Precision,
        moments: tuple[Precision, Precision],
        *,
        step: int,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        """As the reference, a block of elements at a time."""
        if not live:
            return
        width = precision.width
        for row, rows in self._blocks(W.numel() // width, width):
            first, count = row * width, rows * width
            here, m, v = (x.narrow(0, first, count) for x in (W, M, V))
            precise = precision.of(first, count)
            m32, v32 = m.float(), v.float()
            work = reference.adamw_descend(
                precise.read(_work_copy(here, self._work)),
                _float32(G.narrow(0, first, count), self._grad),
                m32,
                v32,
                live,
                step=step,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
            )
            precise.write(here, work, self._scratch)
            for stored, computed, how in zip((m, v), (m32, v32), moments, strict=True):
                if stored is not computed:
                    how.of(first, count).write(stored, computed, self._scratch)

    def _blocks(self, num: int, width: int, at_least: int = 1) -> Iterator[tuple[int, int]]:
        """(first, count) of the blocks that cut ``num`` slices of ``width`` elements each."""
        size = max(at_least, self._size // width)
        for first in range(0, num, size):
            yield first, min(size, num - first)


def _float32(x: Tensor, scratch: Tensor) -> Tensor:
    """``x`` in float32: itself, or a copy in ``scratch`` where that is large enough."""
    if x.dtype == torch.float32 and x.is_contiguous():
        return x
    return scratch[: x.numel()].view(x.shape).copy_(x) if x.numel() <= scratch.numel() else x.float()


def _work_copy(x: Tensor, scratch: Tensor) -> Tensor:
    """``x`` to compute on: itself where it is float32 (then the step is in place), else a copy in the scratch."""
    return _float32(x, scratch) if x.dtype != torch.float64 else x


def _one(projection: Projection, index: int) -> Projection:
    """The projection of one matrix of a stack: most have one for all."""
    return projection[index] if isinstance(projection, Tensor) and projection.ndim == 3 else projection
