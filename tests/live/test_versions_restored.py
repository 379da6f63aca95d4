"""The nearest full version is where a version is rebuilt from, and an undo image that is not what it says is noticed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_tiny, on_arena
from versioned import Tensors, back, base_tensors, digest, names, nudged, open_versions, raw, roll_back, teach

from insitu.live.checkpoint import VersionError, write_checkpoint
from insitu.live.records import Version
from insitu.live.routes import History, Route
from insitu.live.weights.arena import Arena


class World:
    """Versions 1 to 4, and an arena that holds the last of them."""

    def __init__(self, state_dir: Path, base: Path) -> None:
        self.versions = open_versions(state_dir, base)
        self.arena: Arena = on_arena(base)[0]
        self.made: list[Tensors] = [base_tensors(self.versions)]
        for seed in range(1, 5):
            self.made.append(nudged(self.made[-1], seed))
            teach(self.versions, self.made[-1])
            self.image(seed)
        self.arena.stamp(0)

    def image(self, version: int) -> Path:
        self.versions.keep_image(version, self.made[version])
        return self.versions.directory / f"undo-v{version}.safetensors"

    def checkpoint(self, version: int) -> None:
        self.versions.keep_image(0, {})
        tensors = self.made[version].items()
        write_checkpoint(self.versions.checkpoint(version), self.versions.base, tensors, {})

    def route(self, version: int) -> Route:
        history = self.versions.history()
        return history.route(version, history.ways(self.versions.full()))

    def restores(self, version: int) -> bool:
        self.versions.restore(version, self.arena, {})
        assert (self.arena.header.label, self.arena.header.writer) == (str(version), 0)
        return self.arena.sha256() == digest(self.made[version])


@pytest.fixture
def world(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path, make_tiny(tmp_path_factory.mktemp("base")))
    yield world
    world.versions.store.close()
    world.arena.close()


# -- the nearest -------------------------------------------------------------------------------------------------------
def test_from_the_base_and_the_undo_image_the_way_is_forwards_or_backwards_whichever_is_shorter(world: World) -> None:
    expected = [Route(0), Route(0, ((1, False),)), Route(3, ((3, True),)), Route(3), Route(4)]
    assert [world.route(v) for v in range(5)] == expected
    world.image(3).unlink()
    world.image(4)
    (world.versions.directory / "undo-v3.safetensors").unlink(missing_ok=True)
    # Version 2 is as far from the base as from the image: what is durable comes first.
    assert [world.route(v) for v in (2, 3)] == [Route(0, ((1, False), (2, False))), Route(4, ((4, True),))]
    assert [back(world.versions, v) for v in range(5)] == [raw(tensors) for tensors in world.made]


def test_from_a_checkpoint_too(world: World) -> None:
    world.checkpoint(3)
    assert [world.route(v).start for v in range(5)] == [0, 0, 3, 3, 3]
    assert world.route(2) == Route(3, ((3, True),))
    assert [back(world.versions, v) for v in range(5)] == [raw(tensors) for tensors in world.made]


def test_replay_uses_nothing_but_the_base_and_differences(world: World) -> None:
    world.checkpoint(3)
    world.image(4).write_bytes(b"torn")
    (world.versions.checkpoint(3) / "model.safetensors").write_bytes(b"torn")
    assert back(world.versions, 4, replay=True) == raw(world.made[4])
    with pytest.raises(VersionError, match="cannot be read"):
        dict(world.versions.iter_version(4))


def test_pruned_ones_are_walked_over_where_they_have_not_taken_the_way_with_them(world: World) -> None:
    world.checkpoint(3)
    world.versions.store.prune([1], [])
    world.versions.path(1).unlink()
    assert world.route(2) == Route(3, ((3, True),))
    assert back(world.versions, 2) == raw(world.made[2])
    with pytest.raises(VersionError, match=r"version 1 was pruned to save room, its bytes are gone.*\[0, 2, 3, 4\]"):
        next(world.versions.iter_version(1))
    with pytest.raises(VersionError, match="nothing is left from which version 2 could be rebuilt"):
        next(world.versions.iter_version(2, replay=True))


def test_what_is_left_of_a_pruned_checkpoint_is_no_start(world: World) -> None:
    """A process was killed while it removed the files."""
    world.checkpoint(1)
    (world.versions.checkpoint(1) / "model.safetensors").unlink()
    with pytest.raises(VersionError, match=r"checkpoint-v1 holds no model\.safetensors"):
        world.route(4)
    world.versions.store.prune([1], [])
    world.image(4)
    assert world.route(4) == Route(4)
    assert [file.name for file in world.versions.discard_uncommitted()].count("checkpoint-v1") == 1


def test_a_rollback_to_a_pruned_version_is_not_among_those_left(world: World) -> None:
    rollback = roll_back(world.versions, 1)
    roll_back(world.versions, 4)
    world.versions.store.prune([1], [])
    with pytest.raises(VersionError, match=rf"version {rollback} was pruned .*left: \[0, 2, 3, 4, 6\]"):
        world.versions.content(rollback)


def version(id: int, parent: int | None, target: int | None = None) -> Version:
    kind = "base" if parent is None else "teach" if target is None else "rollback"
    return Version(id, kind, "committed", parent, target, 0.0, None, {}, None, False, False)  # type: ignore[arg-type]


def test_a_history_may_be_longer_than_pythons_stack() -> None:
    rollbacks = History([version(0, None), *(version(i, i - 1, i - 1) for i in range(1, 20_001))])
    assert rollbacks.content(20_000) == 0
    lessons = History([version(0, None), *(version(i, i - 1) for i in range(1, 20_001))])
    route = lessons.route(20_000, lessons.ways([0]))
    assert route == Route(0, tuple((i, False) for i in range(1, 20_001)))


def test_a_version_that_was_pruned_breaks_the_way_to_its_own_parent_only() -> None:
    line = [version(0, None), version(1, 0), version(2, 1), version(3, 2), version(4, 2)]
    line[2] = replace(line[2], pruned=True)
    history = History(line)
    assert history.route(4, history.ways([3])) == Route(3, ((3, True), (4, False)))
    with pytest.raises(VersionError, match="nothing is left from which version 1"):
        history.route(1, history.ways([3]))


# -- an undo image that is not what it says ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "damage",
    [
        lambda image: image.write_bytes(b"\0" * image.stat().st_size),
        lambda image: image.write_bytes(image.read_bytes()[:-100]),
        lambda image: image.write_bytes(image.read_bytes()[:-9] + b"\x01" * 9),
    ],
    ids=["zeros", "cut", "other bytes"],
)
def test_a_torn_image_is_noticed_and_the_durable_files_are_used(
    world: World, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    for version in (4, 3):
        damage(world.image(4))
        assert world.restores(version)
        assert "trying again without the undo image" in caplog.text
        assert names(world.versions) == [f"v{v}.difference" for v in range(1, 5)]


def test_a_stale_image_is_noticed(world: World) -> None:
    world.image(4).write_bytes(world.image(3).read_bytes())
    assert world.restores(4)


def test_a_torn_image_never_becomes_what_a_version_is_a_difference_to(world: World) -> None:
    """Else the version could be rebuilt from nothing, ever, once the image is gone."""
    image = world.image(4)
    image.write_bytes(image.read_bytes()[:-9] + b"\x01" * 9)
    tensors = nudged(world.made[4], 5)
    assert teach(world.versions, tensors) == 5
    assert back(world.versions, 5, replay=True) == raw(tensors)


def test_where_the_durable_files_are_damaged_too_nothing_is_restored_and_the_header_says_so(world: World) -> None:
    world.image(4).write_bytes(b"torn")
    world.versions.path(2).write_bytes(b"torn")
    with pytest.raises(VersionError, match=r"version 4 cannot be rebuilt: .*v2\.difference is damaged"):
        world.versions.restore(4, world.arena, {})
    assert world.arena.header.writer


def test_with_a_damaged_parent_no_version_is_written(world: World) -> None:
    world.checkpoint(4)
    file = world.versions.checkpoint(4) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9] + b"\x01" * 9)
    version = world.versions.store.reserve("teach", 4)
    with pytest.raises(
        VersionError, match="the files of version 4 do not hold the bytes that were committed; put the right"
    ):
        world.versions.write(version, world.made[4])
    assert not any(name.startswith("v5") for name in names(world.versions))
    with pytest.raises(VersionError, match="the files of version 4 do not hold"):
        world.versions.restore(4, world.arena, {})


def test_the_images_are_of_the_head_and_the_one_before_and_none_where_there_is_a_checkpoint(world: World) -> None:
    assert "undo-v4.safetensors" in names(world.versions)
    rollback = roll_back(world.versions, 2)
    world.versions.keep_image(rollback, world.made[2])
    assert [name for name in names(world.versions) if "undo" in name] == ["undo-v2.safetensors", "undo-v4.safetensors"]
    assert world.route(rollback) == Route(2)
    world.checkpoint(4)
    world.versions.keep_image(4, world.made[4])
    assert not any("undo" in name for name in names(world.versions))


def test_an_image_that_cannot_be_written_leaves_the_older_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    rollback = roll_back(world.versions, 2)
    before = names(world.versions)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            world.versions.keep_image(rollback, world.made[2])
    assert names(world.versions) == before
    assert torch.equal(dict(world.versions.iter_version(4))["model.norm.weight"], world.made[4]["model.norm.weight"])


# -- a version that is far away ----------------------------------------------------------------------------------------
def test_what_was_brought_near_is_restored_as_a_copy_and_goes_with_the_next_head(world: World) -> None:
    assert world.route(2) != Route(2)
    world.versions.bring_near(2)
    assert world.route(2) == Route(2)
    assert world.restores(2)
    rollback = roll_back(world.versions, 1)
    world.versions.keep_image(rollback, world.made[1])
    assert [name for name in names(world.versions) if "undo" in name] == ["undo-v1.safetensors", "undo-v4.safetensors"]


def test_what_is_there_in_full_or_repeats_what_is_needs_no_image(world: World) -> None:
    before = names(world.versions)
    for version in (0, 4, roll_back(world.versions, 4)):
        world.versions.bring_near(version)
    assert names(world.versions) == before


def test_a_torn_image_on_the_way_is_noticed_and_the_way_round_it_taken(world: World) -> None:
    world.image(4).write_bytes(b"torn")
    world.versions.bring_near(2)
    assert world.route(2) == Route(2)
    assert world.restores(2)


def test_a_version_that_cannot_be_rebuilt_is_refused_before_anybody_waits(world: World) -> None:
    for version in (2, 3):
        world.versions.path(version).write_bytes(b"torn")
    with pytest.raises(VersionError, match=r"version 2 cannot be rebuilt: .*v\d\.difference is damaged"):
        world.versions.bring_near(2)
    assert not world.arena.header.writer
