"""Writing a version: whatever fails or dies in the middle, no part of a file is taken for a version."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import make_tiny
from versioned import back, base_tensors, names, nudged, open_versions, random_bits, raw, roll_back, teach

from insitu.data.durable import fsync
from insitu.live.checkpoint import VersionError
from insitu.live.difference import DifferenceError
from insitu.live.versions import Versions


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def versions(tmp_path: Path, base: Path) -> Iterator[Versions]:
    versions = open_versions(tmp_path, base)
    yield versions
    versions.store.close()


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """What a full disk looks like from here: write() fails once a file has this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 7, 4096, 8192, 100_000, 150_000])
def test_a_full_disk_is_an_os_error_and_leaves_nothing_behind(versions: Versions, size: int) -> None:
    one = nudged(base_tensors(versions), 1)
    teach(versions, one)
    before = versions.path(1).read_bytes()
    two = random_bits(one, 2)
    version = versions.store.reserve("teach", 1)
    with no_file_longer_than(size), pytest.raises(OSError, match=r"version 2 could not be written.*File too large"):
        versions.write(version, two)
    assert names(versions) == ["v1.difference"]
    assert versions.path(1).read_bytes() == before
    assert back(versions, 1) == raw(one)
    file = versions.write(version, two)  # with room again, the same version can be written
    versions.store.commit(version, "sha", {}, file)
    assert back(versions, 2) == raw(two)


@pytest.mark.parametrize("failing", ["fsync", "replace", "the directory's fsync"])
def test_a_failure_after_the_bytes_were_written_leaves_nothing_behind(
    versions: Versions, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    def fail_for_directories(path: Path) -> None:
        if path.is_dir():
            fail()
        fsync(path)

    version = versions.store.reserve("teach", 0)
    if failing == "the directory's fsync":
        monkeypatch.setattr("insitu.live.versions.fsync", fail_for_directories)
    else:
        monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match=r"version 1 could not be written to .*Input/output error"):
        versions.write(version, random_bits(base_tensors(versions), 1))
    assert names(versions) == []


def test_the_bytes_are_durable_before_the_version_has_its_name_and_the_name_before_write_returns(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = versions.store.reserve("teach", 0)
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"fsync {path.name} of {path.stat().st_size if path.is_file() else '?'}")
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    written = versions.write(version, random_bits(base_tensors(versions), 1))
    assert events == [f"fsync v1.partial of {written.bytes}", "rename to v1.difference", "fsync versions of ?"]
    assert written.bytes == versions.path(1).stat().st_size
    assert written.name == "v1.difference"


def test_the_directorys_own_name_is_durable(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("insitu.live.versions.fsync", synced.append)
    for _ in range(2):
        versions = open_versions(tmp_path, base)
        versions.store.close()
    assert synced == [tmp_path]
    assert versions.directory.stat().st_mode & 0o077 == 0


def test_a_committed_version_is_never_written_again_and_other_tensors_are_refused(versions: Versions) -> None:
    one = nudged(base_tensors(versions), 1)
    teach(versions, one)
    with pytest.raises(AssertionError, match="version 1 is committed"):
        versions.write(1, one)
    version = versions.store.reserve("teach", 1)
    less = {name: tensor for name, tensor in one.items() if name != "model.norm.weight"}
    with pytest.raises((DifferenceError, VersionError)):
        versions.write(version, less)
    with pytest.raises(DifferenceError, match="'stranger' is not in the version before"):
        versions.write(version, {**one, "stranger": one["model.norm.weight"]})
    assert names(versions) == ["v1.difference"]
    assert back(versions, 1) == raw(one)


_WRITER = """
import os, sys, time
from pathlib import Path
import torch
from insitu.live import difference_file
from insitu.live.store import Store
from insitu.live.versions import Versions

place = sys.argv[3]
versions = Versions(Path(sys.argv[1]), Path(sys.argv[2]), Store(Path(sys.argv[1]) / "insitu.db"))

def hang(*_):
    print("there", flush=True)
    time.sleep(600)

if place == "bytes":
    write = difference_file._Hashed.write
    def slow(self, data):
        write(self, data)
        if self.size > 20000:
            self._file.flush()
            hang()
    difference_file._Hashed.write = slow
elif place == "fsync":
    os.fsync = hang
elif place == "rename":
    Path.replace = hang
else:
    replace = Path.replace
    Path.replace = lambda self, target: (replace(self, target), hang())
weights = {name: tensor + 1 for name, tensor in versions.iter_version(1)}
versions.write(2, weights)
"""


@pytest.mark.parametrize("place", ["bytes", "fsync", "rename", "renamed"])
def test_a_writer_killed_anywhere_leaves_only_what_discard_uncommitted_removes(
    tmp_path: Path, versions: Versions, place: str
) -> None:
    one = nudged(base_tensors(versions), 1)
    teach(versions, one)
    before = versions.path(1).read_bytes()
    versions.store.reserve("teach", 1)
    command = [sys.executable, "-c", _WRITER, str(tmp_path), str(versions.base), place]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"there\n"
        writer.kill()
    stray = [name for name in names(versions) if name != "v1.difference"]
    assert stray == (["v2.difference"] if place == "renamed" else ["v2.partial"])
    with pytest.raises(VersionError, match="version 2 does not exist"):
        next(versions.iter_version(2))
    assert [file.name for file in versions.discard_uncommitted()] == stray
    assert names(versions) == ["v1.difference"]
    assert versions.path(1).read_bytes() == before


def test_discarding_keeps_committed_files_and_nothing_else(versions: Versions) -> None:
    made = base_tensors(versions)
    for seed in (1, 2):
        made = nudged(made, seed)
        teach(versions, made)
    roll_back(versions, 1)
    versions.keep_image(2, made)
    reserved, refused = versions.store.reserve("teach", 3), versions.store.reserve("teach", 3)
    for version in (reserved, refused):
        versions.write(version, made)
    versions.store.abandon(refused, "refused", "for the test", {})
    for name in ("v2.partial", ".tmpAbCdEf", "v9.difference", "undo-v9.safetensors"):
        (versions.directory / name).write_bytes(b"half")
    half = versions.directory / ".checkpoint-v1.abcdef" / "deeper"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    (versions.directory / "link").symlink_to(versions.base)
    assert len(versions.discard_uncommitted()) == 8
    assert names(versions) == ["undo-v2.safetensors", "v1.difference", "v2.difference"]
    assert versions.discard_uncommitted() == []
    assert (versions.base / "model.safetensors").exists()
    versions.store.prune([1], [])
    assert [file.name for file in versions.discard_uncommitted()] == ["v1.difference"]
