"""A complete checkpoint of a version: loaded by Transformers like any other, whole or not there at all."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from versioned import Tensors, digest, nudged, raw

from insitu.live import checkpoint
from insitu.live.checkpoint import ORIGIN, VersionError, checkpoint_files, read, remove, write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tensors(base: Path) -> Tensors:
    return nudged(load_file(base / "model.safetensors"), 1)


def loads(directory: Path, tensors: Tensors) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    found = dict(model.named_parameters())
    assert raw({name: parameter.detach() for name, parameter in found.items()}) == raw(tensors)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer.encode("the capital of π")) == "the capital of π"
    assert tokenizer.chat_template


@pytest.mark.parametrize("shard", [4 << 30, 20_000, 1])
def test_what_is_written_is_loaded_by_transformers_with_the_same_bytes(
    tmp_path: Path, base: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    monkeypatch.setattr(checkpoint, "_SHARD", shard)
    origin = {"version": 7, "sha256": digest(tensors)}
    write_checkpoint(tmp_path / "out", base, iter(tensors.items()), origin, sha256=digest(tensors))
    loads(tmp_path / "out", tensors)
    files = checkpoint_files(tmp_path / "out")
    assert (len(files) > 1) == (shard < 4 << 30)
    assert shard > 1 or len(files) == len(tensors)
    assert raw(dict(read(files))) == raw(tensors)
    assert checkpoint.digest(files) == digest(tensors)
    assert json.loads((tmp_path / "out" / ORIGIN).read_text()) == origin
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_bases_own_weights_in_whatever_form_are_left_out(tmp_path: Path, tensors: Tensors) -> None:
    base = make_tiny(tmp_path / "base")
    beside = {file.name for file in base.iterdir()} - {"model.safetensors"}
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "a.gguf",
        "b.pth",
    ):
        (base / name).write_bytes(b"old weights")
    (base / "original").mkdir()
    write_checkpoint(tmp_path / "out", base, tensors.items(), {})
    assert {file.name for file in (tmp_path / "out").iterdir()} == beside | {"model.safetensors", ORIGIN}


@pytest.mark.parametrize("keys", [{"dtype"}, {"torch_dtype"}, {"dtype", "torch_dtype"}, set()], ids=str)
def test_weights_that_are_narrower_than_the_bases_were_are_said_to_be(
    tmp_path: Path, tensors: Tensors, keys: set[str]
) -> None:
    base = make_tiny(tmp_path / "wide", dtype=torch.float32)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype")
    (base / "config.json").write_text(json.dumps({**config, **dict.fromkeys(keys, "float32")}))
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # a vector may stay wider
    write_checkpoint(tmp_path / "out", base, tensors.items(), {})
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: told[key] for key in ("dtype", "torch_dtype") if key in told} == dict.fromkeys(
        keys or {"dtype"}, "bfloat16"
    )
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("there", ["directory", "file"])
def test_what_exists_is_never_written_over(tmp_path: Path, base: Path, tensors: Tensors, there: str) -> None:
    out = tmp_path / "out"
    out.mkdir() if there == "directory" else out.write_text("mine")
    with pytest.raises(FileExistsError, match="out exists; choose a new directory"):
        write_checkpoint(out, base, tensors.items(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_directory_for_it_must_be_there(tmp_path: Path, base: Path, tensors: Tensors) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_checkpoint(tmp_path / "nowhere" / "out", base, tensors.items(), {})


@pytest.mark.parametrize("at", range(6))
def test_a_failure_anywhere_leaves_nothing(
    tmp_path: Path, base: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def half() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tensors.items())[:3]
        fail()

    real = checkpoint.fsync

    def sync(path: Path) -> None:
        fail() if path == tmp_path else real(path)

    if at == 4:  # the name of the finished directory cannot be made durable
        monkeypatch.setattr(checkpoint, "fsync", sync)
    elif at < 4:
        failing = [(shutil, "copyfile"), (checkpoint, "save_file"), (os, "fsync"), (Path, "rename")]
        monkeypatch.setattr(*failing[at], fail)
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(tmp_path / "out", base, half() if at == 5 else tensors.items(), {})
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path / "out", base, tensors.items(), {})
    loads(tmp_path / "out", tensors)


def test_other_bytes_than_were_committed_are_not_written(tmp_path: Path, base: Path, tensors: Tensors) -> None:
    with pytest.raises(VersionError, match="out was not written: the tensors for it are not those that were committed"):
        write_checkpoint(tmp_path / "out", base, nudged(tensors, 3).items(), {}, sha256=digest(tensors))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_never_seen_half_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    (tmp_path / "checkpoint-v1" / "deep").mkdir(parents=True)
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", seen.append)  # killed here
        remove(tmp_path / "checkpoint-v1")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [seen[0].name] == [".checkpoint-v1.removed"]
    for path in list(tmp_path.iterdir()):
        remove(path)
    assert list(tmp_path.iterdir()) == []
