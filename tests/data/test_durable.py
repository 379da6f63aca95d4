"""Directories are made once, and a killed process leaves none that looks whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from insitu.data.durable import directory_made, write_text
from insitu.data.messages import DataError

_MAKER = """
import sys, time
from pathlib import Path
from insitu.data.durable import directory_made

def make(directory):
    (directory / "half").write_text("1")
    Path(sys.argv[2]).open("a").write("made\\n")
    if sys.argv[3] == "wait":
        time.sleep(600)
    time.sleep(float(sys.argv[3]))
    (directory / "rest").write_text("2")

print(directory_made(Path(sys.argv[1]) / "x", "key", make))
"""


def _start(tmp_path: Path, wait: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _MAKER, str(tmp_path), str(tmp_path / "log"), wait]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_maker_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    maker = _start(tmp_path, "wait")
    while not (tmp_path / "log").exists():
        assert maker.poll() is None
        time.sleep(0.02)
    assert [path.name for path in tmp_path.glob("x-*/")] != []
    os.kill(maker.pid, signal.SIGKILL)
    maker.communicate()

    def make(directory: Path) -> None:
        assert list(directory.iterdir()) == [], "what the dead process left is gone"
        (directory / "rest").write_text("2")

    made = directory_made(tmp_path / "x", "key", make)
    assert [path.name for path in made.iterdir()] == ["rest"]
    assert [path for path in tmp_path.glob("x-*/") if path != made] == []


def test_of_several_processes_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    makers = [_start(tmp_path, "0.5") for _ in range(3)]
    printed = {maker.communicate()[0] for maker in makers}
    assert len(printed) == 1
    assert (tmp_path / "log").read_text() == "made\n"
    assert sorted(path.name for path in Path(printed.pop().strip()).iterdir()) == ["half", "rest"]


def test_another_key_is_another_directory(tmp_path: Path) -> None:
    calls: list[Path] = []
    first = directory_made(tmp_path / "x", "one", calls.append)
    assert directory_made(tmp_path / "x", "one", calls.append) == first
    assert directory_made(tmp_path / "x", "two", calls.append) != first
    assert len(calls) == 2


def test_a_maker_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("1")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left on device; make room or choose another directory"):
        directory_made(tmp_path / "x", "key", fail)
    assert [path for path in tmp_path.glob("x-*") if path.is_dir() and not path.name.endswith(".partial")] == []


def test_a_file_is_replaced_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "f", "old")
    inode = (tmp_path / "f").stat().st_ino

    def dies(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", dies)
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "new"
    assert (tmp_path / "f").stat().st_ino != inode
