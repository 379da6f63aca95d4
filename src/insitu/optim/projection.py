"""Which side of a matrix is projected, and the seeded random projections that do it.

THE rule, by the global shape (rows x cols) of a matrix:

- rows >= cols: the columns are projected, and each row is a channel;
- rows <  cols: the rows are projected, and each column is a channel.

So the projected side m is the smaller one, the channels n the larger one, and R keeps the orientation of G:
(n, r) for a tall or square matrix, (r, n) for a wide one. A stack of matrices (the experts of a layer) is so many
matrices of one projection: everything per matrix has one leading dimension more.

A random projection P (r x m) satisfies E[P^T P] = I, hence E|P x|^2 = |x|^2. It is a pure function of (seed, refresh
index, r, m): never part of the optimizer state, equal after a resume and on every device. The paper's ablation "svd"
takes the first r singular vectors of the gradient instead: those are state.

Legend: M rows, N columns of the tensor; m projected side, n channels, r rank.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from insitu.optim.seeds import mix

CACHE_BYTES = 64 << 20  # of all projections that are kept between steps
LANES = 16  # neighbouring coordinates that a sketch keeps together
PROJECTIONS = ("gaussian", "rademacher", "sketch", "svd")


class Layout(NamedTuple):
    """How a tensor of ``stack`` matrices of ``rows x cols`` is projected at some rank; made by :func:`layout`."""

    rows: int
    cols: int
    rank: int
    stack: int | None = None  # None: the tensor is one matrix

    @property
    def channel_dim(self) -> int:
        """-2 where rows are channels (tall, square), -1 where columns are (wide)."""
        return -2 if self.rows >= self.cols else -1

    @property
    def projected(self) -> int:
        """m, the length of the projected side."""
        return min(self.rows, self.cols)

    @property
    def channels(self) -> int:
        """n, the number of channels."""
        return max(self.rows, self.cols)

    @property
    def moments(self) -> tuple[int, ...]:
        """Shape of R and of both moments: that of G with the projected side shortened to the rank."""
        matrix = (self.rows, self.rank) if self.channel_dim == -2 else (self.rank, self.cols)
        return matrix if self.stack is None else (self.stack, *matrix)

    @property
    def norms(self) -> tuple[int, ...]:
        """Shape of the limiter's memory: one norm per matrix."""
        return () if self.stack is None else (self.stack,)


def layout(rows: int, cols: int, rank: int, stack: int | None = None) -> Layout:
    """Apply THE rule to a global shape; a rank above the projected side is the projected side."""
    return Layout(rows, cols, min(rank, rows, cols), stack)


class Sketch(NamedTuple):
    """A sparse projection: coordinate ``order[t]`` is added to bucket ``t mod r`` with sign ``signs[t]``.

    Bucket sizes differ by at most one. Independent hashing would leave buckets empty and break alpha (measured: the
    scaling came out 0.80-0.99 of the true one, against 1.00 when balanced). The order is random, so that coordinates a fixed
    distance apart, such as the same dimension of several attention heads, do not always collide. It keeps blocks of
    :data:`LANES` neighbours together, in random order within and among themselves: a block is one register, or rows that
    follow one another, where a free permutation would have each number gathered alone, at twice the time. How much |P x|^2
    varies depends on P through the chance that two coordinates collide, which hardly changes: at m = 576, r = 144 it is
    0.0054 between blocks and 0 within one, and 0.0052 throughout for a free permutation.
    """

    order: Tensor  # (k r,) int32, every coordinate once; places that are left over hold 0 and have the sign 0
    signs: Tensor  # (k r,) float32, -1 or +1, or 0
    rank: int
    whole: bool = True  # the blocks are; not in the share of a part of the coordinates


Projection = Tensor | Sketch


def make(kind: str, seed: int, refresh_index: int, size: Layout) -> Projection:
    """The random projection of one tensor for one refresh: a dense P (r, m) float32, or a :class:`Sketch`.

    Drawn on the CPU, so that every device gets the same one.
    """
    generator = torch.Generator().manual_seed(mix(seed, refresh_index))
    rank, m = size.rank, size.projected
    if kind == "gaussian":  # P_ij ~ N(0, 1/r)
        return torch.randn(rank, m, generator=generator).div_(sqrt(rank))
    if kind == "rademacher":  # P_ij = +-1/sqrt(r)
        return _signs((rank, m), generator).div_(sqrt(rank))
    assert kind == "sketch", kind
    order, signs = _order(m, generator), _signs((m,), generator)
    left_over = (0, -m % rank)
    return Sketch(nn.functional.pad(order, left_over), nn.functional.pad(signs, left_over), rank)


def _order(m: int, generator: torch.Generator) -> Tensor:
    """A random permutation of m coordinates that keeps blocks together; those after the last whole block stay behind it."""
    blocks, rest = divmod(m, LANES)
    lanes = torch.rand(blocks, LANES, generator=generator).argsort(dim=1, stable=True)
    order = (torch.randperm(blocks, generator=generator)[:, None] * LANES + lanes).view(-1)
    return torch.cat([order, m - rest + torch.randperm(rest, generator=generator)]).int()


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator).mul_(2).sub_(1).float()


