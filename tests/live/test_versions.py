"""Versions on disk: what is read back is what was written, from whatever is nearest; what is not whole does not exist."""

import json
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny, on_arena
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
    teach,
)

from insitu.live import difference_file
from insitu.live.checkpoint import VersionError, checkpoint_files, read
from insitu.live.store import Store
from insitu.live.versions import Versions


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def versions(tmp_path: Path, base: Path) -> Iterator[Versions]:
    versions = open_versions(tmp_path, base)
    yield versions
    versions.store.close()


def some(versions: Versions, count: int, *, dtype: torch.dtype = torch.bfloat16) -> list[Tensors]:
    """Versions 0 to ``count``, each a lesson away from the one before."""
    made = [base_tensors(versions, dtype)]
    for seed in range(1, count + 1):
        made.append(nudged(made[-1], seed))
        assert teach(versions, made[-1]) == seed
        versions.keep_image(seed, made[-1])  # so that the next one is quick to write
    for image in versions.directory.glob("undo-*"):
        image.unlink()
    return made


# -- reading back ------------------------------------------------------------------------------------------------------
def test_what_is_read_back_is_bit_for_bit_what_was_written(versions: Versions) -> None:
    one = random_bits(base_tensors(versions), 1)
    two = random_bits(one, 2)
    assert (teach(versions, one), teach(versions, two)) == (1, 2)
    for replay in (False, True):
        assert back(versions, 1, replay=replay) == raw(one)
        assert back(versions, 2, replay=replay) == raw(two) != raw(one)
        assert back(versions, 0, replay=replay) == raw(base_tensors(versions))
    assert names(versions) == ["v1.difference", "v2.difference"]


def test_the_views_of_an_arena_are_written_as_they_lie_there(versions: Versions, base: Path) -> None:
    arena, _ = on_arena(base)
    for view in arena.views().values():
        view.view(torch.int16).random_(-(2**15), 2**15)
    version = teach(versions, arena.views())
    assert back(versions, version) == raw(arena.views())
    recorded = versions.store.version(version)
    assert recorded is not None
    assert recorded.sha256 == arena.sha256()  # which is how the learner sums
    arena.close()


def test_version_0_is_the_base_checkpoint(versions: Versions, base: Path) -> None:
    assert back(versions, 0) == raw(load_file(base / "model.safetensors"))
    assert names(versions) == []


def test_50_versions_replay_to_the_bit_exact_head(versions: Versions) -> None:
    made = some(versions, 50)
    assert back(versions, 50, replay=True) == back(versions, 50) == raw(made[50])
    assert back(versions, 25, replay=True) == raw(made[25])
    recorded = versions.store.version(50)
    assert recorded is not None
    assert recorded.sha256 == digest(dict(versions.iter_version(50, replay=True)))


def test_a_chain_may_be_longer_than_a_process_may_have_files_open(versions: Versions) -> None:
    made = some(versions, 25)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, hard))
    try:
        assert back(versions, 25, replay=True) == raw(made[25])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_rollback_repeats_its_targets_bytes_through_chains_and_needs_no_file(versions: Versions) -> None:
    made = some(versions, 1)
    to_base = roll_back(versions, 0)
    again = roll_back(versions, to_base)
    there = roll_back(versions, 1)
    there_again = roll_back(versions, there)
    assert [versions.content(v) for v in (0, 1, to_base, again, there, there_again)] == [0, 1, 0, 0, 1, 1]
    assert back(versions, again) == raw(made[0])
    assert back(versions, there_again) == raw(made[1])
    assert names(versions) == ["v1.difference"]
    onward = nudged(made[1], 9)  # a lesson on a rollback is a difference to what that repeats
    assert back(versions, teach(versions, onward), replay=True) == raw(onward)


def test_a_version_that_was_not_committed_is_refused_with_those_that_were(versions: Versions) -> None:
    made = some(versions, 1)
    reserved = versions.store.reserve("teach", 1)
    versions.write(reserved, made[1])  # its file is there
    for unknown in (reserved, 99, -1):
        with pytest.raises(VersionError, match=rf"version {unknown} does not exist.*\[0, 1\]"):
            next(versions.iter_version(unknown))
    versions.store.abandon(reserved, "refused", "for the test", {})
    with pytest.raises(VersionError, match="version 2 does not exist"):
        next(versions.iter_version(reserved))


def test_a_base_of_another_dtype_than_what_is_served_and_with_a_tied_tensors_other_name(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "wide", dtype=torch.float32)
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    arena, _ = on_arena(base)
    versions = Versions(tmp_path, base, Store(tmp_path / "insitu.db"))
    aliases = {"lm_head.weight": "model.embed_tokens.weight"}
    versions.bring_up(arena, aliases)
    made = {name: view.clone() for name, view in arena.views().items()}
    for seed in (1, 2):
        made = nudged(made, seed)
        teach(versions, made)
    assert back(versions, 2, replay=True) == back(versions, 2) == raw(made)
    assert {tensor.dtype for tensor in dict(versions.iter_version(0)).values()} == {torch.float32}
    for version, expected in ((2, digest(made)), (0, versions.store.version(0).sha256)):  # type: ignore[union-attr]
        versions.restore(version, arena, aliases)
        assert arena.sha256() == expected
    versions.store.close()
    arena.close()


