"""Which side of a matrix is projected, and the seeded random projections that do it.

THE rule, by the global shape (rows x cols) of a matrix:

- rows >= cols: the columns are projected, and each row is a channel;
- rows <  cols: the rows are projected, and each column is a channel.

So the projected side m is the smaller one, the channels n the larger one, and R keeps the orientation of G:
(n, r) for a tall or square matrix, (r, n) for a wide one.

A projection P (r x m) satisfies E[P^T P] = I, hence E|P x|^2 = |x|^2. It is a pure function of (seed, refresh index,
r, m): never part of the optimizer state, equal after a resume and on every device.

Legend: M rows, N columns of the tensor; m projected side, n channels, r rank.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from insitu.optim.seeds import mix

PROJECTIONS = ("gaussian", "sketch")


class Layout(NamedTuple):
    """How a matrix of ``rows x cols`` is projected at some rank; made by :func:`layout`."""

    rows: int
    cols: int
    rank: int

    @property
    def channel_dim(self) -> int:
        """0 where rows are channels (tall, square), 1 where columns are (wide)."""
        return 0 if self.rows >= self.cols else 1

    @property
    def projected(self) -> int:
        """m, the length of the projected side."""
        return min(self.rows, self.cols)

    @property
    def channels(self) -> int:
        """n, the number of channels."""
        return max(self.rows, self.cols)

    @property
    def moments(self) -> tuple[int, int]:
        """Shape of R and of both moments: that of G with the projected side shortened to the rank."""
        return (self.rows, self.rank) if self.channel_dim == 0 else (self.rank, self.cols)


def layout(rows: int, cols: int, rank: int) -> Layout:
    """Apply THE rule to a global shape; a rank above the projected side is the projected side."""
    return Layout(rows, cols, min(rank, rows, cols))


class Sketch(NamedTuple):
    """A sparse projection: coordinate ``order[t]`` is added to bucket ``t mod r`` with sign ``signs[t]``.

    Bucket sizes differ by at most one. Independent hashing would leave buckets empty and break alpha (measured: the
    scaling came out 0.80-0.99 of the true one, against 1.00 when balanced). The order is a random permutation, so that
    coordinates a fixed distance apart, such as the same dimension of several attention heads, do not always collide.
    """

    order: Tensor  # (m,) int64, a permutation
    signs: Tensor  # (m,) float32, -1 or +1
    rank: int


def make(kind: str, seed: int, refresh_index: int, size: Layout, device: torch.device) -> Tensor | Sketch:
    """The projection of one tensor for one refresh: a dense P (r, m) float32, or a :class:`Sketch`.

    Drawn on the CPU whatever the device, so that every device gets the same one.
    """
    generator = torch.Generator().manual_seed(mix(seed, refresh_index))
    rank, m = size.rank, size.projected
    if kind == "gaussian":  # P_ij ~ N(0, 1/r)
        return torch.randn(rank, m, generator=generator).div_(sqrt(rank)).to(device)
    assert kind == "sketch", kind
    order = torch.randperm(m, generator=generator)
    signs = torch.randint(2, (m,), generator=generator).mul_(2).sub_(1).float()
    return Sketch(order.to(device), signs.to(device), rank)


class ProjectionCache:
    """The projections in use, one per parameter, up to a number of bytes; what does not fit is made anew at each step.

    They are no state: they follow from seed and refresh index.
    """

    def __init__(self, limit: int = 64 << 20) -> None:
        self._limit = limit
        self._held: dict[Tensor, tuple[tuple[object, ...], Tensor | Sketch]] = {}
        self._bytes = 0

    def get(self, parameter: Tensor, kind: str, seed: int, refresh_index: int, size: Layout) -> Tensor | Sketch:
        """As :func:`make`, on the parameter's device."""
        wanted = (kind, seed, refresh_index, size, parameter.device)
        known, projection = self._held.get(parameter, (None, None))
        if known == wanted and projection is not None:
            return projection
        if projection is not None:
            self._bytes -= _num_bytes(projection)
            del self._held[parameter]
        made = make(kind, seed, refresh_index, size, parameter.device)
        if self._bytes + _num_bytes(made) <= self._limit:
            self._held[parameter] = wanted, made
            self._bytes += _num_bytes(made)
        return made


def _num_bytes(projection: Tensor | Sketch) -> int:
    return projection.nbytes if isinstance(projection, Tensor) else projection.order.nbytes + projection.signs.nbytes


def project(G: Tensor, projection: Tensor | Sketch, channel_dim: int) -> Tensor:
    """R = P G in the orientation of G: (rows, r) where rows are channels, (r, cols) where columns are.

    ``G`` is float32 (rows, cols), or any part of its channels. A sketch reads G once and needs no dense P.
    """
    if isinstance(projection, Tensor):
        return G @ projection.T if channel_dim == 0 else projection @ G
    order, signs, rank = projection
    dim = 1 - channel_dim
    mixed = G.index_select(dim, order).mul_(signs if dim == 1 else signs[:, None])
    rest = len(order) % rank
    whole, rest_of = mixed.narrow(dim, 0, len(order) - rest), mixed.narrow(dim, len(order) - rest, rest)
    R: Tensor = whole.unflatten(dim, (-1, rank)).sum(dim)  # type: ignore[no-untyped-call]
    R.narrow(dim, 0, rest).add_(rest_of)
    return R


def matrix_shape(shape: torch.Size | tuple[int, ...], *, conv: bool = False, name: str = "a tensor") -> tuple[int, int]:
    """The (rows, cols) as which a tensor of two or more dimensions is projected.

    Dimensions of length 1 are dropped from a 3-D tensor; one of four or more dimensions, or of a convolution, is read
    as first dimension x rest.

    Raises:
        ValueError: a 3-D tensor that is not said to be a convolution: probably a stack of matrices (experts), each of
            which would need its own channels.
    """
    sizes = tuple(shape)
    if len(sizes) == 3 and not conv:
        sizes = tuple(size for size in sizes if size != 1) or (1,)
        sizes = (1, *sizes) if len(sizes) == 1 else sizes
        if len(sizes) == 3:
            raise ValueError(
                f"{name} has shape {tuple(shape)}: stacks of matrices are not projected yet; keep AdamW for it "
                "(param_groups(model, adamw=[pattern]) or role='adamw' in its group), or set conv=True in its group "
                "if it is a convolution, read as first dimension x rest"
            )
    rows = sizes[0]
    cols = 1
    for size in sizes[1:]:
        cols *= size
    return rows, cols
