"""A shard acts as its whole tensor: what of a DTensor lies here, and who holds the rest (FSDP2, HSDP, tensor parallel).

Side and channels follow from the global shape, whatever the shards are. With channels sharded, each process owns whole
channels, moments are sharded like the parameter, and only sums cross the mesh. With the projected side sharded, R is a sum
over the mesh; it is reduced and its channels shared out at once, so the moments are sharded over channels there too.

A tensor that is sharded over channels *and* the projected side (FSDP2 with row-parallel layers) keeps its channels' part of
R, and so of the moments, on every process of the second mesh dimension.
"""

from __future__ import annotations

import functools
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from insitu.optim.exchange import Links, chunk, own_chunk
from insitu.optim.int8 import Groups
from insitu.optim.projection import Layout
from insitu.optim.quantized import Int8Weight


class Part(NamedTuple):
    """The part of a tensor that is here."""

    tensor: Tensor  # local, sharing memory with the parameter; its int8 numbers, if it is stored so
    shape: tuple[int, ...]  # of the whole
    first: tuple[int | Tensor, ...]  # where the part begins along each dimension; all its places where it has gaps
    sharded: tuple[tuple[int, int], ...] = ()  # (mesh dimension, tensor dimension)
    mesh: Any = None
    placements: tuple[Any, ...] = ()
    groups: Groups | None = None  # of an int8 weight

    @property
    def start(self) -> int | Tensor:
        """Global row-major index of the first element; of each element, (n,) int64, where they are not neighbours."""
        if self.mesh is None:
            return 0
        size = self.tensor.shape
        strides = [prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        partial = [d for d in range(len(size)) if size[d] != self.shape[d]]
        corner = [first for first in self.first if isinstance(first, int)]
        if len(corner) == len(size) and all(n == 1 for n in size[: max(partial, default=0)]):
            return sum(f * stride for f, stride in zip(corner, strides, strict=True))
        index = torch.zeros((), dtype=torch.int64, device=self.tensor.device)
        for d, (first, stride) in enumerate(zip(self.first, strides, strict=True)):
            device = index.device
            along = (
                first.to(device) if isinstance(first, Tensor) else torch.arange(first, first + size[d], device=device)
            )
            index = index + (along * stride).view([-1 if i == d else 1 for i in range(len(size))])
        return index.reshape(-1)

    @property
    def links(self) -> Links:
        """For a step that treats each element by itself."""
        return Links(tuple(self.mesh.get_group(i) for i, _ in self.sharded))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing torch.distributed for those who need none."""
    return _is_dtensor_type(type(tensor))


@functools.cache
def _is_dtensor_type(kind: type) -> bool:
    return any(base.__name__ == "DTensor" for base in kind.__mro__)


def part_of(tensor: Tensor, name: str) -> Part:
    """What of ``tensor`` is here.

    Raises:
        ValueError: a DTensor whose values are still partial sums.
    """
    if not is_dtensor(tensor):
        return Part(_stored(tensor), tuple(tensor.shape), (0,) * tensor.ndim, groups=_groups(tensor))
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name} is a DTensor of partial sums ({tensor.placements}): expected Shard or Replicate; "
            "call redistribute() on it first"
        )
    local = local_of(tensor.detach())
    sharded = tuple((i, getattr(p, "dim")) for i, p in enumerate(tensor.placements) if not p.is_replicate())  # noqa: B009
    dims = {d for _, d in sharded}
    places = [_place(tensor, d) if d in dims else (0, n) for d, n in enumerate(tensor.shape)]
    expected = tuple(num for _, num in places)
    assert expected == tuple(local.shape), (
        f"{name}: {tuple(local.shape)} is here, but {expected} by {tensor.placements}"
    )
    first = tuple(first for first, _ in places)
    placements = tuple(tensor.placements)
    return Part(_stored(local), tuple(tensor.shape), first, sharded, tensor.device_mesh, placements, _groups(local))


def _stored(local: Tensor) -> Tensor:
    return local.int_data if isinstance(local, Int8Weight) else local.detach()


def _groups(local: Tensor) -> Groups | None:
    return local.groups if isinstance(local, Int8Weight) else None


def _place(tensor: Any, dim: int) -> tuple[int | Tensor, int]:
    """Where the part that is here begins along a sharded dimension, and its length; all its places if they may lie apart.

    Mesh dimensions cut from left to right, except that FSDP2 cuts what tensor parallelism to the right of it has cut already;
    its placement then has a split factor, the number of those shards. A larger factor is that of fused layers, of which every
    process takes a part of each.
    """
    mesh, first, num = tensor.device_mesh, 0, tensor.shape[dim]
    places: Tensor | None = None
    cuts = [
        (i, getattr(p, "split_factor", 1)) for i, p in enumerate(tensor.placements) if getattr(p, "dim", None) == dim
    ]
    plain, strided = [cut for cut in cuts if cut[1] == 1], [cut for cut in cuts if cut[1] > 1]
    for i, factor in [*plain, *reversed(strided)]:
        fused = max(1, factor // prod(mesh.size(j) for j, _ in cuts if j > i))
        if fused > 1 and places is None:
            places = torch.arange(first, first + num)
        if places is None:
            skipped, num = chunk(num, mesh.size(i), mesh.get_local_rank(i))
            first += skipped
        else:
            shares = [(piece, chunk(len(piece), mesh.size(i), mesh.get_local_rank(i))) for piece in places.chunk(fused)]
            places = torch.cat([piece.narrow(0, *share) for piece, share in shares])
    return (first, num) if places is None else (places, len(places))


def local_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the part that is here, laid out as the parameter is."""
    if not is_dtensor(gradient):
        return gradient
    from torch.distributed.tensor import DTensor

    assert isinstance(gradient, DTensor)
    if is_dtensor(parameter):
        assert isinstance(parameter, DTensor)
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
        return gradient.to_local()
    return gradient.full_tensor()


class Split(NamedTuple):
    """How a projected tensor is sharded, in the words of the method."""

    links: Links
    local: tuple[int, int, int]  # (b, rows, cols) here
    projected: tuple[int, int]  # (first, count) of the projected side here
    stack: tuple[int, int]  # (first, count) of the matrices here
    moments: tuple[int, ...]  # shape of the part of the moments that is here
    placements: tuple[Any, ...]  # of the moments
    norm_placements: tuple[Any, ...]  # of one number per matrix of a stack


def split(part: Part, size: Layout, name: str) -> Split:
    """How the parts of a tensor that is read as ``size`` share the work.

    Raises:
        ValueError: sharded along a dimension that is only a part of a side, such as the kernel of a convolution, or in pieces
            that lie apart.
    """
    stacked = size.stack is not None
    row, col = (1, 2) if stacked else (0, 1)
    for _, d in part.sharded:
        if d > row and prod(part.shape[col:]) != part.shape[d]:
            raise ValueError(
                f"{name}, {part.shape}, is sharded along dimension {d}, which is only a part of a side of the "
                f"{size.rows} x {size.cols} matrix it is read as: shard it along dimension 0, or keep AdamW for it "
                "(param_groups(model, adamw=[pattern]))"
            )
    here = part.tensor.shape
    local = (here[0] if stacked else 1, here[row], prod(here[col:]))
    across = row if size.channel_dim == -1 else col
    num_projected, channels = (here[row], prod(here[col:])) if across == row else (prod(here[col:]), here[row])
    side = {min(d, col) for _, d in part.sharded} & {row, col}
    # Of the dimensions of the second side at most one is not 1, if they are sharded.
    first = part.first[row] if across == row else sum(part.first[col:])
    stack = part.first[0] if stacked else 0
    if isinstance(first, Tensor) or isinstance(stack, Tensor):
        raise ValueError(
            f"{name}, {part.shape}, is sharded in pieces that lie apart ({part.placements}) along a dimension where neighbours "
            "are needed: shard it without a split factor, or keep AdamW for it (param_groups(model, adamw=[pattern]))"
        )
    groups = tuple(part.mesh.get_group(i) for i, d in part.sharded if min(d, col) == across)
    scatter = size.channels if side == {across} else 0
    if scatter:
        channels = own_chunk(scatter, groups[0])[1]
    moments = (size.rank, channels) if size.channel_dim == -1 else (channels, size.rank)
    links = Links(
        tuple(part.mesh.get_group(i) for i, d in part.sharded if min(d, col) != across),
        groups,
        scatter,
        (stack, part.shape[0]) if stacked else None,
    )
    return Split(
        links,
        local,
        (first, num_projected),
        (stack, local[0]),
        (local[0], *moments) if stacked else moments,
        _moment_placements(part, size, across, col, bool(scatter)),
        _norm_placements(part),
    )


def _moment_placements(part: Part, size: Layout, across: int, col: int, scatter: bool) -> tuple[Any, ...]:
    """As the parameter's, but along the projected side: sharded over channels for the first, else whole."""
    if part.mesh is None:
        return ()
    from torch.distributed.tensor import Replicate, Shard

    placements = list(part.placements)
    for i, d in part.sharded:
        if min(d, col) == across:
            placements[i] = Shard(len(size.moments) + size.channel_dim) if scatter else Replicate()
            scatter = False
        elif d > col:
            placements[i] = Shard(col)
    return tuple(placements)


def _norm_placements(part: Part) -> tuple[Any, ...]:
    if part.mesh is None:
        return ()
    from torch.distributed.tensor import Replicate

    first = {i for i, d in part.sharded if d == 0}
    return tuple(placement if i in first else Replicate() for i, placement in enumerate(part.placements))


def distributed(local: Tensor, shape: tuple[int, ...], part: Part, placements: tuple[Any, ...]) -> Tensor:
    """State that is sharded: ``local`` as a DTensor on the parameter's mesh; itself where the parameter is whole."""
    if part.mesh is None:
        return local
    from torch.distributed.tensor import DTensor

    stride = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
    return DTensor.from_local(local, part.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def local_of(state: Tensor) -> Tensor:
    """The part of a state tensor that is here."""
    local: Tensor = state.to_local() if is_dtensor(state) else state  # type: ignore[attr-defined]
    return local


def whole_of(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded."""
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return whole