def singular_vectors(G: Tensor, size: Layout) -> Tensor:
    """The first r singular vectors of the projected side of each matrix, as orthonormal rows: (..., r, m) float32.

    ``G`` is (..., rows, cols). The paper's "APOLLO w. SVD". P^T P keeps the largest part of G and not its mean, so here
    ``alpha="auto"`` gives updates somewhat larger than AdamW's. The largest entry of each vector is made positive: moments
    outlive a projection, so a sign must not depend on who computed it.
    """
    turned = G.float() if size.channel_dim == -1 else G.float().mT
    vectors: Tensor = torch.linalg.svd(turned, full_matrices=False)[0]
    P = vectors[..., : size.rank].mT
    largest = P.gather(-1, P.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -P, P).contiguous()


def narrow(projection: Projection, first: int, count: int) -> Projection:
    """The projection of the coordinates ``first`` to ``first + count`` alone: their share of the sum P G."""
    if isinstance(projection, Tensor):
        return projection.narrow(-1, first, count).clone()
    order, signs, rank, _ = projection
    mine = ((order >= first) & (order < first + count) & (signs != 0)).view(-1, rank)
    place = (mine.cumsum(0) - 1).mul_(rank).add_(torch.arange(rank))[mine]  # the same bucket, without gaps
    num = int(mine.sum(0).max()) * rank
    narrowed = Sketch(torch.zeros(num, dtype=torch.int32), torch.zeros(num), rank, whole=False)
    narrowed.order[place] = order[mine.view(-1)] - first
    narrowed.signs[place] = signs[mine.view(-1)]
    return narrowed


class ProjectionCache:
    """The projections in use, one per parameter, up to a number of bytes; what does not fit is made anew at each step.

    They are no state: they follow from seed and refresh index.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._held: dict[Tensor, tuple[tuple[object, ...], Projection]] = {}
        self._bytes = 0

    def get(
        self, parameter: Tensor, kind: str, seed: int, refresh_index: int, size: Layout, part: tuple[int, int]
    ) -> Projection:
        """As :func:`make`, on the parameter's device, for ``part`` (first, count) of the projected side."""
        wanted = (kind, seed, refresh_index, size, part, parameter.device)
        known, projection = self._held.get(parameter, (None, None))
        if known == wanted and projection is not None:
            return projection
        if projection is not None:
            self._bytes -= _num_bytes(projection)
            del self._held[parameter]
        made = make(kind, seed, refresh_index, size)
        if part != (0, size.projected):
            made = narrow(made, *part)
        made = moved(made, parameter.device)
        if self._bytes + _num_bytes(made) <= self._limit:
            self._held[parameter] = wanted, made
            self._bytes += _num_bytes(made)
        return made


def moved(projection: Projection, device: torch.device) -> Projection:
    """It on ``device``."""
    if isinstance(projection, Tensor):
        return projection.to(device)
    return projection._replace(order=projection.order.to(device), signs=projection.signs.to(device))


def _num_bytes(projection: Projection) -> int:
    return projection.nbytes if isinstance(projection, Tensor) else projection.order.nbytes + projection.signs.nbytes


def project(G: Tensor, projection: Projection, channel_dim: int) -> Tensor:
    """R = P G in the orientation of G: (..., rows, r) where rows are channels, (..., r, cols) where columns are.

    ``G`` is float32 (..., rows, cols), or any part of its channels. A sketch reads G once and needs no dense P.
    """
    if isinstance(projection, Tensor):
        return G @ projection.mT if channel_dim == -2 else projection @ G
    dim = -3 - channel_dim  # the projected one
    mixed = G.index_select(dim, projection.order).mul_(projection.signs if dim == -1 else projection.signs[:, None])
    R: Tensor = mixed.unflatten(dim, (len(projection.order) // projection.rank, projection.rank)).sum(dim - 1)  # type: ignore[no-untyped-call]
    return R


def placed(G: Tensor) -> Tensor:
    """G itself, or a copy of it that lies as torch allocates.

    A library's product has other last places where a matrix is turned, or does not start at a multiple of 64 bytes (as a view
    of a bucket of gradients), so that the same gradient would give another step.
    """
    return G if G.is_contiguous() and G.data_ptr() % 64 == 0 else G.clone(memory_format=torch.contiguous_format)


def matrix_shape(shape: torch.Size | tuple[int, ...], *, conv: bool = False) -> tuple[int | None, int, int]:
    """The (stack, rows, cols) as which a tensor of two or more dimensions is projected; stack is None for one matrix.

    | tensor                              | read as                                              |
    |-------------------------------------|------------------------------------------------------|
    | 2 dimensions                        | the matrix it is                                     |
    | convolution, or 4 and more          | first dimension x rest                               |
    | 3 dimensions, the second or third 1 | first dimension x rest                               |
    | any other of 3 dimensions           | a stack of matrices, such as the experts of a layer  |
    """
    if len(shape) == 3 and not conv and 1 not in shape[1:]:
        return shape[0], shape[1], shape[2]
    return None, shape[0], prod(shape[1:])
