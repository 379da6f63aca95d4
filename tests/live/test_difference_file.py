"""The file of a version: what comes back is the other side bit for bit; a file that is not what was written is noticed."""

import hashlib
import io
import json
import math
import random
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from versioned import Tensors, nudged, random_bits, raw

from insitu.live.difference import BLOCK, DTYPES, DifferenceError, bits
from insitu.live.difference_file import MAGIC, DifferenceFile, Written, walk, write

TRAILER = 8 + 32 + 8


def written(path: Path, before: Tensors, after: Tensors) -> Written:
    with path.open("wb") as file:
        return write(file, before.items(), after, threads=2)


def applied(path: Path, tensors: Tensors, *, backwards: bool = False) -> Tensors:
    file = DifferenceFile(path)
    assert file.entries.keys() == tensors.keys()
    found = {}
    with ThreadPoolExecutor(2) as pool:
        for name, tensor in tensors.items():
            entry = file.entries[name]
            block = walk(name, bits(tensor), [(file, backwards)], pool)
            found[name] = torch.from_numpy(block.view(f"i{block.itemsize}")).view(DTYPES[entry.dtype]).view(entry.shape)
    return found


def small() -> Tensors:
    return {
        "matrix": torch.zeros(9, 7, dtype=torch.bfloat16),
        "half": torch.zeros(8, dtype=torch.float16),
        "vector": torch.zeros(5),
        "scalar": torch.tensor(0.0),
        "nothing": torch.empty(0, 3, dtype=torch.bfloat16),
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Tensors, Tensors]:
    before, after = random_bits(small(), 1), random_bits(small(), 2)
    written(tmp_path / "file", before, after)
    return tmp_path / "file", before, after


# -- what is read back -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_either_side_becomes_the_other_at_every_border_of_a_block(
    tmp_path: Path, size: int, dtype: torch.dtype
) -> None:
    like = {"a": torch.zeros(size, dtype=dtype), "b": torch.zeros(3, dtype=dtype)}
    before = random_bits(like, 1)
    for after in (random_bits(like, 2), nudged(before, 3), before):
        written(tmp_path / "file", before, after)
        assert raw(applied(tmp_path / "file", before)) == raw(after)
        assert raw(applied(tmp_path / "file", after, backwards=True)) == raw(before)
    assert len(DifferenceFile(tmp_path / "file").entries["a"].offsets) == max(1, math.ceil(size / BLOCK)) + 1


def test_tensors_without_elements_or_dimensions_and_of_any_dtype_are_kept(pair: tuple[Path, Tensors, Tensors]) -> None:
    path, before, after = pair
    assert raw(applied(path, before)) == raw(after)
    assert raw(applied(path, after, backwards=True)) == raw(before)


@given(seeds=st.lists(st.integers(0, 1 << 30), min_size=2, max_size=5), shape=st.lists(st.integers(0, 7), max_size=3))
@settings(max_examples=30, deadline=None)
def test_a_chain_leads_forwards_and_backwards(
    tmp_path_factory: pytest.TempPathFactory, seeds: list[int], shape: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("chain")
    like = {"a": torch.zeros(shape, dtype=torch.bfloat16)}
    sides = [random_bits(like, seed) for seed in seeds]
    for i in range(1, len(sides)):
        written(directory / str(i), sides[i - 1], sides[i])
    at = sides[0]
    for i in range(1, len(sides)):
        at = applied(directory / str(i), at)
        assert raw(at) == raw(sides[i])
    for i in reversed(range(1, len(sides))):
        at = applied(directory / str(i), at, backwards=True)
    assert raw(at) == raw(sides[0])


def test_views_that_are_not_contiguous_are_stored_as_they_are_read(tmp_path: Path) -> None:
    before, after = {"a": torch.randn(6, 4).T}, {"a": torch.randn(8, 6)[::2]}
    written(tmp_path / "file", before, after)
    assert torch.equal(applied(tmp_path / "file", before)["a"], after["a"])


def test_what_is_said_of_a_file_is_so(tmp_path: Path) -> None:
    before = {name: torch.randn(300, 40).to(dtype) for name, dtype in DTYPES.items()}
    after = {name: (tensor + 0.01 * torch.randn(300, 40)).to(tensor.dtype) for name, tensor in before.items()}
    said = written(tmp_path / "file", before, after)
    content = (tmp_path / "file").read_bytes()
    assert (said.bytes, said.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert said.before == hashlib.sha256(b"".join(of[2] for of in raw(before).values())).hexdigest()
    moved = sum((after[n].double() - t.double()).square().sum() for n, t in before.items())
    norm = sum(t.double().square().sum() for t in before.values())
    assert said.norm_ratio == pytest.approx(math.sqrt(moved / norm), rel=1e-5)


def test_a_norm_that_is_no_number_is_said_and_the_bits_are_kept(tmp_path: Path) -> None:
    for start, ratio in ((0.0, math.inf), (math.nan, math.nan), (math.inf, math.nan)):
        before, after = {"a": torch.full((3,), start)}, {"a": torch.ones(3)}
        assert written(tmp_path / "file", before, after).norm_ratio == pytest.approx(ratio, nan_ok=True)
        assert raw(applied(tmp_path / "file", before)) == raw(after)


# -- sides that do not fit ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("vector"), "'vector' is not the same kind"),
        (lambda t: t.update(more=torch.zeros(1)), "'more' is not in the version before"),
        (lambda t: t.update(vector=torch.zeros(4)), "'vector' is not the same kind"),
        (lambda t: t.update(vector=torch.zeros(5, 1)), "'vector' is not the same kind"),
        (lambda t: t.update(half=torch.zeros(8, dtype=torch.bfloat16)), "'half' is not the same kind"),
    ],
    ids=["missing after", "missing before", "shorter", "another shape", "another dtype"],
)
def test_sides_of_other_tensors_are_refused_by_name(change: Callable[[Tensors], Any], said: str) -> None:
    after = small()
    change(after)
    with pytest.raises(DifferenceError, match=said):
        write(io.BytesIO(), small().items(), after, threads=1)


