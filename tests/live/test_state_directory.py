"""A state directory that is not private, not real or not whole is refused in one sentence, and nothing in it is changed."""

import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from insitu.live.records import StateError
from insitu.live.state import open_store, state_directory
from insitu.live.store import Store
from insitu.live.weights.handles import HandleError


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """One that was used, and closed in order."""
    made = state_directory(tmp_path / "state")
    store = Store(made / "insitu.db")
    store.commit(store.reserve("base", None), "0" * 64, {})
    for i in range(200):
        turns = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "an answer " * 20}]
        store.add_feedback("messages", {"messages": turns}, f"id-{i}")
    store.commit(store.reserve("teach", 0, feedback=[f"id-{i}" for i in range(8)]), "1" * 64, {"loss": 0.1})
    store.close()
    (made / "versions").mkdir(mode=0o700)
    (made / "versions" / "v1.diff").write_bytes(b"one")
    return made


def content(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


# -- the directory -----------------------------------------------------------------------------------------------------
def test_a_link_is_refused_with_its_target(state_dir: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(state_dir)
    with pytest.raises(StateError, match=f"{link} is a link to {state_dir}.*name {state_dir} instead"):
        state_directory(link)
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StateError, match="is a link to"):
        state_directory(link)
    assert not (tmp_path / "nowhere").exists()


def test_a_link_further_up_is_the_systems_own(state_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    assert state_directory(tmp_path / "up" / "state") == state_dir


def test_one_that_others_may_enter_is_refused_with_the_command(state_dir: Path) -> None:
    state_dir.chmod(0o750)
    with pytest.raises(HandleError, match=f"mode 750.*chmod 700 {state_dir}"):
        state_directory(state_dir)


def test_one_that_cannot_be_made_says_why() -> None:
    with pytest.raises(StateError, match=r"/proc/insitu cannot be made: .*choose another --state-dir"):
        state_directory(Path("/proc/insitu"))


# -- the store's file --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["insitu.db", "insitu.db-wal", "insitu.db-shm"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_store_that_others_may_read_is_refused_with_the_command(state_dir: Path, name: str, mode: int) -> None:
    file = state_dir / name
    file.touch(0o600)
    file.chmod(mode)
    with pytest.raises(StateError, match=f"mode {mode:o}.*chmod 600 {file}$"):
        open_store(state_dir)
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_store_that_is_a_link_is_refused(state_dir: Path, tmp_path: Path) -> None:
    shutil.move(state_dir / "insitu.db", tmp_path / "elsewhere.db")
    (state_dir / "insitu.db").symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(StateError, match=r"cannot be opened \(.*symbolic links"):
        open_store(state_dir)


def test_a_store_of_another_user_is_refused(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(StateError, match=rf"belongs to another user \(uid {own}\)"):
        open_store(state_dir)


def flip(offset: Callable[[int], int], count: int = 64) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        at = offset(len(data))
        data[at : at + count] = bytes(b ^ 0x5A for b in data[at : at + count])
        file.write_bytes(data)

    return damage


def flip_text(file: Path) -> None:
    """One letter in what is to be learned: for SQLite that is as good as another."""
    data = file.read_bytes()
    assert b"question 150" in data
    file.write_bytes(data.replace(b"question 150", b"questiom 150"))


def truncate(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        os.truncate(file, int(file.stat().st_size * share))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        flip(lambda size: 0),
        flip(lambda size: 40),
        flip(lambda size: 4096),
        flip(lambda size: size // 2 // 4096 * 4096),
        flip(lambda size: size - size % 4096 - 4096),
        flip(lambda size: 100, 4000),
        flip_text,
        truncate(0.5),
        truncate(0.9),
        truncate(0.01),
        lambda file: file.write_bytes(bytes(file.stat().st_size)),
    ],
    ids=["magic", "header", "page 2", "middle", "last page", "page 1", "a letter", "half", "most", "a rest", "zeros"],
)
def test_a_damaged_store_is_named_with_the_way_out_and_left_as_it_is(
    state_dir: Path, damage: Callable[[Path], None]
) -> None:
    file = state_dir / "insitu.db"
    damage(file)
    before = content(state_dir)
    with pytest.raises(StateError, match=re.escape(str(file))) as refused:
        open_store(state_dir)
    # In the header a damaged number of the schema cannot be told from another insitu's.
    ways = "copy of the whole state directory back|move it away|choose another state directory"
    assert re.search(ways, str(refused.value)), str(refused.value)
    after = content(state_dir)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("damage", [Path.unlink, truncate(0)], ids=["missing", "empty"])
def test_a_store_that_is_gone_while_its_versions_are_there_is_not_begun_anew(
    state_dir: Path, damage: Callable[[Path], None]
) -> None:
    damage(state_dir / "insitu.db")
    with pytest.raises(StateError, match=r"missing or empty, but versions/ holds 1 files \(v1.diff"):
        open_store(state_dir)
    assert (state_dir / "versions" / "v1.diff").read_bytes() == b"one"


def test_a_store_that_is_older_than_its_versions_is_refused(state_dir: Path, tmp_path: Path) -> None:
    """An old copy of the store alone was put back."""
    shutil.copy(state_dir / "insitu.db", tmp_path / "old.db")
    store = open_store(state_dir)
    store.commit(store.reserve("teach", 1, feedback=["id-9"]), "2" * 64, {})
    store.reserve("teach", 2)
    for name in ("v2.diff", "v3.partial"):  # the second of a process that was killed
        (state_dir / "versions" / name).write_bytes(b"x")
    store.close()
    open_store(state_dir).close()
    (state_dir / "insitu.db").write_bytes((tmp_path / "old.db").read_bytes())
    with pytest.raises(StateError, match=r"does not know the version of versions/v2.diff: it is older.*insitu.db-wal"):
        open_store(state_dir)
    assert sorted(file.name for file in (state_dir / "versions").iterdir()) == ["v1.diff", "v2.diff", "v3.partial"]


def test_a_whole_store_opens_and_one_of_a_killed_process_too(state_dir: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from insitu.live.store import Store
store = Store(Path(sys.argv[1]))
store.add_feedback("messages", {"n": 1}, "late")
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(state_dir / "insitu.db")], check=False)
    assert (state_dir / "insitu.db-wal").stat().st_size > 0
    store = open_store(state_dir)
    assert store.feedback("late") is not None
    assert store.counts() == {"queued": 193, "applied": 8}
    store.close()


def test_damage_that_comes_later_is_an_error_of_the_store(state_dir: Path) -> None:
    """Which the HTTP routes answer with 503, and the learner does not take for an empty queue."""
    store = open_store(state_dir)
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store._db.execute("PRAGMA cache_size=0")
    flip(lambda size: 4096, 100_000)(state_dir / "insitu.db")
    other = sqlite3.connect(state_dir / "insitu.db")  # what one connection has read it may remember
    with pytest.raises(sqlite3.DatabaseError):
        other.execute("SELECT * FROM feedback").fetchall()
    other.close()
    with pytest.raises((sqlite3.DatabaseError, ValueError)):
        store.list_feedback(limit=1000)
    store.close()


# -- on the command line -----------------------------------------------------------------------------------------------
_SERVE = """
import sys
from pathlib import Path
from insitu.cli import serving
from insitu.live.config import ServeConfig
for name in sys.argv[1:]:
    try:
        serving.serve("/no/model", config=ServeConfig(state_dir=Path(name), port=0))
    except SystemExit as end:
        print(repr(end.code))
"""


def test_the_command_line_says_it_in_one_line_before_it_looks_for_the_model(state_dir: Path, tmp_path: Path) -> None:
    cases = ["link", "directory", "store", "damaged", "keys"]
    for case in cases[1:]:
        shutil.copytree(state_dir, tmp_path / case)
    (tmp_path / "link").symlink_to(state_dir)
    (tmp_path / "directory").chmod(0o755)
    (tmp_path / "store" / "insitu.db").chmod(0o644)
    truncate(0.5)(tmp_path / "damaged" / "insitu.db")
    (tmp_path / "keys" / "keys.json").touch(0o644)
    # One process for all: it takes seconds to load what serving needs.
    command = [sys.executable, "-c", _SERVE, *(str(tmp_path / case) for case in cases)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    told = ["is a link to", "chmod 700", "chmod 600", "is damaged", "chmod 600"]
    assert len(lines) == len(told)
    for line, words in zip(lines, told, strict=True):
        assert line.startswith("'insitu: "), line
        assert words in line, line
        assert "\\n" not in line