def test_a_model_served_in_fp32_has_differences_too(tmp_path: Path, base: Path) -> None:
    versions = open_versions(tmp_path, base, torch.float32)
    made = some(versions, 3, dtype=torch.float32)
    assert [back(versions, v, replay=True) for v in (1, 2, 3)] == [raw(tensors) for tensors in made[1:]]
    versions.store.close()


# -- files that are not what was written -------------------------------------------------------------------------------
def test_a_missing_file_is_named_with_the_way_out(versions: Versions) -> None:
    some(versions, 1)
    version = roll_back(versions, 1)
    versions.path(1).unlink()
    with pytest.raises(
        VersionError, match=r"version 2 cannot be rebuilt: .*v1\.difference cannot be read.*or roll back"
    ):
        next(versions.iter_version(version))


def test_a_damaged_file_is_named_and_yields_nothing(versions: Versions) -> None:
    made = some(versions, 2)
    whole = versions.path(1).read_bytes()
    draw = random.Random(0)
    flips = [(at, 1 << draw.randrange(8)) for at in draw.sample(range(len(whole)), 50)]
    damaged = [bytes([*whole[:at], whole[at] ^ flip, *whole[at + 1 :]]) for at, flip in flips]
    damaged += [whole[:at] for at in (0, 1, 8, len(whole) // 2, len(whole) - 1)]
    for content in [*damaged, versions.path(2).read_bytes()]:  # the last one is whole, and another version's
        versions.path(1).write_bytes(content)
        for version in (1, 2):
            with pytest.raises(VersionError, match=rf"version {version} cannot be rebuilt: .*versions/v1\.difference"):
                next(versions.iter_version(version))
    versions.path(1).write_bytes(whole)
    assert back(versions, 2) == raw(made[2])


def test_a_full_version_that_lacks_a_tensor_is_named(versions: Versions) -> None:
    made = some(versions, 2)
    versions.keep_image(1, {name: tensor for name, tensor in made[1].items() if name != "model.norm.weight"})
    with pytest.raises(VersionError, match=r"version 1, from which it is rebuilt, lacks 'model\.norm\.weight'"):
        dict(versions.iter_version(2))
    assert back(versions, 2, replay=True) == raw(made[2])


def test_a_base_checkpoint_that_is_gone_or_cut_short_is_named(tmp_path: Path, versions: Versions) -> None:
    versions.base = make_tiny(tmp_path / "copy")
    file = versions.base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(VersionError, match=r"copy/model\.safetensors cannot be read"):
        next(versions.iter_version(0))
    file.unlink()
    with pytest.raises(VersionError, match=r"copy holds no model\.safetensors"):
        next(versions.iter_version(0))


def test_another_base_is_noticed_by_whatever_is_rebuilt_from_it(tmp_path: Path, versions: Versions) -> None:
    some(versions, 1)
    versions.base = make_tiny(tmp_path / "other", seed=1)
    with pytest.raises(
        VersionError, match=r"version 1 cannot be rebuilt.*is not the tensor that this difference starts"
    ):
        next(versions.iter_version(1))


def test_a_sharded_checkpoint_is_read_in_the_order_of_names_and_a_missing_shard_is_named(
    tmp_path: Path, versions: Versions, base: Path
) -> None:
    whole = load_file(base / "model.safetensors")
    odd, even = dict(list(whole.items())[::2]), dict(list(whole.items())[1::2])
    save_file(odd, tmp_path / "a.safetensors")
    save_file(even, tmp_path / "b.safetensors")
    weight_map = dict.fromkeys(odd, "a.safetensors") | dict.fromkeys(even, "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert checkpoint_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    found = dict(read(checkpoint_files(tmp_path)))
    assert list(found) == sorted(whole)
    assert raw(found) == raw(whole)
    versions.base = tmp_path
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(VersionError, match=r"b\.safetensors cannot be read"):
        dict(versions.iter_version(0))
    for nonsense in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(nonsense)
        with pytest.raises(VersionError, match=r"index\.json cannot be read.*expected an object with a weight_map"):
            next(versions.iter_version(0))


def test_the_difference_of_a_version_that_differs_in_nothing_is_read_back(versions: Versions) -> None:
    same = base_tensors(versions)
    assert back(versions, teach(versions, same)) == raw(same)
    assert difference_file.DifferenceFile(versions.path(1)).entries.keys() == same.keys()