def test_what_a_difference_does_not_start_from_is_refused_by_name(pair: tuple[Path, Tensors, Tensors]) -> None:
    path, before, after = pair
    file = DifferenceFile(path)
    with ThreadPoolExecutor(1) as pool:
        for tensors, backwards in ((after, False), (before, True)):
            for name in ("matrix", "half", "vector", "scalar"):
                with pytest.raises(DifferenceError, match=rf"file: '{name}' is not the tensor that this difference"):
                    walk(name, bits(tensors[name]), [(file, backwards)], pool)
        with pytest.raises(DifferenceError, match="'matrix' is not the tensor"):
            walk("matrix", bits(before["matrix"])[:-1], [(file, False)], pool)
        with pytest.raises(DifferenceError, match="file has no 'stranger'"):
            walk("stranger", bits(before["matrix"]), [(file, False)], pool)


# -- damage ------------------------------------------------------------------------------------------------------------
def index_of(content: bytes) -> int:
    return int(struct.unpack_from("<Q", content, len(content) - TRAILER)[0])


def test_a_file_cut_anywhere_is_noticed(pair: tuple[Path, Tensors, Tensors]) -> None:
    path, _, _ = pair
    content = path.read_bytes()
    end, index = len(content), index_of(content)
    borders = {0, 8, index, *(end - n for n in (0, 8, 40, 48))}
    borders |= {at for entry in DifferenceFile(path).entries.values() for at in entry.offsets}
    cuts = {at + near for at in borders for near in (-1, 0, 1)} | set(random.Random(0).sample(range(end), 50))
    for size in sorted(cut for cut in cuts if 0 <= cut < end):
        path.write_bytes(content[:size])
        with pytest.raises(DifferenceError, match=r"/file (is damaged|cannot be read)"):
            DifferenceFile(path)
    for more in (content + b"\0", content + content, content + MAGIC):
        path.write_bytes(more)
        with pytest.raises(DifferenceError, match="/file is damaged"):
            DifferenceFile(path)


def test_a_flipped_bit_is_noticed_wherever_it_is(pair: tuple[Path, Tensors, Tensors]) -> None:
    path, _, _ = pair
    content = path.read_bytes()
    end, index = len(content), index_of(content)
    draw = random.Random(1)
    places = [*draw.sample(range(end), 50), *draw.sample(range(index, end - TRAILER), 20)]
    places += [*range(len(MAGIC)), *range(end - TRAILER, end)]
    for at in places:
        damaged = bytearray(content)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DifferenceError, match="/file is damaged"):
            DifferenceFile(path)


def test_the_offset_of_the_index_is_under_the_checksum(tmp_path: Path) -> None:
    """JSON may begin with blanks: an index that were said to begin at one before it would be read all the same."""
    resealed(tmp_path / "file", b"  {}")
    content = bytearray((tmp_path / "file").read_bytes())
    content[-TRAILER] ^= 1
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DifferenceError, match="its checksum is wrong"):
        DifferenceFile(tmp_path / "file")


