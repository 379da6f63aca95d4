"""The exact difference of two blocks, forwards and backwards, whatever the bits; a damaged one is an error, never a crash."""

import itertools
import struct

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from insitu.live.difference import DTYPES, Bits, DifferenceError, apply, bits, encode
from insitu.live.weights import arena

# Bits of an element, and those below the exponent's second lowest bit: two binades are a class.
FORMATS = {torch.bfloat16: (16, 8, 0x7F), torch.float16: (16, 11, 0x0F), torch.float32: (32, 24, 0x7F)}
SPECIAL = {
    16: [0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7C00, 0x7E01, 0x3F80, 0x3C00, 0x7FFF],
    32: [0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x3F800000, 0x7FFFFFFF],
}
CLASSES = 6
every_dtype = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def array(values: list[int], dtype: torch.dtype) -> Bits:
    return np.array(values, np.uint16 if FORMATS[dtype][0] == 16 else np.uint32)


@st.composite
def sides(draw: st.DrawFn, dtype: torch.dtype, min_size: int = 0) -> tuple[list[int], list[int]]:
    """Two lists of bit patterns; the second is near the first, or anything."""
    width = FORMATS[dtype][0]
    pattern = st.integers(0, 2**width - 1) | st.sampled_from(SPECIAL[width])
    before = draw(st.lists(pattern, min_size=min_size, max_size=40))
    near = st.just(None) | st.integers(-3, 3) | pattern
    steps = draw(st.lists(near, min_size=len(before), max_size=len(before)))
    after = [b if s is None else (b + s) % 2**width for b, s in zip(before, steps, strict=True)]
    return before, after


def parts_of(data: bytes, itemsize: int) -> tuple[int, list[bytes]]:
    """What is stored: the floor, and the frames."""
    count = 2 + CLASSES * (1 + itemsize)
    floor, *sizes = struct.unpack_from(f"<B{count}I", data)
    ends = np.cumsum([1 + 4 * count, *sizes]).tolist()
    return floor, [data[a:b] for a, b in itertools.pairwise(ends)]


def packed(floor: int, frames: list[bytes]) -> bytes:
    return struct.pack(f"<B{len(frames)}I", floor, *map(len, frames)) + b"".join(frames)


