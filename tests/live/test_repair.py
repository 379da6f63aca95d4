"""What a learner left behind is undone before anybody is answered, and nothing is touched where nothing was left."""

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny, on_arena

from insitu.live.checkpoint import VersionError
from insitu.live.engines.base import Engine, EngineError, EngineInfo, PublishReport, SamplingParams, Token
from insitu.live.repair import repair
from insitu.live.store import Store
from insitu.live.versions import Versions
from insitu.live.weights.arena import Arena

ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}
K = "model.layers.0.self_attn.k_proj.weight"


class FakeEngine(Engine):
    """Notes each command with the bytes and the header that it found; ``fail`` names one that raises."""

    def __init__(self, arena: Arena) -> None:
        self.info = EngineInfo("tiny", 256, ())
        self.arena = arena
        self.calls: list[tuple[Any, ...]] = []
        self.fail = ""

    def _note(self, *what: str) -> None:
        header = self.arena.header
        self.calls.append((*what, self.arena.sha256(), header.label, header.writer != 0))
        if what[0] == self.fail:
            raise EngineError(f"{what[0]} does not work")

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def healthy(self) -> bool:
        return True

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Any:
        raise AssertionError("nobody may be answered")

    def score(self, ids: Sequence[int], top: int = 0) -> list[Token]:
        raise AssertionError("nobody may be answered")

    def pause(self) -> None:
        self._note("pause")

    def publish(self, version: str) -> PublishReport:
        self._note("publish", version)
        return PublishReport(version, 0, 0.0)

    def resume(self) -> None:
        self._note("resume")

    @property
    def version(self) -> str:
        return "0"


class World:
    """Versions 0 and 1, of which 1 is committed last and served."""

    def __init__(self, base: Path, state_dir: Path) -> None:
        self.arena, _ = on_arena(base)
        self.store = Store(state_dir / "insitu.db")
        self.versions = Versions(state_dir, base, self.store)
        self.versions.bring_up(self.arena, ALIASES, "tiny")
        self.base_sum = self.arena.sha256()
        self.teach(1)
        self.good = self.arena.sha256()
        self.engine = FakeEngine(self.arena)

    def teach(self, seed: int) -> None:
        version = self.store.reserve("teach", self.store.head())
        self.spoil(seed)
        file = self.versions.write(version, self.arena.views())
        self.store.commit(version, self.arena.sha256(), {}, file)
        self.arena.stamp(version)

    def spoil(self, seed: int) -> None:
        torch.manual_seed(seed)
        for view in self.arena.views().values():
            view.copy_(torch.randn(view.shape))

    def repair(self, *, paused: bool) -> None:
        head = self.store.head()
        assert head is not None
        restore = functools.partial(self.versions.restore, head, self.arena, ALIASES)
        repair(self.engine, self.arena.header, head, restore, paused)

    @property
    def commands(self) -> list[str]:
        return [str(call[0]) for call in self.engine.calls]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def world(base: Path, tmp_path: Path) -> Iterator[World]:
    world = World(base, tmp_path)
    assert world.good != world.base_sum
    yield world
    world.store.close()
    world.arena.close()


def leave(world: World, what: str) -> None:
    """Put the arena into the state in which a learner died."""
    if what == "a write":
        world.arena.mark_writing()
        world.spoil(2)
    elif what == "a trial":
        world.arena.mark_writing()
        world.spoil(2)
        world.arena.stamp(1, 3)
    elif what == "a write in a trial":
        world.arena.stamp(1, 3)
        world.arena.mark_writing()
        world.spoil(2)
    elif what == "a version never committed":
        world.spoil(2)
        world.arena.stamp(2)
    elif what == "a commit never stamped":
        world.arena.stamp(1, 7)
        world.teach(3)
        world.good = world.arena.sha256()
        world.arena.stamp(1, 7)
    else:
        raise AssertionError(what)


LEFT = ["a write", "a trial", "a write in a trial", "a version never committed", "a commit never stamped"]


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("left", LEFT)
def test_what_was_not_committed_is_undone_inside_a_pause_and_published_before_anyone_goes_on(
    world: World, left: str, paused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    leave(world, left)
    label = world.arena.header.label
    head = world.store.head()
    epoch = world.arena.header.epoch
    with caplog.at_level(logging.WARNING, "insitu.server"):
        world.repair(paused=paused)
    assert world.commands == ["pause", "publish", "resume"][paused:]
    good = (world.good, str(head), False)
    assert world.engine.calls[-2:] == [("publish", str(head), *good), ("resume", *good)]
    assert world.arena.sha256() == world.good == world.store.version(int(head or 0)).sha256  # type: ignore[union-attr]
    assert (world.arena.header.version, world.arena.header.step, world.arena.header.writer) == (head, 0, 0)
    assert world.arena.header.epoch == epoch
    assert f"died in {label}; restoring version {head}" in caplog.text


@pytest.mark.parametrize("paused", [True, False])
def test_where_nothing_was_left_the_weights_are_not_touched(
    world: World, paused: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.versions, "restore", lambda *_: pytest.fail("restored without a reason"))
    before = os.pread(world.arena.fd, world.arena.num_bytes, 0)
    world.repair(paused=paused)
    assert world.commands == (["publish", "resume"] if paused else [])
    assert os.pread(world.arena.fd, world.arena.num_bytes, 0) == before
    assert caplog.text == ""


def test_a_rollback_at_the_head_is_restored_from_the_version_it_repeats(world: World) -> None:
    rollback = world.store.reserve("rollback", 1, target=0)
    world.store.commit(rollback, world.base_sum, {})
    world.spoil(2)
    world.arena.stamp(1, 1)
    world.repair(paused=True)
    assert (world.arena.sha256(), world.arena.header.label) == (world.base_sum, str(rollback))
    assert world.engine.calls[0][:2] == ("publish", str(rollback))


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("damage", ["gone", "cut short", "other bytes"])
def test_where_the_versions_file_cannot_be_read_the_engine_stays_paused(
    world: World, damage: str, paused: bool
) -> None:
    leave(world, "a trial")
    file = world.versions.path(1)
    if damage == "gone":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        other = world.store.reserve("teach", 0)
        world.versions.write(other, world.arena.views())
        world.versions.path(other).replace(file)
    with pytest.raises(VersionError, match=r"version 1 cannot be rebuilt: .*v1\.difference|version 1 do not hold"):
        world.repair(paused=paused)
    assert world.commands == ["pause"][paused:]
    assert world.arena.header.writer, "the header must go on saying that nothing is known of these weights"


@pytest.mark.parametrize(("fail", "commands"), [("pause", ["pause"]), ("publish", ["pause", "publish"])])
def test_what_the_engine_cannot_do_is_raised_and_nobody_goes_on(world: World, fail: str, commands: list[str]) -> None:
    leave(world, "a trial")
    spoiled = world.arena.sha256()
    world.engine.fail = fail
    with pytest.raises(EngineError, match=f"{fail} does not work"):
        world.repair(paused=False)
    assert world.commands == commands
    assert world.arena.sha256() == (spoiled if fail == "pause" else world.good)  # nothing is written without a pause