def test_a_file_of_nothing_and_no_file_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "zeros").write_bytes(b"\0" * 4096)
    (tmp_path / "directory").mkdir()
    for name in ("empty", "zeros", "directory", "gone"):
        with pytest.raises(DifferenceError, match=rf"/{name} (is damaged|cannot be read)"):
            DifferenceFile(tmp_path / name)


# -- files with a right checksum that no insitu has written ------------------------------------------------------------
def resealed(path: Path, index: bytes, blocks: bytes = b"") -> None:
    content = MAGIC + blocks + index + struct.pack("<Q", len(MAGIC + blocks))
    path.write_bytes(content + hashlib.sha256(content).digest() + MAGIC)


def test_another_format_is_named_with_the_way_out(tmp_path: Path) -> None:
    resealed(tmp_path / "file", json.dumps({"format": 2, "something": "new"}).encode())
    with pytest.raises(
        DifferenceError, match="file has format 2, this insitu knows format 1; use the one that wrote it"
    ):
        DifferenceFile(tmp_path / "file")


def entry(**other: Any) -> dict[str, Any]:
    sums = {"before": "0" * 64, "after": "0" * 64}
    return {"name": "a", "dtype": "bfloat16", "shape": [3], **sums, "offsets": [8, 8], **other}


def index(*tensors: Any) -> bytes:
    return json.dumps({"format": 1, "tensors": tensors}).encode()


NO_TENSORS = [
    *(b"", b"[]", b"7", b"null", b"{}", b"\xff\xfe", b'{"format": 1}', b'{"format": 1, "tensors": 3}', index(3)),
    *(index({"name": "a"}), index(entry(dtype="int8")), index(entry(shape=["x"])), index(entry(more=1))),
    *(index(entry(offsets=offsets)) for offsets in ([], [8], [8, 8, 8], [0, 8], [9, 8], [8, 1 << 40])),
    index(entry(shape=[BLOCK + 1])),
]


@pytest.mark.parametrize("content", NO_TENSORS)
def test_an_index_that_describes_no_tensors_is_damage(tmp_path: Path, content: bytes) -> None:
    resealed(tmp_path / "file", content)
    with pytest.raises(DifferenceError, match="/file is damaged"):
        DifferenceFile(tmp_path / "file")


def test_blocks_that_are_not_what_the_index_says_never_give_a_wrong_tensor(tmp_path: Path) -> None:
    """The checksum is right, and still no bits come out but those whose sum is known."""
    before, after = {"a": torch.zeros(64, dtype=torch.bfloat16)}, {"a": torch.ones(64, dtype=torch.bfloat16)}
    written(tmp_path / "file", before, after)
    content = (tmp_path / "file").read_bytes()
    index = index_of(content)
    draw = np.random.default_rng(0)
    for at in range(8, index):
        blocks = bytearray(content[8:index])
        blocks[at - 8] ^= 1 << int(draw.integers(8))
        resealed(tmp_path / "file", content[index:-TRAILER], bytes(blocks))
        try:
            found = applied(tmp_path / "file", before)
        except DifferenceError:
            continue
        assert raw(found) == raw(after)


# -- several files at once -----------------------------------------------------------------------------------------------
def test_a_walk_over_several_files_is_the_same_as_one_after_the_other_and_leads_back(tmp_path: Path) -> None:
    states = [{"w": torch.full((3, BLOCK // 2), float(i)) + torch.arange(3)[:, None]} for i in range(4)]
    for i, (before, after) in enumerate(pairwise(states)):
        written(tmp_path / str(i), before, after)
    files = [DifferenceFile(tmp_path / str(i)) for i in range(3)]
    first, last = (bits(state["w"]) for state in (states[0], states[-1]))
    with ThreadPoolExecutor(2) as pool:
        there = walk("w", first, [(file, False) for file in files], pool)
        assert np.array_equal(there, last)
        assert np.array_equal(walk("w", last, [(file, True) for file in reversed(files)], pool), first)
        with pytest.raises(
            DifferenceError, match=rf"{files[2].path}: 'w' is not the tensor that this difference starts from"
        ):
            walk("w", first, [(files[0], False), (files[2], False)], pool)
        with pytest.raises(DifferenceError, match="has no 'other'"):
            walk("other", first, [(files[0], False)], pool)
