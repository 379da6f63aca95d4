"""Any model, merged and cut into pieces in any way: the slots derived give back each tensor's bytes, and damage is noticed."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu.live.weights.arena import DTYPES, Arena, Slot, plan
from insitu.live.weights.layout import Copy, LayoutError, derive


@dataclass(frozen=True)
class Engine:
    """One random engine: its parameters, the checkpoint, and the copies that a load of it makes."""

    slots: list[Slot]
    sources: dict[str, tuple[int, ...]]
    copies: list[Copy]
    padded: set[str]
    tensors: dict[str, torch.Tensor]


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    """Parameters of 1 to 4 tensors each, some padded at the end; every tensor loaded in 1 to 4 pieces; all in any order."""
    merges = draw(st.lists(st.lists(shapes, min_size=1, max_size=4), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    parameters, sources, copies, padded, tensors = [], {}, [], set(), {}
    for i, merged in enumerate(merges):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        start = 0
        for j, shape in enumerate(merged):
            # Names whose order has nothing to do with the places.
            name, count = f"{(7 * i + 5 * j) % 11}.{i}.{j}", math.prod(shape)
            cuts = draw(st.lists(st.integers(1, count - 1), max_size=3, unique=True)) if count > 1 else []
            borders = [0, *sorted(cuts), count]
            for a, b in pairwise(borders):
                copies.append(Copy(name, a, f"p{i}", start + a, b - a, True))
            sources[name] = shape
            bits = torch.randint(0, 256, (count * DTYPES[dtype].itemsize,), dtype=torch.uint8, generator=generator)
            tensors[name] = bits.view(DTYPES[dtype]).view(shape)
            start += count
        padding = draw(st.sampled_from([0, 0, 1, 7]))
        if padding:
            padded.add(f"p{i}")
        parameters.append((f"p{i}", DTYPES[dtype], (start + padding,)))
    shuffled = draw(st.permutations(copies))
    order = draw(st.permutations(sorted(sources)))
    return Engine(plan(parameters), {name: sources[name] for name in order}, shuffled, padded, tensors)


def load(engine: Engine) -> Arena:
    """What the engine's loader does with these copies: byte for byte, into memory that was never zero."""
    arena = Arena.create(engine.slots)
    views = {name: view.view(-1).view(torch.uint8) for name, view in arena.views().items()}
    for view in views.values():
        view.fill_(0xA5)
    for copy in engine.copies:
        assert copy.source is not None
        size = engine.tensors[copy.source].element_size()
        piece = engine.tensors[copy.source].reshape(-1).view(torch.uint8)
        views[copy.slot][copy.slot_start * size : (copy.slot_start + copy.count) * size] = piece[
            copy.source_start * size : (copy.source_start + copy.count) * size
        ]
    return arena


@settings(max_examples=150, deadline=None, derandomize=True)
@given(engines())
def test_the_slots_derived_give_back_each_tensors_bytes(engine: Engine) -> None:
    arena = load(engine)
    slots = derive(engine.copies, engine.sources, engine.slots, padded=engine.padded)
    assert sorted(slot.name for slot in slots) == sorted(engine.sources)
    views = arena.renamed(slots).views()
    for name, tensor in engine.tensors.items():
        assert views[name].shape == tensor.shape
        assert views[name].dtype == tensor.dtype
        found, expected = (t.reshape(-1).view(torch.uint8) for t in (views[name], tensor))
        assert torch.equal(found, expected), name
    ends = [(slot.offset, slot.offset + slot.num_bytes) for slot in slots]
    assert ends == sorted(ends)
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    arena.close()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(engines(), st.data())
def test_one_copy_lost_moved_or_turned_is_always_refused(engine: Engine, data: st.DataObject) -> None:
    """Whatever piece it is: a layout that is a little wrong must not be derived."""
    at = data.draw(st.integers(0, len(engine.copies) - 1))
    copy = engine.copies[at]
    other = data.draw(st.sampled_from(sorted(engine.sources)))
    room = next(slot for slot in engine.slots if slot.name == copy.slot).shape[0]
    damages = {
        "lost": [],
        "computed": [replace(copy, source=None)],
        "turned": [replace(copy, contiguous=False)],
        "shorter": [replace(copy, count=copy.count - 1)] if copy.count > 1 else [],
        "later in the parameter": [replace(copy, slot_start=copy.slot_start + 1)],
        "from another place": [replace(copy, source_start=copy.source_start + 1)],
        "twice": [copy, replace(copy, slot_start=(copy.slot_start + 1) % (room + 1))],
        "of another tensor too": [copy, replace(copy, source=other, source_start=0)],
    }
    kind = data.draw(st.sampled_from(sorted(damages)))
    if kind == "of another tensor too" and other == copy.source and copy.source_start == 0:
        return  # the same copy again, which is no damage
    damaged = [*engine.copies[:at], *damages[kind], *engine.copies[at + 1 :]]
    with pytest.raises(LayoutError):
        derive(damaged, engine.sources, engine.slots, padded=engine.padded)
