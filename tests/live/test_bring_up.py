"""A new arena becomes the last committed version of its state directory, or there is no server."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny, on_arena

from insitu.live.checkpoint import VersionError, write_checkpoint
from insitu.live.store import Store
from insitu.live.versions import Versions
from insitu.live.weights.arena import DTYPES, Arena, plan

ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}
K, V = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "kv")


class Life:
    """One start of a server: the base checkpoint is in a new arena, and the state directory is opened."""

    def __init__(self, base: Path, state_dir: Path) -> None:
        self.arena, _ = on_arena(base)
        self.store = Store(state_dir / "insitu.db")
        self.versions = Versions(state_dir, base, self.store)

    def bring_up(self, source: str = "tiny") -> Arena:
        self.versions.bring_up(self.arena, ALIASES, source)
        return self.arena

    def teach(self, factor: float) -> str:
        """Commit a version, and return the sum of its bytes."""
        version = self.store.reserve("teach", self.store.head())
        self.arena.views()[K].mul_(factor)
        file = self.versions.write(version, self.arena.views())
        self.store.commit(version, self.arena.sha256(), {}, file)
        return self.arena.sha256()

    def roll_back(self, target: int) -> None:
        content = self.store.version(target)
        assert content is not None
        self.store.commit(self.store.reserve("rollback", self.store.head(), target=target), str(content.sha256), {})

    def close(self) -> None:
        self.store.close()
        self.arena.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "base")


@pytest.fixture
def start(tmp_path: Path, base: Path) -> Iterator[Callable[..., Life]]:
    (tmp_path / "state").mkdir(mode=0o700)
    lives: list[Life] = []

    def start(directory: Path = base) -> Life:
        lives.append(Life(directory, tmp_path / "state"))
        return lives[-1]

    yield start
    for life in lives:
        life.close()


def test_in_a_new_directory_the_checkpoint_becomes_version_0(start: Callable[..., Life], base: Path) -> None:
    life = start()
    loaded = life.arena.sha256()
    assert life.store.head() is None
    arena = life.bring_up("where it came from")
    version = life.store.version(0)
    assert version is not None
    assert (version.kind, version.status, version.parent) == ("base", "committed", None)
    assert (version.sha256, version.report) == (loaded, {"source": "where it came from"})
    assert life.store.get_meta("base") == str(base)
    assert (arena.sha256(), arena.header.label, arena.header.writer) == (loaded, "0", 0)
    assert list(life.versions.directory.iterdir()) == []  # the checkpoint is its file


def test_a_first_start_that_died_before_its_commit_is_no_obstacle(start: Callable[..., Life]) -> None:
    first = start()
    first.store.reserve("base", None)
    life = start()
    life.bring_up()
    assert life.store.head() == 0
    assert [v.status for v in life.store.versions()] == ["committed"]


def test_the_next_start_finds_version_0_and_writes_no_weight(
    start: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start().bring_up()
    life = start()
    monkeypatch.setattr(life.versions, "restore", lambda *_: pytest.fail("restored what was just loaded"))
    before = os.pread(life.arena.fd, life.arena.num_bytes, 0)[4096:]
    life.bring_up("another word for it")
    assert os.pread(life.arena.fd, life.arena.num_bytes, 0)[4096:] == before
    assert life.arena.sha256() == first.sha256()
    assert [v.report for v in life.store.versions()] == [{"source": "tiny"}]


def test_the_last_committed_version_is_put_into_the_arena(start: Callable[..., Life]) -> None:
    first = start()
    base_sum = first.bring_up().sha256()
    one, two = first.teach(2.0), first.teach(0.5)
    three = first.teach(3.0)
    assert two == base_sum  # doubled and halved: the same bytes, and still another version
    assert len({one, two, three}) == 3
    life = start()
    assert life.arena.sha256() == base_sum
    life.bring_up()
    assert (life.arena.sha256(), life.arena.header.label, life.arena.header.writer) == (three, "3", 0)


@pytest.mark.parametrize("target", [0, 1])
def test_a_rollback_at_the_head_serves_its_targets_bytes_under_its_own_number(
    start: Callable[..., Life], target: int
) -> None:
    first = start()
    sums = [first.bring_up().sha256(), first.teach(2.0), first.teach(3.0)]
    first.roll_back(target)
    first.roll_back(3)  # a rollback to a rollback
    arena = start().bring_up()
    assert (arena.sha256(), arena.header.label) == (sums[target], "4")


def test_another_checkpoint_is_refused_with_the_way_out_and_changes_nothing(
    start: Callable[..., Life], tmp_path: Path, base: Path
) -> None:
    start().bring_up()
    other = make_tiny(tmp_path / "other", seed=1)
    life = start(other)
    with pytest.raises(
        VersionError, match=rf"belongs to another model \({base}\), or .*--dtype.*--state-dir for {other}"
    ):
        life.bring_up()
    assert life.store.get_meta("base") == str(base)
    assert [v.id for v in life.store.versions()] == [0]
    start().bring_up()  # the right one still starts


def test_a_checkpoint_whose_tensors_changed_places_is_another_one(start: Callable[..., Life], base: Path) -> None:
    start().bring_up()
    tensors = load_file(base / "model.safetensors")
    tensors[K], tensors[V] = tensors[V], tensors[K]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VersionError, match="belongs to another model"):
        start().bring_up()


def test_the_same_checkpoint_may_have_moved(start: Callable[..., Life], tmp_path: Path, base: Path) -> None:
    first = start()
    first.bring_up()
    taught = first.teach(2.0)
    moved = base.rename(tmp_path / "moved")
    life = start(moved)
    assert life.bring_up().sha256() == taught
    assert life.store.get_meta("base") == str(moved)


def test_the_sum_is_that_of_the_tensors_and_not_of_an_engines_layout(start: Callable[..., Life]) -> None:
    """A directory that the embedded engine began may be served by one that lays its parameters out in another order."""
    first = start()
    base_sum = first.bring_up().sha256()
    taught = first.teach(2.0)
    life = start()
    order = sorted(life.arena.slots, key=lambda slot: (slot.num_bytes, slot.name), reverse=True)
    arena = Arena.create(plan((slot.name, DTYPES[slot.dtype], slot.shape) for slot in order))
    for name, view in arena.views().items():
        view.copy_(life.arena.views()[name])
    assert [slot.name for slot in arena.slots] != [slot.name for slot in first.arena.slots]
    assert arena.sha256() == base_sum
    life.versions.bring_up(arena, ALIASES)
    assert (arena.sha256(), arena.header.label) == (taught, "1")
    arena.close()


def test_half_written_files_are_removed_unless_a_learner_may_still_commit_them(
    start: Callable[..., Life], tmp_path: Path
) -> None:
    first = start()
    first.bring_up()
    first.teach(2.0)
    half = first.versions.path(2)
    half.write_bytes(b"half")
    with (tmp_path / "state" / "learner.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start().bring_up()
        assert half.exists()
    assert start().bring_up().header.label == "1"
    assert list(first.versions.directory.iterdir()) == [first.versions.path(1)]


@pytest.mark.parametrize("damage", ["gone", "cut short", "other bytes"])
def test_a_version_whose_file_is_not_what_was_committed_is_refused_and_the_header_says_so(
    start: Callable[..., Life], damage: str
) -> None:
    first = start()
    first.bring_up()
    first.teach(2.0)
    file = first.versions.path(1)
    if damage == "gone":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        other = first.store.reserve("teach", 0)
        first.versions.write(other, {name: torch.zeros_like(view) for name, view in first.arena.views().items()})
        first.versions.path(other).replace(file)
    life = start()
    with pytest.raises(VersionError, match=r"version 1 cannot be rebuilt: .*v1\.difference|version 1 do not hold"):
        life.bring_up()
    assert life.arena.header.writer == os.getpid()


def test_a_learner_that_prunes_meanwhile_is_no_obstacle(
    start: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may outlive its server, and compact while the next one looks for the way to the last version."""
    first = start()
    first.bring_up()
    first.teach(2.0)
    two = first.teach(3.0)
    life = start()
    full = life.versions.full

    def full_and_then_the_learner(**how: bool) -> dict[int, list[Path]]:
        found = full(**how)
        if first.versions.path(1).exists():
            recorded = {"version": 2}
            write_checkpoint(
                first.versions.checkpoint(2), first.versions.base, first.versions.iter_version(2), recorded
            )
            first.store.prune([1], [])
            first.versions.path(1).unlink()
        return found

    monkeypatch.setattr(life.versions, "full", full_and_then_the_learner)
    assert (life.bring_up().sha256(), life.arena.header.label) == (two, "2")
