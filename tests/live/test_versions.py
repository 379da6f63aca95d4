"""Versions on disk: what is read back is what was written, and what was not written whole does not exist."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny, on_arena

from insitu.live.checkpoint import VersionError, checkpoint_files, read
from insitu.live.store import Store
from insitu.live.versions import Versions

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def versions(tmp_path: Path, base: Path) -> Iterator[Versions]:
    store = Store(tmp_path / "insitu.db")
    store.commit(store.reserve("base", None), "sha", {})
    yield Versions(tmp_path, base, store)
    store.close()


def random_bits(seed: int) -> Tensors:
    """Every bit pattern is a weight: NaNs with a payload, -0.0, denormals."""
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (64, 48), dtype=torch.int16, generator=draw)
    wide = torch.randint(-(2**31), 2**31, (9, 7), dtype=torch.int32, generator=draw)
    return {"half": bits.view(torch.bfloat16), "whole": wide.view(torch.float32), "one": torch.tensor(float(seed))}


def bits(tensors: Tensors) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {n: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}


def teach(versions: Versions, tensors: Tensors) -> int:
    version = versions.store.reserve("teach", versions.store.head())
    versions.write(version, tensors)
    versions.store.commit(version, "sha", {})
    return version


def roll_back(versions: Versions, target: int) -> int:
    version = versions.store.reserve("rollback", versions.store.head(), target)
    versions.store.commit(version, "sha", {})
    return version


def names(versions: Versions) -> list[str]:
    return sorted(file.name for file in versions.directory.iterdir())


# -- reading back ------------------------------------------------------------------------------------------------------
def test_what_is_read_back_is_bit_for_bit_what_was_written(versions: Versions) -> None:
    one, two = random_bits(1), random_bits(2)
    assert (teach(versions, one), teach(versions, two)) == (1, 2)
    assert bits(dict(versions.iter_version(1))) == bits(one)
    assert bits(dict(versions.iter_version(2))) == bits(two) != bits(one)


def test_the_views_of_an_arena_are_written_as_they_lie_there(versions: Versions, base: Path) -> None:
    arena, _ = on_arena(base)
    for view in arena.views().values():
        view.view(torch.int16).random_(-(2**15), 2**15)
    version = teach(versions, arena.views())
    assert bits(dict(versions.iter_version(version))) == bits(arena.views())
    arena.close()


def test_version_0_is_the_base_checkpoint(versions: Versions, base: Path) -> None:
    assert bits(dict(versions.iter_version(0))) == bits(load_file(base / "model.safetensors"))
    assert names(versions) == []


def test_a_rollback_repeats_its_targets_bytes_through_chains_and_needs_no_file(versions: Versions) -> None:
    one = teach(versions, random_bits(1))
    to_base = roll_back(versions, 0)
    again = roll_back(versions, to_base)
    back = roll_back(versions, one)
    back_again = roll_back(versions, back)
    assert [versions.content(v) for v in (0, one, to_base, again, back, back_again)] == [0, 1, 0, 0, 1, 1]
    assert bits(dict(versions.iter_version(again))) == bits(dict(versions.iter_version(0)))
    assert bits(dict(versions.iter_version(back_again))) == bits(random_bits(1))
    assert names(versions) == ["v1.safetensors"]


def test_a_chain_of_rollbacks_may_be_longer_than_pythons_stack(tmp_path: Path, base: Path) -> None:
    found = {
        i: SimpleNamespace(status="committed", target=i - 1 if i else None) for i in range(3 * sys.getrecursionlimit())
    }
    versions = Versions(tmp_path, base, SimpleNamespace(version=found.get))  # type: ignore[arg-type]
    assert versions.content(max(found)) == 0


def test_a_version_that_was_not_committed_is_refused_with_those_that_were(versions: Versions) -> None:
    teach(versions, random_bits(1))
    reserved = versions.store.reserve("teach", 1)
    versions.write(reserved, random_bits(2))  # its file is there
    for unknown in (reserved, 99, -1):
        with pytest.raises(VersionError, match=rf"version {unknown} does not exist.*\[0, 1\]"):
            next(versions.iter_version(unknown))
    versions.store.abandon(reserved, "refused", "for the test", {})
    with pytest.raises(VersionError, match="version 2 does not exist"):
        next(versions.iter_version(reserved))


# -- files that are not what was written -------------------------------------------------------------------------------
def test_a_missing_file_is_named(versions: Versions) -> None:
    version = roll_back(versions, teach(versions, random_bits(1)))
    versions.path(1).unlink()
    with pytest.raises(VersionError, match=r"version 1 is missing.*v1\.safetensors"):
        next(versions.iter_version(version))


def test_a_file_cut_at_any_place_is_named_and_yields_nothing(versions: Versions) -> None:
    teach(versions, random_bits(1))
    whole = versions.path(1).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        versions.path(1).write_bytes(whole[:size])
        with pytest.raises(VersionError, match=r"versions/v1\.safetensors cannot be read"):
            next(versions.iter_version(1))
    versions.path(1).write_bytes(whole)
    assert bits(dict(versions.iter_version(1))) == bits(random_bits(1))


def test_a_file_that_is_no_safetensors_is_named(versions: Versions) -> None:
    teach(versions, random_bits(1))
    for content in (b"\0" * 4096, b"\xff" * 4096, b'{"a": 1}' * 100):
        versions.path(1).write_bytes(content)
        with pytest.raises(VersionError, match=r"versions/v1\.safetensors cannot be read"):
            next(versions.iter_version(1))


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


def test_a_sharded_checkpoint_is_read_shard_by_shard_and_a_missing_shard_is_named(
    tmp_path: Path, versions: Versions, base: Path
) -> None:
    whole = load_file(base / "model.safetensors")
    odd, even = dict(list(whole.items())[::2]), dict(list(whole.items())[1::2])
    save_file(odd, tmp_path / "a.safetensors")
    save_file(even, tmp_path / "b.safetensors")
    weight_map = dict.fromkeys(odd, "a.safetensors") | dict.fromkeys(even, "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert checkpoint_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert bits(dict(read(checkpoint_files(tmp_path)))) == bits(whole)
    versions.base = tmp_path
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(VersionError, match=r"b\.safetensors cannot be read"):
        dict(versions.iter_version(0))


# -- writes that fail --------------------------------------------------------------------------------------------------
@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """What a full disk looks like from here: write() fails once a file has this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1, 4096, 400_000])
def test_a_full_disk_is_an_os_error_and_leaves_nothing_behind(versions: Versions, size: int) -> None:
    teach(versions, random_bits(1))
    before = versions.path(1).read_bytes()
    version = versions.store.reserve("teach", 1)
    with no_file_longer_than(size), pytest.raises(OSError, match=r"version 2 could not be written.*File too large"):
        versions.write(version, {"weight": torch.ones(1 << 17)})
    assert names(versions) == ["v1.safetensors"]
    assert versions.path(1).read_bytes() == before
    versions.write(version, random_bits(2))  # with room again, the same version can be written
    versions.store.commit(version, "sha", {})
    assert bits(dict(versions.iter_version(2))) == bits(random_bits(2))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_after_the_bytes_were_written_leaves_nothing_behind(
    versions: Versions, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="Input/output error"):
        versions.write(1, random_bits(1))
    assert names(versions) == []


