"""Frozen canaries: what the file keeps, what becomes of a broken one, and since which version each speaks."""

import logging
import resource
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import frozen, make_tiny, on_arena

from insitu.data.batch import collate
from insitu.data.chat import Example
from insitu.data.loss import target_distributions
from insitu.live import canaries
from insitu.live.canaries import CanaryFileError, Frozen
from insitu.live.store import Store

VOCABULARY = 240
SAID = [Example([3 + (5 * i + k) % 200 for i in range(8 + k)], [False] * 4 + [True] * (4 + k)) for k in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    arena, made = on_arena(make_tiny(tmp_path_factory.mktemp("tiny")))
    yield made
    arena.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / canaries.FILE


def same(one: Frozen, other: Frozen) -> bool:
    fields = ("name", "prompt", "version", "example")
    return all(getattr(one, f) == getattr(other, f) for f in fields) and torch.equal(one.logprobs, other.logprobs)


class Freezer:
    """Freezes whatever it is asked for, at ``version``, and notes it."""

    def __init__(self, model: Any) -> None:
        self.model, self.version = model, 0
        self.asked: list[list[str]] = []

    def __call__(self, missing: Mapping[str, str]) -> list[Frozen]:
        self.asked.append(list(missing.values()))
        said = [SAID[i % 3] for i, _ in enumerate(missing)]
        return canaries.freeze(self.model, missing, said, self.version, 0)

    def keep(self, path: Path, *prompts: str, **named: str) -> list[Frozen]:
        wanted = {f"builtin-{i}": prompt for i, prompt in enumerate(prompts)} | named
        return canaries.keep(path, wanted, self, version=self.version, vocabulary=VOCABULARY)


# -- the file ----------------------------------------------------------------------------------------------------------
def test_what_is_read_back_is_what_was_frozen(model: Any, path: Path) -> None:
    made = [replace(c, version=i, prompt=f"π {i} 😀\n") for i, c in enumerate(frozen(model, SAID))]
    canaries.save(path, made)
    again = canaries.load(path, VOCABULARY)
    assert [same(a, b) for a, b in zip(made, again, strict=True)] == [True] * 3
    assert [list(c.logprobs.shape) for c in again] == [[4, VOCABULARY], [5, VOCABULARY], [6, VOCABULARY]]
    assert {c.logprobs.dtype for c in again} == {torch.float16}
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_size < 2 * VOCABULARY * 15 + 4096


def test_half_precision_loses_nothing_that_matters(model: Any) -> None:
    exact, _ = target_distributions(model, collate(SAID[:1], 0))
    kept = frozen(model, SAID)[0].logprobs.float()
    assert (exact - kept).abs().max() < 0.02
    assert float((exact.exp() * (exact - kept)).sum(-1).abs().max()) < 1e-3
    impossible = canaries.half(torch.tensor([[0.0, -torch.inf, -1e6]]))
    assert bool(impossible.isfinite().all())


def test_each_is_frozen_as_if_it_were_alone(model: Any) -> None:
    together, alone = frozen(model, SAID)[1], frozen(model, SAID[1:2])[0]
    assert torch.equal(together.logprobs, alone.logprobs)


@pytest.mark.parametrize("at", ["first byte", "header", "middle", "last byte"])
def test_one_changed_bit_is_found(model: Any, path: Path, at: str) -> None:
    canaries.save(path, frozen(model, SAID))
    content = bytearray(path.read_bytes())
    places = {"first byte": 0, "header": content.index(b"prompt 1"), "middle": len(content) // 2, "last byte": -1}
    content[places[at]] ^= 1
    path.write_bytes(content)
    with pytest.raises(CanaryFileError, match=str(path)):
        canaries.load(path, VOCABULARY)


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_file_that_is_something_else_is_refused(model: Any, path: Path, content: bytes | None) -> None:
    canaries.save(path, frozen(model, SAID))
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CanaryFileError, match="cannot be read"):
        canaries.load(path, VOCABULARY)


def test_a_file_of_another_vocabulary_is_refused(model: Any, path: Path) -> None:
    canaries.save(path, frozen(model, SAID))
    with pytest.raises(CanaryFileError, match="another model"):
        canaries.load(path, VOCABULARY + 1)


def test_no_room_on_the_disk_leaves_the_old_file(model: Any, path: Path) -> None:
    canaries.save(path, frozen(model, SAID[:1]))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written|too large"):
            canaries.save(path, frozen(model, SAID))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# -- since when --------------------------------------------------------------------------------------------------------
def test_the_origin_stays_while_the_version_moves_on(model: Any, path: Path) -> None:
    freezer = Freezer(model)
    first = freezer.keep(path, "one", "two")
    freezer.version = 7
    again = freezer.keep(path, "one", "two")
    assert freezer.asked == [["one", "two"]]
    assert [c.version for c in again] == [0, 0]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_one_added_later_is_frozen_at_the_version_then_served(model: Any, path: Path) -> None:
    freezer = Freezer(model)
    freezer.keep(path, "one")
    freezer.version = 7
    found = freezer.keep(path, "one", **{"canary-1": "mine"})
    assert freezer.asked == [["one"], ["mine"]]
    assert [(c.name, c.prompt, c.version) for c in found] == [("builtin-0", "one", 0), ("canary-1", "mine", 7)]
    assert [c.version for c in canaries.load(path, VOCABULARY)] == [0, 7]


def test_one_that_was_removed_is_dropped_and_frozen_anew_if_it_comes_back(model: Any, path: Path) -> None:
    freezer = Freezer(model)
    freezer.keep(path, "one", **{"canary-1": "mine"})
    freezer.keep(path, "one")
    assert [c.prompt for c in canaries.load(path, VOCABULARY)] == ["one"]
    freezer.version = 3
    assert [c.version for c in freezer.keep(path, "one", **{"canary-2": "mine"})] == [0, 3]


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_file_that_is_lost_is_frozen_anew_and_the_log_says_so(
    model: Any, path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    freezer = Freezer(model)
    freezer.keep(path, "one", "two")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    freezer.version = 5
    with caplog.at_level(logging.WARNING):
        found = freezer.keep(path, "one", "two")
    assert [c.version for c in found] == [5, 5]
    assert "the drift is measured from version 5 on" in caplog.text
    assert [c.version for c in canaries.load(path, VOCABULARY)] == [5, 5]


def test_a_new_state_directory_is_no_reason_to_warn(model: Any, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Freezer(model).keep(path, "one")
    assert caplog.text == ""


# -- what users add, in the store --------------------------------------------------------------------------------------
@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "insitu.db")
    yield made
    made.close()


def test_canaries_are_kept_in_order_and_once(store: Store, tmp_path: Path) -> None:
    one, is_new = store.add_canary("one?")
    assert (one.prompt, one.name, is_new) == ("one?", "canary-1", True)
    store.add_canary("two?")
    assert store.add_canary("one?") == (one, False)
    other = Store(tmp_path / "insitu.db")
    assert [c.prompt for c in other.canaries()] == ["one?", "two?"]
    other.close()


def test_an_id_is_not_used_again(store: Store) -> None:
    one = store.add_canary("one?")[0]
    assert store.remove_canary(one.id) is True
    assert store.remove_canary(one.id) is False
    again = store.add_canary("one?")[0]
    assert again.id > one.id
    assert [c.id for c in store.canaries()] == [again.id]
