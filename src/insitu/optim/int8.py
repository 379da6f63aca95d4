"""A matrix as int8 with one bfloat16 scale for each group of neighbours in a row: W_ij = q_ij s_ig, q in -127 ... 127.

Symmetric, and row by row: a group never reaches into the next row; the last of a row may be smaller. A product q s has 15
bits, so it is exact in float32, and what is written back unchanged is, bit for bit, what it was.

A scale stays while the largest weight of its group is between 96 and 127 of it. Only then does a new one put that
weight at 120, with room to both sides. If each write made the tightest scale, nearly every one would move all weights of
a group to another grid. The noise of that, x (1 - x) squared steps for a remainder x, so a sixth on average, is more than
that of rounding the update alone where it is below a fifth of a step. The smallest scale is float32's smallest normal
number, that of a group of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127  # |q|; -128 is not used, so that W and -W are stored alike
_FRESH = 120  # where a new scale puts the largest weight of its group
_LOOSEST = 96  # below which it asks for a new scale; an integer, so that rounding alone never takes a weight below it
_SMALLEST = torch.finfo(torch.float32).tiny


class Groups(NamedTuple):
    """How the rows of a matrix are grouped, and their scales, which :meth:`requantize` changes in place."""

    scale: Tensor  # (rows, groups) bfloat16
    size: int  # columns of a group
    cols: int

    def of(self, first: int, count: int) -> Groups:
        """For ``count`` elements from the flat index ``first`` on: whole rows."""
        assert first % self.cols == 0, "int8 weights are read and written by whole rows"
        assert count % self.cols == 0, "int8 weights are read and written by whole rows"
        return self._replace(scale=self.scale.narrow(0, first // self.cols, count // self.cols))

    def dequantize(self, q: Tensor) -> Tensor:
        """q s, in place of ``q``, a contiguous floating copy of the int8 numbers; exact in float32."""
        for part, scale in self._parts(q):
            part.mul_(scale.to(q.dtype).unsqueeze(-1))
        return q

    def requantize(self, work: Tensor) -> Tensor:
        """``work`` (contiguous float32) in units of its scales, in place: not yet integers. Scales change where they must."""
        for part, scale in self._parts(work):
            scale.copy_(_keep_or_renew(scale, torch.linalg.vector_norm(part, torch.inf, -1)))
            part.div_(scale.to(work.dtype).unsqueeze(-1))
        return work

    def _parts(self, matrix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The groups that are whole, (rows, k, size), and the rest of each row, (rows, 1, rest), with their scales."""
        rows = matrix.view(-1, self.cols)
        whole, rest = divmod(self.cols, self.size)
        if whole:
            yield rows[:, : whole * self.size].unflatten(1, (whole, self.size)), self.scale[:, :whole]  # type: ignore[no-untyped-call]
        if rest:
            yield rows[:, None, whole * self.size :], self.scale[:, whole:]


def _keep_or_renew(scale: Tensor, largest: Tensor) -> Tensor:
    """The scale for groups whose largest magnitude is ``largest``, bfloat16. NaN and infinity show in it."""
    known = scale.float()
    kept = (largest <= LARGEST * known) & (largest >= _LOOSEST * known)
    # Rounded up to bfloat16, so that no weight is cut off: the lower 16 bits carry.
    fresh = (largest / _FRESH).clamp_(min=_SMALLEST)
    fresh.view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000)
    return torch.where(kept, known, fresh).bfloat16()


def grouped(rows: int, cols: int, size: int | None, device: torch.device | str | None = None) -> Groups:
    """Groups of ``size`` columns, None for one a row, with the scales of zeros."""
    size = cols if size is None else min(size, cols)
    scale = torch.full((rows, -(-cols // size)), _SMALLEST, dtype=torch.bfloat16, device=device)
    return Groups(scale, size, cols)


def quantize_nearest(matrix: Tensor, size: int | None) -> tuple[Tensor, Groups]:
    """``matrix`` (rows, cols) floating, as int8 and groups: each element within half a scale of what it was."""
    groups = grouped(matrix.shape[0], matrix.shape[1], size, matrix.device)
    steps = groups.requantize(matrix.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format))
    return steps.round_().to(torch.int8), groups