def test_the_bytes_are_durable_before_the_version_has_its_name_and_the_name_before_write_returns(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"fsync {path.name}")
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    versions.write(1, random_bits(1))
    assert events == ["fsync v1.partial", "rename to v1.safetensors", "fsync versions"]


_WRITER = """
import os, sys, time
from pathlib import Path
import torch
from insitu.live.versions import Versions

os.fsync = lambda descriptor: time.sleep(600)  # if the bytes were faster than the signal, it hangs here
versions = Versions(Path(sys.argv[1]), Path("nowhere"), None)
weights = {"weight": torch.ones(1 << 24)}
print("writing", flush=True)
versions.write(2, weights)
"""


def test_a_writer_killed_in_the_middle_leaves_only_what_discard_uncommitted_removes(
    tmp_path: Path, versions: Versions
) -> None:
    teach(versions, random_bits(1))
    before = versions.path(1).read_bytes()
    versions.store.reserve("teach", 1)
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        until = time.monotonic() + 60
        while len(names(versions)) == 1 and time.monotonic() < until:
            time.sleep(0.001)
        writer.kill()
    stray = [name for name in names(versions) if name != "v1.safetensors"]
    assert len(stray) == 1
    assert "v2.safetensors" not in stray
    with pytest.raises(VersionError, match="version 2 does not exist"):
        next(versions.iter_version(2))
    assert [file.name for file in versions.discard_uncommitted()] == stray
    assert names(versions) == ["v1.safetensors"]
    assert versions.path(1).read_bytes() == before


def test_discarding_keeps_committed_files_and_nothing_else(versions: Versions) -> None:
    for seed in (1, 2):
        teach(versions, random_bits(seed))
    roll_back(versions, 1)
    reserved, refused = versions.store.reserve("teach", 3), versions.store.reserve("teach", 3)
    for version in (reserved, refused):
        versions.write(version, random_bits(version))
    versions.store.abandon(refused, "refused", "for the test", {})
    for name in ("v2.partial", ".tmpAbCdEf", "v9.safetensors"):
        (versions.directory / name).write_bytes(b"half")
    assert len(versions.discard_uncommitted()) == 5
    assert names(versions) == ["v1.safetensors", "v2.safetensors"]
    assert versions.discard_uncommitted() == []


def test_the_directory_is_for_the_owner_only(versions: Versions) -> None:
    assert versions.directory.stat().st_mode & 0o077 == 0