def oracle(before: list[int], after: list[int], dtype: torch.dtype) -> tuple[int, list[bytes]]:
    """What is stored, element by element, as the module's docstring has it."""
    width, shift, mask = FORMATS[dtype]
    floor = max(0, max(((pattern >> shift) & mask for pattern in before), default=0) - CLASSES + 1)

    def class_of(pattern: int) -> int:
        return min(max((pattern >> shift) & mask, floor), floor + CLASSES - 1) - floor

    def flags(which: list[bool]) -> bytes:
        text = "".join("01"[flag] for flag in which)
        return bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))

    pairs = list(zip(before, after, strict=True))
    steps = [(class_of(b) - class_of(a)) % 256 for b, a in pairs]
    parts = [flags([step != 0 for step in steps]), bytes(step for step in steps if step)]
    for each in range(CLASSES):
        values = []
        for b, a in pairs:
            step = (a - b) % 2**width
            signed = step - 2**width if step >= 2 ** (width - 1) else step
            if class_of(b) == each:
                values.append(2 * signed if signed >= 0 else -2 * signed - 1)
        changed = [(value - 1).to_bytes(width // 8, "little") for value in values if value]
        parts += [flags([value != 0 for value in values])]
        parts += [bytes(value[plane] for value in changed) for plane in range(width // 8)]
    return floor, parts


def test_the_dtypes_are_those_of_the_arena() -> None:
    assert DTYPES == arena.DTYPES


@every_dtype
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_either_side_becomes_the_other_bit_for_bit_and_what_is_stored_is_the_oracles(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    before, after = data.draw(sides(dtype))
    was, now = array(before, dtype), array(after, dtype)
    stored = encode(was, now, dtype)
    floor, frames = parts_of(stored, was.itemsize)
    unpacked = [zstandard.ZstdDecompressor().decompress(frame) if frame else b"" for frame in frames]
    assert (floor, unpacked) == oracle(before, after, dtype)
    for given_, wanted, backwards in ((was, now, False), (now, was, True)):
        kept = given_.tobytes()
        found = apply(given_, stored, dtype, backwards=backwards)
        assert found.dtype == wanted.dtype
        assert found.tobytes() == wanted.tobytes()
        assert given_.tobytes() == kept  # the side that is there is left alone


@every_dtype
def test_every_special_pattern_becomes_every_other(dtype: torch.dtype) -> None:
    special = SPECIAL[FORMATS[dtype][0]]
    was = array([a for a in special for _ in special], dtype)
    now = array([b for _ in special for b in special], dtype)
    stored = encode(was, now, dtype)
    assert np.array_equal(apply(was, stored, dtype), now)
    assert np.array_equal(apply(now, stored, dtype, backwards=True), was)


def test_bits_are_those_in_memory_whatever_the_shape_and_the_strides() -> None:
    tensor = torch.tensor([[0.0, -0.0], [float("nan"), 1.5]], dtype=torch.bfloat16)
    assert bits(tensor).tolist() == [0, 0x8000, 0x7FC0, 0x3FC0]
    assert bits(tensor.T).tolist() == [0, 0x7FC0, 0x8000, 0x3FC0]
    assert bits(torch.tensor(1.0)).tolist() == [0x3F800000]
    assert bits(torch.empty(0, 3, dtype=torch.float16)).tolist() == []
    assert bits(torch.nn.Parameter(tensor))[1] == 0x8000


def test_a_lessons_difference_is_small() -> None:
    draw = np.random.default_rng(0)
    was = bits(torch.randn(1 << 16).to(torch.bfloat16))
    now = was + (draw.random(was.size) < 0.02).astype(np.uint16)
    assert len(encode(was, now, torch.bfloat16)) < 0.03 * was.nbytes
    assert len(encode(was, was, torch.bfloat16)) < 300


# -- damage ------------------------------------------------------------------------------------------------------------
def survives(block: Bits, data: bytes, dtype: torch.dtype) -> None:
    """Wrong bits may come out, which the file's checksums find; nothing else may happen."""
    for backwards in (False, True):
        try:
            other = apply(block, data, dtype, backwards=backwards)
        except DifferenceError:
            continue
        assert (other.dtype, other.shape) == (block.dtype, block.shape)


@every_dtype
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_damaged_block_is_a_difference_error_or_a_block(dtype: torch.dtype, data: st.DataObject) -> None:
    before, after = data.draw(sides(dtype, min_size=1))
    was = array(before, dtype)
    stored = bytearray(encode(was, array(after, dtype), dtype))
    cut = data.draw(st.integers(0, len(stored) - 1))
    with pytest.raises(DifferenceError):
        apply(was, bytes(stored[:cut]), dtype)
    with pytest.raises(DifferenceError):
        apply(was, bytes(stored) + b"\0", dtype)
    for _ in range(4):
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        survives(was, bytes(stored), dtype)


@given(junk=st.binary(max_size=200))
@example(junk=b"")
@example(junk=struct.pack("<B20I", 7, *[2**32 - 1] * 20))
@settings(max_examples=200, deadline=None)
def test_junk_is_a_difference_error(junk: bytes) -> None:
    for size in (0, 1, 9):
        with pytest.raises(DifferenceError, match="stored difference"):
            apply(np.zeros(size, np.uint16), junk, torch.bfloat16)


@pytest.mark.parametrize(("written", "given_"), [(0, 1), (1, 0), (8, 9), (9, 8), (16, 40), (40, 16)])
def test_a_block_of_another_number_of_elements_is_refused(written: int, given_: int) -> None:
    stored = encode(np.zeros(written, np.uint16), np.ones(written, np.uint16), torch.bfloat16)
    with pytest.raises(DifferenceError, match=rf"values where|at most {given_}"):
        apply(np.zeros(given_, np.uint16), stored, torch.bfloat16)


def frames_of_a_change(size: int = 8, changed: int = 8) -> list[bytes]:
    after = array([1] * changed + [0] * (size - changed), torch.bfloat16)
    return parts_of(encode(np.zeros(size, np.uint16), after, torch.bfloat16), 2)[1]


@pytest.mark.parametrize("bomb", [1 << 20, 1 << 60])
@pytest.mark.parametrize("part", range(20))
def test_a_part_that_would_unpack_to_more_than_the_block_is_refused_before_it_is_unpacked(part: int, bomb: int) -> None:
    frames = frames_of_a_change()
    if bomb == 1 << 20:
        frames[part] = zstandard.compress(b"\0" * bomb)
    else:  # only says so: magic, a single segment with 8 bytes of size, one empty raw block
        frames[part] = struct.pack("<IBQ", 0xFD2FB528, 0b11100000, bomb) + b"\1\0\0"
    with pytest.raises(DifferenceError, match=rf"would have {bomb} bytes; expected at most 8"):
        apply(np.zeros(8, np.uint16), packed(0, frames), torch.bfloat16)


def test_a_frame_that_does_not_say_its_size_or_has_company_is_refused() -> None:
    frames = frames_of_a_change()
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(b"\0")
    with pytest.raises(DifferenceError, match="would have -1 bytes"):
        apply(np.zeros(8, np.uint16), packed(0, [silent, *frames[1:]]), torch.bfloat16)
    with pytest.raises(DifferenceError, match="unused data"):
        apply(np.zeros(8, np.uint16), packed(0, [frames[0] + b"more", *frames[1:]]), torch.bfloat16)


def test_numbers_of_values_that_do_not_fit_the_masks_are_refused() -> None:
    one, two = frames_of_a_change(changed=1), frames_of_a_change(changed=2)
    for part in (2, 3, 4):  # the first class: its mask, and two planes
        with pytest.raises(DifferenceError, match=r"has . values where . should be"):
            apply(np.zeros(8, np.uint16), packed(0, [*one[:part], two[part], *one[part + 1 :]]), torch.bfloat16)


def test_classes_counted_from_anywhere_are_a_difference_error_or_a_block() -> None:
    block = array(SPECIAL[16], torch.bfloat16)
    stored = encode(block, block[::-1].copy(), torch.bfloat16)
    for floor in range(256):
        survives(block, bytes([floor]) + stored[1:], torch.bfloat16)


def test_a_step_to_a_class_that_there_is_not_is_refused() -> None:
    frames = frames_of_a_change()
    frames[:2] = [zstandard.compress(b"\x80"), zstandard.compress(b"\x06")]
    with pytest.raises(DifferenceError, match="names a class of magnitude that there is not"):
        apply(np.zeros(8, np.uint16), packed(0, frames), torch.bfloat16, backwards=True)
