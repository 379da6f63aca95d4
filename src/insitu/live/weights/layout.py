"""Where each checkpoint tensor lies inside an engine's own parameters, derived from what was seen while it loaded them.

vLLM merges matrices (q, k, v into one ``qkv_proj``) and pads vocabularies. Which slice of which checkpoint tensor became which
slice of which parameter is not looked up in a table for each model: every copy of a real load is recorded, and here the
records become slots under the checkpoint's own names. Whatever is not a plain copy of a whole tensor to one contiguous place
is refused, and every byte of every parameter must be accounted for.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from insitu.live.weights.arena import DTYPES, Slot


class LayoutError(ValueError):
    """The engine does not hold the checkpoint's tensors as they are; the message names the tensor."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy seen during a load. Positions are counted in elements; ``source`` is None for what no checkpoint tensor holds.

    ``contiguous`` says that the elements were row-major on both sides.
    """

    source: str | None
    source_start: int
    slot: str
    slot_start: int
    count: int
    contiguous: bool


def derive(
    copies: Iterable[Copy],
    sources: Mapping[str, Sequence[int]],
    slots: Sequence[Slot],
    *,
    padded: Collection[str] = (),
    aliases: Collection[str] = (),
) -> list[Slot]:
    """One slot for each checkpoint tensor, in the order of their places.

    Args:
        copies: what was recorded, in any order.
        sources: shape of every tensor that the checkpoint gave.
        slots: the engine's parameters.
        padded: slots whose last rows may belong to no tensor.
        aliases: checkpoint names of tied tensors, which the engine leaves out.

    Raises:
        LayoutError: a tensor that was not copied whole, in order and once; two tensors in one place; bytes left over.
    """
    places = {slot.name: slot for slot in slots}
    by_source: dict[str, set[Copy]] = {}
    for copy in copies:
        if copy.source is None:
            raise LayoutError(
                f"the engine computes {copy.slot!r} instead of copying it from the checkpoint: it cannot be trained in place"
            )
        by_source.setdefault(copy.source, set()).add(copy)
    found: list[Slot] = []
    owner: dict[str, str] = {}  # tensor -> the parameter it lies in
    for name, shape in sources.items():
        if name not in by_source:
            if name in aliases:
                continue
            raise LayoutError(
                f"the engine did not take the checkpoint's {name!r}: it would be trained and never served"
            )
        slot, start = _place(name, prod(shape), by_source[name])
        place = places[slot]
        owner[name] = slot
        found.append(Slot(name, place.offset + start * DTYPES[place.dtype].itemsize, place.dtype, tuple(shape)))
    found.sort(key=lambda each: each.offset)
    _account(found, owner, slots, padded)
    return found


def _place(name: str, count: int, pieces: Collection[Copy]) -> tuple[str, int]:
    """The parameter and first element where the pieces, one behind the other, make up the whole tensor."""
    ordered = sorted(pieces, key=lambda piece: (piece.source_start, piece.slot, piece.slot_start))
    first, expected = ordered[0], 0
    for piece in ordered:
        if not piece.contiguous:
            raise LayoutError(
                f"{name!r} is stored in {piece.slot!r} in another order of elements (transposed or strided)"
            )
        if piece.source_start < expected:
            raise LayoutError(
                f"{name!r} is stored twice, in {first.slot!r} and {piece.slot!r}: a step would reach one only"
            )
        moved = piece.slot != first.slot or piece.slot_start - piece.source_start != first.slot_start
        if piece.source_start > expected or moved:
            raise LayoutError(
                f"{name!r} is scattered over {first.slot!r}: its element {expected} is not next to the one before"
            )
        expected += piece.count
    if expected != count:
        raise LayoutError(f"{name!r} has {count} elements and {expected} of them were loaded into {first.slot!r}")
    return first.slot, first.slot_start


def _account(found: Sequence[Slot], owner: Mapping[str, str], slots: Sequence[Slot], padded: Collection[str]) -> None:
    """No byte of a parameter belongs to two tensors, and none to nobody but padding behind the last row."""
    inside: dict[str, list[Slot]] = {slot.name: [] for slot in slots}
    for tensor in found:
        inside[owner[tensor.name]].append(tensor)
    for slot in slots:
        at = slot.offset
        for tensor in inside[slot.name]:
            if tensor.offset < at:
                raise LayoutError(f"{tensor.name!r} overlaps the tensor before it in {slot.name!r}")
            if tensor.offset > at:
                raise LayoutError(
                    f"{tensor.offset - at} bytes of {slot.name!r} before {tensor.name!r} come from no checkpoint tensor"
                )
            at += tensor.num_bytes
        left = slot.offset + slot.num_bytes - at
        if left < 0:
            raise LayoutError(f"{inside[slot.name][-1].name!r} reaches beyond the end of {slot.name!r}")
        if left and (slot.name not in padded or not inside[slot.name]):
            raise LayoutError(f"{left} bytes at the end of {slot.name!r} come from no checkpoint tensor")
