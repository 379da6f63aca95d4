"""Which versions go, when a complete checkpoint is worth its room, and when there is no room for another version."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from versioned import (
    Tensors,
    back,
    base_tensors,
    digest,
    names,
    nudged,
    open_versions,
    random_bits,
    raw,
    roll_back,
    small_base,
    teach,
)

from insitu.live import retention
from insitu.live.checkpoint import ORIGIN, VersionError, checkpoint_files
from insitu.live.checkpoint import digest as digest_of_files
from insitu.live.disk import usage
from insitu.live.retention import NoRoomError, require_room, tidy
from insitu.live.versions import Versions


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return small_base(tmp_path / "base")


@pytest.fixture
def versions(tmp_path: Path, base: Path) -> Iterator[Versions]:
    (tmp_path / "state").mkdir()
    versions = open_versions(tmp_path / "state", base)
    yield versions
    versions.store.close()


def lessons(versions: Versions, count: int, *, large: bool = True) -> dict[int, Tensors]:
    """Large ones take more than the weights themselves, so one too many is worth a checkpoint."""
    made = {0: base_tensors(versions)}
    at = made[0]
    for seed in range(count):
        at = random_bits(at, seed) if large else nudged(at, seed)
        made[teach(versions, at)] = at
    return made


def left(versions: Versions) -> list[int]:
    return [v.id for v in versions.store.versions() if v.status == "committed" and not v.pruned]


def readable(versions: Versions, made: dict[int, Tensors]) -> None:
    for version in left(versions):
        assert back(versions, version) == raw(made[version]), version


# -- the rule ----------------------------------------------------------------------------------------------------------
def test_the_last_ones_stay_and_a_checkpoint_of_the_oldest_of_them_takes_the_place_of_the_others(
    versions: Versions,
) -> None:
    made = lessons(versions, 6)
    assert tidy(versions, keep=3) == [1, 2, 3]
    assert left(versions) == [0, 4, 5, 6]
    assert names(versions) == ["checkpoint-v4", "v4.difference", "v5.difference", "v6.difference"]
    checkpoint = checkpoint_files(versions.checkpoint(4))
    assert digest_of_files(checkpoint) == digest(made[4])
    assert f'"sha256": "{digest(made[4])}"' in (versions.checkpoint(4) / ORIGIN).read_text()
    readable(versions, made)
    with pytest.raises(
        VersionError, match=r"version 2 was pruned to save room.*versions that are left: \[0, 4, 5, 6\]"
    ):
        next(versions.iter_version(2))
    assert tidy(versions, keep=3) == []
    for seed in (7, 8, 9):
        made[seed] = random_bits(made[0], seed)
        teach(versions, made[seed])
    assert tidy(versions, keep=3) == [4, 5, 6]
    assert names(versions) == ["checkpoint-v7", "v7.difference", "v8.difference", "v9.difference"]
    readable(versions, made)


def test_a_checkpoint_that_would_save_no_room_is_not_written(versions: Versions) -> None:
    made = lessons(versions, 6, large=False)
    weights = usage(versions.base / "model.safetensors")
    assert sum(usage(versions.path(v)) for v in range(1, 5)) < weights
    assert tidy(versions, keep=2) == []
    assert len(names(versions)) == 6
    readable(versions, made)
    while sum(usage(versions.path(v)) for v in range(1, len(made) - 2)) <= weights:
        at = nudged(made[max(made)], len(made))
        made[teach(versions, at)] = at
    assert tidy(versions, keep=2) == list(range(1, len(made) - 2))
    readable(versions, made)


def test_pinned_ones_stay_with_what_leads_to_them_until_they_are_let_go(versions: Versions) -> None:
    made = lessons(versions, 8)
    versions.store.pin(2)
    assert tidy(versions, keep=2) == [3, 4, 5, 6]
    assert left(versions) == [0, 1, 2, 7, 8]
    readable(versions, made)
    assert back(versions, 2, replay=True) == raw(made[2])
    versions.store.pin(2, False)
    assert tidy(versions, keep=2) == [1, 2]
    readable(versions, made)


def test_the_head_is_never_pruned_not_even_when_it_repeats_the_oldest(versions: Versions) -> None:
    made = lessons(versions, 5)
    made[6] = made[1]
    roll_back(versions, 1)
    assert tidy(versions, keep=1) == [2, 3, 4, 5]
    assert left(versions) == [0, 1, 6]
    readable(versions, made)


def test_with_a_rollback_to_the_base_everything_that_leads_nowhere_goes(versions: Versions) -> None:
    made = lessons(versions, 3)
    made[4] = made[0]
    roll_back(versions, 0)
    assert tidy(versions, keep=1) == [1, 2, 3]
    assert names(versions) == []
    readable(versions, made)


def test_rollbacks_go_with_what_they_repeat_and_are_refused_with_those_left(versions: Versions) -> None:
    made = lessons(versions, 3)
    made[4] = made[2]
    roll_back(versions, 2)
    for seed in range(5, 9):
        made[seed] = random_bits(made[0], seed)
        teach(versions, made[seed])
    assert tidy(versions, keep=2) == [1, 2, 3, 4, 5, 6]
    for _ in range(2):  # and the next time it is no obstacle
        assert tidy(versions, keep=2) == []
    with pytest.raises(VersionError, match=r"version 4 was pruned .*left: \[0, 7, 8\]"):
        versions.content(4)
    with pytest.raises(ValueError, match="version 4 was pruned"):
        versions.store.pin(4)
    readable(versions, made)


def test_an_empty_directory_and_one_with_the_base_alone_are_left_alone(tmp_path: Path, base: Path) -> None:
    assert tidy(Versions(tmp_path, base, open_versions(tmp_path, base).store), keep=1) == []


def test_what_is_pinned_while_a_checkpoint_is_written_stays(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lessons(versions, 6)
    prune, asked = versions.store.prune, []

    def pin_before(ids: list[int], pinned: set[int]) -> bool:
        asked.append(list(ids))
        if len(asked) == 1:
            versions.store.pin(3)
        return prune(ids, pinned)

    monkeypatch.setattr(versions.store, "prune", pin_before)
    assert tidy(versions, keep=1) == [4, 5]
    assert asked == [[1, 2, 3, 4, 5], [4, 5]]
    readable(versions, made)


# -- what may go wrong -------------------------------------------------------------------------------------------------
def test_a_torn_undo_image_never_becomes_a_checkpoint(versions: Versions) -> None:
    """With keep=1 it is the nearest to the version that is written, and what it replaces would be gone."""
    made = lessons(versions, 3)
    versions.keep_image(3, made[2])
    assert tidy(versions, keep=1) == [1, 2]
    assert digest_of_files(checkpoint_files(versions.checkpoint(3))) == digest(made[3])


def test_where_a_version_is_damaged_nothing_is_pruned(versions: Versions) -> None:
    lessons(versions, 5)
    versions.path(2).write_bytes(b"damaged")
    with pytest.raises(VersionError, match=r"version 4 cannot be rebuilt: .*v2\.difference is damaged"):
        tidy(versions, keep=2)
    assert left(versions) == [0, 1, 2, 3, 4, 5]
    assert names(versions) == [f"v{v}.difference" for v in range(1, 6)]


def test_without_room_for_a_checkpoint_what_needs_none_is_pruned(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lessons(versions, 3)
    roll_back(versions, 0)
    for seed in range(5, 9):
        made[seed] = random_bits(made[0], seed)
        teach(versions, made[seed])

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(retention, "write_checkpoint", fail)
    with pytest.raises(OSError, match="No space left"):
        tidy(versions, keep=2)
    assert left(versions) == [0, 4, 5, 6, 7, 8]
    readable(versions, {**made, 4: made[0]})


def test_left_overs_of_a_process_that_was_killed_go_first(versions: Versions) -> None:
    lessons(versions, 1)
    (versions.directory / "v2.partial").write_bytes(b"half")
    (versions.directory / ".checkpoint-v1.abc").mkdir()
    assert tidy(versions, keep=9) == []
    assert names(versions) == ["v1.difference"]


# -- room --------------------------------------------------------------------------------------------------------------
def test_a_nearly_full_disk_is_refused_with_figures_and_the_way_out(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000_000))
    require_room(versions, 400_000_000, None)
    said = r"the disk of .*versions has 1\.00 GB free, a lesson may need 1\.07 GB; make room .*--teach\.keep-versions"
    with pytest.raises(NoRoomError, match=said):
        require_room(versions, 500_000_000, None)


def test_the_limit_is_on_what_the_versions_take_with_one_more(versions: Versions) -> None:
    (versions.directory / "deep").mkdir()
    (versions.directory / "deep" / "file").write_bytes(b"x" * 1_000_000)
    require_room(versions, 1_000_000, 0.003)
    said = r"versions takes 0\.00 GB, a lesson may need 0\.00 GB more, the limit is 0\.0029 GB; raise --teach\.disk-limit-gb"
    with pytest.raises(NoRoomError, match=said):
        require_room(versions, 1_000_000, 0.0029)


def test_what_is_not_there_takes_no_room(tmp_path: Path) -> None:
    assert usage(tmp_path / "gone") == 0
    (tmp_path / "file").write_bytes(b"xyz")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert (usage(tmp_path / "file"), usage(tmp_path)) == (3, 3)


# -- anything, in any order --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_reads_back_every_version_that_was_not_pruned(versions: Versions, seed: int) -> None:
    draw = random.Random(seed)
    made = {0: base_tensors(versions)}
    pinned: set[int] = set()
    keep = draw.choice([1, 2, 4])
    for step in range(40):
        head, there = max(made), left(versions)
        what = draw.choice(["teach", "teach", "teach", "large", "roll back", "pin", "unpin", "image", "tidy", "tidy"])
        if what in ("teach", "large"):
            at = (random_bits if what == "large" else nudged)(made[head], step)
            made[teach(versions, at)] = at
        elif what == "roll back":
            target = draw.choice(there)
            made[roll_back(versions, target)] = made[target]
        elif what == "pin":
            pinned.add(target := draw.choice(there))
            versions.store.pin(target)
        elif what == "unpin" and pinned:
            pinned.remove(target := draw.choice(sorted(pinned)))
            versions.store.pin(target, False)
        elif what == "image":
            versions.keep_image(head, made[head])
        elif what == "tidy":
            gone = tidy(versions, keep)
            assert not {*sorted(made)[-keep:], *pinned, 0} & set(gone)
            for version in gone:
                with pytest.raises(VersionError, match=f"version {version} was pruned"):
                    versions.content(version)
        readable(versions, made)
    assert {*sorted(made)[-keep:], *pinned, 0} <= set(left(versions)) <= made.keys()
