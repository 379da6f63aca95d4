"""The arena: where every byte lies, who may change its size, and that two processes hold it once."""

import errno
import fcntl
import gc
import hashlib
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu.live.weights import handles
from insitu.live.weights.arena import DTYPES, NAME, PAGE, Arena, Slot, plan, resident
from insitu.live.weights.header import Header

# Odd sizes, a scalar, exactly one page, one element more than a page.
MIXED = [
    ("odd", torch.bfloat16, (3, 5)),
    ("scalar", torch.float32, ()),
    ("page", torch.bfloat16, (2, 1024)),
    ("more", torch.float16, (2049,)),
    ("last", torch.float32, (7,)),
]
SEAL, SHRINK, GROW = 0x1, 0x2, 0x4
F_ADD_SEALS = 1033


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(plan(MIXED))
    yield arena
    arena.close()


def memory(size: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


# Small ones, and some of a page or a little more.
shapes = st.lists(st.integers(1, 70), max_size=2).map(tuple) | st.sampled_from([(1024,), (2048,), (2049,), (3, 1025)])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(list(DTYPES.values())), shapes), min_size=1, max_size=6))
def test_each_view_writes_all_bytes_of_its_slot_and_no_other(
    tensors: list[tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    slots = plan((str(i), dtype, shape) for i, (dtype, shape) in enumerate(tensors))
    arena = Arena.create(slots)
    header = os.pread(arena.fd, PAGE, 0)
    expected = bytearray(os.fstat(arena.fd).st_size)
    for i, (slot, (dtype, shape)) in enumerate(zip(slots, tensors, strict=True)):
        view = arena.view(slot)
        assert (view.dtype, tuple(view.shape)) == (dtype, shape)
        assert slot.offset % PAGE == 0
        view.view(-1).view(torch.uint8).fill_(i + 1)
        expected[slot.offset : slot.offset + view.numel() * view.element_size()] = (
            bytes([i + 1]) * view.numel() * view.element_size()
        )
    for i, view in enumerate(arena.views().values()):  # a neighbour written later left it alone
        assert (view.view(-1).view(torch.uint8) == i + 1).all()
    found = os.pread(arena.fd, len(expected), 0)
    arena.close()
    assert found[:PAGE] == header
    assert found[PAGE:] == expected[PAGE:]


def test_a_dtype_the_arena_cannot_hold_is_refused_with_the_tensors_name() -> None:
    with pytest.raises(ValueError, match=r"layers\.3\.up.*int8"):
        plan([("fine", torch.bfloat16, (2,)), ("layers.3.up", torch.int8, (2,))])


@pytest.mark.parametrize("change", [-PAGE, -1, 1, PAGE])
def test_nobody_can_resize_the_memory(arena: Arena, change: int) -> None:
    with pytest.raises(PermissionError) as refused:
        os.ftruncate(arena.fd, arena.num_bytes + change)
    assert refused.value.errno == errno.EPERM
    with pytest.raises(PermissionError):  # nor take the seals off by adding weaker ones
        fcntl.fcntl(arena.fd, F_ADD_SEALS, 0)


@pytest.mark.parametrize("seals", [0, SHRINK, SHRINK | GROW, SEAL | GROW, SEAL | SHRINK])
def test_memory_that_could_be_resized_is_refused(arena: Arena, seals: int) -> None:
    fd = memory(arena.num_bytes, seals)
    with pytest.raises(ValueError, match="not sealed"):
        Arena(fd, arena.slots, arena.num_bytes)
    os.close(fd)


def test_a_file_in_the_place_of_sealed_memory_is_refused(arena: Arena) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(arena.num_bytes)
        with pytest.raises(ValueError, match="not sealed"):
            Arena(file.fileno(), arena.slots, arena.num_bytes)


@pytest.mark.parametrize("change", [-PAGE, -1, 1, PAGE])
def test_memory_of_another_size_is_refused(arena: Arena, change: int) -> None:
    fd = memory(arena.num_bytes + change, SEAL | SHRINK | GROW)
    with pytest.raises(ValueError, match="not the same model"):
        Arena(fd, arena.slots, arena.num_bytes)
    os.close(fd)


def test_slots_may_leave_bytes_out_but_not_reach_beyond_the_memory(arena: Arena) -> None:
    last = arena.slots[-1]
    some = Arena(os.dup(arena.fd), arena.slots[1:3], arena.num_bytes)
    assert some.num_bytes == arena.num_bytes
    assert list(some.views()) == ["scalar", "page"]
    some.close()
    assert last.offset + PAGE == arena.num_bytes
    Arena(arena.fd, [Slot("to the end", last.offset, "float32", (1024,))], arena.num_bytes)
    for slot in (Slot("far", last.offset, "float32", (1025,)), Slot("far", arena.num_bytes, "float16", ())):
        end = slot.offset + slot.num_bytes
        with pytest.raises(ValueError, match=f"ends at byte {end} of an arena of {arena.num_bytes}"):
            Arena(arena.fd, [slot], arena.num_bytes)


def test_the_last_slot_need_not_be_the_one_that_ends_last(arena: Arena) -> None:
    backwards = list(reversed(arena.slots))
    other = Arena(os.dup(arena.fd), backwards, arena.num_bytes)
    assert other.sha256() == arena.sha256()
    other.close()
    with pytest.raises(ValueError, match=f"ends at byte {arena.slots[-1].offset + 28} of an arena of {2 * PAGE}"):
        Arena(arena.fd, backwards, 2 * PAGE)


def test_renamed_is_the_same_memory_under_other_names_and_borders(arena: Arena) -> None:
    page = next(slot for slot in arena.slots if slot.name == "page")
    halves = [Slot("upper", page.offset, "bfloat16", (1024,)), Slot("lower", page.offset + 2048, "bfloat16", (1024,))]
    other = arena.renamed(halves)
    arena.views()["page"].copy_(torch.arange(2048).view(2, 1024))
    assert list(other.views()) == ["upper", "lower"]
    assert torch.equal(other.views()["upper"], arena.views()["page"][0])
    other.views()["lower"][5] = -3
    assert arena.views()["page"][1, 5] == -3
    assert [slot.name for slot in arena.slots] == [name for name, *_ in MIXED]  # the first one kept its own
    arena.stamp(4, 2)
    assert other.header == arena.header
    assert (other.fd, other.num_bytes) == (arena.fd, arena.num_bytes)
    assert other.holds(arena.views()["odd"])


def test_what_is_stamped_is_what_another_mapping_reads(arena: Arena) -> None:
    other = Arena(os.dup(arena.fd), arena.slots, arena.num_bytes)
    epoch = arena.header.epoch
    assert other.header == Header(epoch, version=0, step=0, writer=0)
    for version, step, label in ((12, 3, "12+3"), (2**40, 0, str(2**40)), (13, 0, "13")):
        arena.stamp(version, step)
        assert other.header == Header(epoch, version, step, writer=0)
        assert other.header.label == label
    other.close()


def test_the_writing_mark_names_the_writer_until_the_next_stamp(arena: Arena) -> None:
    arena.stamp(5, 2)
    before = arena.header
    arena.mark_writing()
    assert arena.header == Header(before.epoch, version=5, step=2, writer=os.getpid())
    arena.stamp(5, 3)
    assert arena.header == Header(before.epoch, version=5, step=3, writer=0)


def test_each_arena_has_an_epoch_of_its_own() -> None:
    arenas = [Arena.create(plan(MIXED)) for _ in range(3)]
    assert len({arena.header.epoch for arena in arenas}) == 3
    for arena in arenas:
        assert len(bytes.fromhex(arena.header.epoch)) == 16
        arena.close()


def test_memory_without_the_mark_of_an_arena_has_no_header(arena: Arena) -> None:
    stranger = Arena(memory(arena.num_bytes, SEAL | SHRINK | GROW), arena.slots, arena.num_bytes)
    with pytest.raises(ValueError, match="magic"):
        _ = stranger.header
    stranger.close()


def test_sha256_is_that_of_all_tensors_bytes_in_the_order_of_their_names(arena: Arena) -> None:
    for view in arena.views().values():
        view.view(-1).view(torch.uint8).random_(0, 256)
    expected = hashlib.sha256()
    for _, view in sorted(arena.views().items()):
        expected.update(view.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert [name for name, _ in sorted(arena.views().items())] != list(arena.views())  # the two orders differ here
    assert arena.sha256() == expected.hexdigest()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.permutations(MIXED), st.integers(0, 2**31))
def test_sha256_is_the_same_for_any_layout_of_the_same_tensors(order: list[Any], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    content = {n: torch.randint(0, 256, (math.prod(s) * d.itemsize,), generator=draw) for n, d, s in MIXED}
    arenas = [Arena.create(plan(tensors)) for tensors in (MIXED, order)]
    for arena in arenas:
        for name, view in arena.views().items():
            view.view(-1).view(torch.uint8).copy_(content[name])
    one, other = (arena.sha256() for arena in arenas)
    assert one == other
    arenas[1].views()["odd"].view(-1).view(torch.uint8)[0] ^= 1
    assert arenas[1].sha256() != one
    for arena in arenas:
        arena.close()


def test_sha256_changes_with_any_one_bit_of_any_tensor_and_with_nothing_else(arena: Arena) -> None:
    for view in arena.views().values():
        view.view(-1).view(torch.uint8).random_(0, 256)
    original = arena.sha256()

    def flip(at: int, bit: int) -> None:
        (byte,) = os.pread(arena.fd, 1, at)
        os.pwrite(arena.fd, bytes([byte ^ (1 << bit)]), at)

    choose = random.Random(0)
    weights: set[int] = set()
    for slot in arena.slots:
        inside = range(slot.offset, slot.offset + slot.num_bytes)
        weights |= set(inside)
        for at in {inside[0], inside[-1], *choose.choices(inside, k=12)}:
            for bit in {0, 7, choose.randrange(8)}:
                flip(at, bit)
                assert arena.sha256() != original, f"bit {bit} of byte {at - slot.offset} of {slot.name}"
                flip(at, bit)
    assert arena.sha256() == original
    for at in choose.sample(sorted(set(range(arena.num_bytes)) - weights), 200):  # header and padding
        flip(at, choose.randrange(8))
    assert arena.sha256() == original


def test_sha256_changes_when_two_tensors_of_one_shape_change_places() -> None:
    arena = Arena.create(plan([("k", torch.bfloat16, (4, 8)), ("v", torch.bfloat16, (4, 8))]))
    views = arena.views()
    k, v = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    views["k"].copy_(k), views["v"].copy_(v)
    one = arena.sha256()
    views["k"].copy_(v), views["v"].copy_(k)
    assert arena.sha256() != one
    arena.close()


def test_it_holds_its_views_and_nothing_else(arena: Arena) -> None:
    other = Arena.create(plan(MIXED))
    for name, view in arena.views().items():
        assert arena.holds(view)
        assert not arena.holds(view.clone())
        assert not other.holds(view)  # one of the two lies above the other: both ends are tried
        assert not arena.holds(other.views()[name])
    other.close()


_OTHER_PROCESS = """
import sys
from pathlib import Path
from insitu.live.weights import handles
from insitu.live.weights.arena import resident

line = handles.connect(Path(sys.argv[1]))
message, fd = handles.receive(line, want_fd=True)
arena = handles.open_arena(message, fd)
weight = arena.views()["weight"]
weight.sum()  # touch every page
handles.send(line, {})
while (wish := handles.receive(line)[0])["do"] != "end":
    if wish["do"] == "write":
        weight[-1, -1] = wish["value"]
    handles.send(line, {"value": float(weight[0, 0]), "epoch": arena.header.epoch, **resident()})
"""


def test_two_processes_hold_one_copy_and_see_each_others_writes_at_once(tmp_path: Path) -> None:
    gc.collect()
    assert resident()["rss"] == 0, f"an earlier test still maps /memfd:{NAME}; the figures below would be of both"
    path = tmp_path / "run" / "handle.sock"
    listener = handles.listen(path)
    arena = Arena.create(plan([("weight", torch.float32, (2048, 1024))]))
    weight = arena.views()["weight"]
    weight.fill_(1.0)
    with listener, subprocess.Popen([sys.executable, "-c", _OTHER_PROCESS, str(path)]) as process:
        line, _ = listener.accept()
        with line:
            handles.send(line, arena.manifest(), arena.fd)
            handles.receive(line)
            weight[0, 0] = 42.0
            handles.send(line, {"do": "look"})
            there, _ = handles.receive(line)
            here = resident()
            handles.send(line, {"do": "write", "value": -7.0})
            handles.receive(line)
            assert weight[-1, -1] == -7.0
            handles.send(line, {"do": "end"})
    assert process.returncode == 0
    assert there["value"] == 42.0
    assert there["epoch"] == arena.header.epoch
    for figures in (here, there):
        assert figures["rss"] == pytest.approx(arena.num_bytes, abs=2 * PAGE)
        assert figures["pss"] == pytest.approx(figures["rss"] / 2, rel=0.01)
        assert figures["private_dirty"] == 0
    alone = resident()  # and the figures do tell one holder from two
    assert alone["pss"] == alone["rss"] == alone["private_dirty"] == here["rss"]
    arena.close()
