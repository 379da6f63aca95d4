"""A whole learner proves a whole engine or says why not; a proof that is broken off leaves a trial, which repair undoes."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny, on_arena

from insitu.live.attachment import Attachment
from insitu.live.config import TeachConfig
from insitu.live.control import ControlServer, EngineClient
from insitu.live.engines.embedded import EmbeddedEngine
from insitu.live.learner import Learner
from insitu.live.lease import Lease
from insitu.live.proof import probe
from insitu.live.repair import repair
from insitu.live.store import Store
from insitu.live.versions import Versions
from insitu.live.weights.arena import Arena
from insitu.live.weights.attach import AttachError

ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


class World:
    """A real engine, a real line and real versions; the learner is made by the test, in this process."""

    def __init__(self, tiny: Path, state_dir: Path, *, private: bool = False) -> None:
        state_dir.mkdir(mode=0o700)
        self.tiny, self.state_dir = tiny, state_dir
        self.arena, self.model = on_arena(tiny)
        other, copied = on_arena(tiny)  # the same weights in other memory
        other.close()
        self.store = Store(state_dir / "insitu.db")
        self.versions = Versions(state_dir, tiny, self.store)
        self.versions.bring_up(self.arena, ALIASES, "tiny")
        self.engine = EmbeddedEngine(
            copied if private else self.model, model_name="tiny", context_length=256, eos_token_ids=(2,)
        )
        self.gone = threading.Event()
        self.control = ControlServer(
            self.engine, self.arena, state_dir / "run" / "engine.sock", self._repair, proven=False
        )
        self.engine.start()
        self.control.start()
        self.client: EngineClient | None = None

    def _repair(self, paused: bool) -> None:
        self.repair(paused)
        self.gone.set()

    def repair(self, paused: bool) -> None:
        repair(self.engine, self.arena.header, 0, lambda: self.versions.restore(0, self.arena, ALIASES), paused)

    def learner(self) -> Learner:
        self.client = EngineClient(self.state_dir / "run" / "engine.sock")
        return Learner(self.client, self.store, self.tiny, self.state_dir, TeachConfig())

    def hang_up(self) -> None:
        assert self.client is not None
        self.client.close()
        self.client = None
        assert self.gone.wait(20)

    def close(self) -> None:
        self.control.close()
        self.control._thread.join(20)
        if self.client is not None:
            self.client.close()
        self.engine.close()
        self.store.close()
        self.arena.close()


@pytest.fixture
def make(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    monkeypatch.setattr(Lease, "outlive", lambda self: None)  # the learner is this process
    worlds: list[World] = []

    def make(**options: Any) -> World:
        worlds.append(World(tiny, tmp_path / f"state{len(worlds)}", **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


# -- the whole chain ---------------------------------------------------------------------------------------------------
def test_a_learner_proves_an_engine_that_reads_the_arena_and_changes_nothing(make: Callable[..., World]) -> None:
    world = make()
    before, header = world.arena.sha256(), world.arena.header
    assert not world.control.proven
    world.learner()
    assert (world.control.proven, world.control.learner_ready, world.control.refusal) == (True, True, None)
    assert (world.arena.sha256(), world.arena.header) == (before, header)
    assert (world.engine.version, world.control.paused) == ("0", False)


def test_a_learner_refuses_an_engine_that_reads_a_copy_and_the_server_knows_why(make: Callable[..., World]) -> None:
    world = make(private=True)
    before, header = world.arena.sha256(), world.arena.header
    with pytest.raises(AttachError, match=rf"one element of '{NORM}'.*private copy"):
        world.learner()
    assert (world.control.proven, world.control.learner_ready) == (False, False)
    assert world.control.refusal is not None
    assert "private copy" in world.control.refusal
    assert (world.arena.sha256(), world.arena.header) == (before, header)
    world.hang_up()
    assert "private copy" in world.control.refusal  # for whoever asks later


def test_a_learner_refuses_weights_that_are_not_the_version_before_it_writes_any(make: Callable[..., World]) -> None:
    world = make()
    views = world.arena.views()
    k, v = (views[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "kv")
    kept = k.clone()
    k.copy_(v)
    v.copy_(kept)
    header = world.arena.header
    with pytest.raises(AttachError, match="not version 0"):
        world.learner()
    assert world.control.refusal is not None
    assert "not version 0" in world.control.refusal
    assert not world.control.proven
    assert world.arena.header == header


def test_bytes_that_agree_in_sum_but_not_with_the_versions_file_are_refused_by_name(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sum cannot see, because it was taken of the same wrong layout: names exchanged from the start."""
    world = make()
    k, v = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "kv")
    tensors = dict(world.versions.iter_version(0))
    tensors[k], tensors[v] = tensors[v], tensors[k]
    monkeypatch.setattr(Versions, "iter_version", lambda self, version: iter(tensors.items()))
    with pytest.raises(AttachError, match=rf"'{k}' in the arena is not what the version holds"):
        world.learner()
    assert k in str(world.control.refusal)


def test_a_proven_server_is_not_asked_again(make: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    world.learner()
    world.hang_up()
    monkeypatch.setattr(Attachment, "_prove", lambda self: pytest.fail("asked again"))
    world.learner()
    assert world.control.learner_ready


# -- broken off --------------------------------------------------------------------------------------------------------
class BrokenOffError(Exception):
    pass


@pytest.mark.parametrize("at", ["inside the write", "before it is shown", "when it is asked"])
def test_a_proof_that_is_broken_off_leaves_a_trial_and_repair_restores_the_version(
    make: Callable[..., World], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make()
    ids = [5, 6, 7, 8]
    before, told = world.arena.sha256(), [token.logprob for token in world.engine.score(ids)]
    element = world.arena.views()[NORM]
    asked = 0
    paused = False

    def pause() -> None:
        nonlocal paused
        world.engine.pause()
        paused = True

    def expose() -> None:
        nonlocal paused
        if at == "before it is shown":
            raise BrokenOffError
        world.engine.publish(world.arena.header.label)
        world.engine.resume()
        paused = False

    def score() -> list[float]:
        nonlocal asked
        asked += 1
        if asked == 2 and at == "when it is asked":
            raise BrokenOffError
        return [token.logprob for token in world.engine.score(ids)]

    def broken(arena: Arena, version: int, step: int = 0) -> None:
        raise BrokenOffError

    with monkeypatch.context() as patched:
        if at == "inside the write":
            patched.setattr(Arena, "stamp", broken)
        with pytest.raises(BrokenOffError):
            probe(world.arena, NORM, score, expose, pause)
    assert float(element[0]) < -8
    assert world.arena.sha256() != before
    header = world.arena.header
    assert (header.version, bool(header.writer), header.step) == (0, at == "inside the write", at != "inside the write")

    world.repair(paused)
    assert world.arena.sha256() == before
    assert (world.arena.header.label, world.arena.header.writer, world.engine.version) == ("0", 0, "0")
    assert [token.logprob for token in world.engine.score(ids)] == told
    torch.testing.assert_close(element[0], torch.tensor(1.0, dtype=element.dtype))
