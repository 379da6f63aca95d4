"""A name becomes a model directory, or an error that says what was expected: paths and Hub ids."""

import json
from pathlib import Path
from typing import Any

import pytest
from stand_ins import write_model

from insitu.live.packaged import SourceError
from insitu.live.source import ask_on_terminal, resolve


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


def test_without_a_terminal_the_question_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(SourceError, match="--yes"):
        ask_on_terminal("Download?")
