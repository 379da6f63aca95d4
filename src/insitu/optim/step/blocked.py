"""The passes for CPUs: the formulas of the reference on blocks that fit the cache of a core.

A full-size float32 copy of a bf16 matrix costs more in page faults and memory traffic than the arithmetic on it. Here a
block of G becomes float32 in scratch memory that is reused, is measured or applied there, and W is written once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from insitu.optim.projection import Sketch
from insitu.optim.rounding import make_scratch, store
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

    def measure(self, G: Tensor, projection: Tensor | Sketch, channel_dim: int) -> tuple[Tensor, Tensor]:
        """As the reference, a block of channels at a time; a wide matrix by blocks of rows, which lie together."""
        if channel_dim == 1 and isinstance(projection, Tensor):
            return self._measure_wide(G, projection)
        num, width = G.shape[channel_dim], G.shape[1 - channel_dim]
        parts = [
            reference.measure(_float32(G.narrow(channel_dim, first, count), self._grad), projection, channel_dim)
            for first, count in self._blocks(num, width, 1 if channel_dim == 0 else _NARROWEST)
        ]
        return torch.cat([R for R, _ in parts], channel_dim), torch.cat([G_sq for _, G_sq in parts])

    def _measure_wide(self, G: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
        R, G_sq = (torch.zeros(num, G.shape[1], device=G.device) for num in (P.shape[0], 1))
        for first, count in self._blocks(*G.shape):
            g = _float32(G.narrow(0, first, count), self._grad)
            R.addmm_(P.narrow(1, first, count), g)
            G_sq.add_(g.square().sum(0))
        return R, G_sq[0]

    def apply(self, W: Tensor, G: Tensor, eta_s: Tensor, decay: Tensor | None, key: int | None) -> None:
        """As the reference, a block of rows at a time."""
        rows, cols = W.shape
        for first, count in self._blocks(rows, cols):
            here = W.narrow(0, first, count)
            work = _work_copy(here, self._work)
            grad = _float32(G.narrow(0, first, count), self._grad)
            reference.descend(work, grad, eta_s.narrow(0, first, count) if len(eta_s) == rows else eta_s, decay)
            store(here, work, key, first * cols, self._scratch)

    def adamw(
        self,
        W: Tensor,
        G: Tensor,
        M: Tensor,
        V: Tensor,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        key: int | None,
    ) -> Tensor:
        """As the reference, a block of elements at a time."""
        blocks = list(self._blocks(W.numel(), 1))
        sums = [torch.dot(g, g) for g in (_float32(G.narrow(0, *block), self._grad) for block in blocks)]
        live = reference.is_live(torch.stack(sums))
        for first, count in blocks:
            here, m, v = (x.narrow(0, first, count) for x in (W, M, V))
            work = reference.adamw_descend(
                _work_copy(here, self._work),
                _float32(G.narrow(0, first, count), self._grad),
                m,
                v,
                live,
                step=step,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
            )
            store(here, work, key, first, self._scratch)
        return live

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
