"""Versions over a tiny checkpoint, made as the learner makes them: differences to what was committed, under its names."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from insitu.live.checkpoint import checkpoint_files, read
from insitu.live.store import Store
from insitu.live.versions import Versions

Tensors = dict[str, torch.Tensor]
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def small_base(directory: Path) -> Path:
    """No model at all, but weights of a few kilobytes in a checkpoint's place: for many versions in little time."""
    directory.mkdir()
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(40, 64, generator=draw).to(torch.bfloat16) for name in ("a.weight", "b.weight")}
    tensors["b.bias"] = torch.zeros((), dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text("{}")
    return directory


def open_versions(state_dir: Path, base: Path, dtype: torch.dtype = torch.bfloat16) -> Versions:
    """A state directory in which the base, served in ``dtype``, is version 0."""
    versions = Versions(state_dir, base, Store(state_dir / "insitu.db"))
    if versions.store.head() is None:
        versions.store.commit(versions.store.reserve("base", None), digest(base_tensors(versions, dtype)), {})
    return versions


def base_tensors(versions: Versions, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in read(checkpoint_files(versions.base))}


def random_bits(like: Mapping[str, torch.Tensor], seed: int) -> Tensors:
    """Every bit pattern is a weight: NaNs with a payload, -0.0, denormals."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in like.items():
        integer = _INTEGERS[tensor.dtype]
        half = 1 << (8 * tensor.itemsize - 1)
        made[name] = torch.randint(-half, half, tensor.shape, dtype=integer, generator=draw).view(tensor.dtype)
    return made


def nudged(like: Mapping[str, torch.Tensor], seed: int) -> Tensors:
    """A few weights in a hundred move by one place, as in a lesson."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in like.items():
        moves = torch.randint(0, 30, tensor.shape, generator=draw) == 0
        made[name] = (tensor.view(_INTEGERS[tensor.dtype]) + moves.to(_INTEGERS[tensor.dtype])).view(tensor.dtype)
    return made


def raw(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {n: (t.dtype, t.shape, t.reshape(-1).view(_INTEGERS[t.dtype]).numpy().tobytes()) for n, t in tensors.items()}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(content for _, (_, _, content) in sorted(raw(tensors).items()))).hexdigest()


def teach(versions: Versions, tensors: Tensors) -> int:
    version = versions.store.reserve("teach", versions.store.head())
    file = versions.write(version, tensors)
    versions.store.commit(version, digest(tensors), {}, file)
    return version


def roll_back(versions: Versions, target: int) -> int:
    version = versions.store.reserve("rollback", versions.store.head(), target)
    recorded = versions.store.version(target)
    assert recorded is not None
    versions.store.commit(version, str(recorded.sha256), {})
    return version


def back(versions: Versions, version: int, *, replay: bool = False) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return raw(dict(versions.iter_version(version, replay=replay)))


def names(versions: Versions) -> list[str]:
    return sorted(file.name for file in versions.directory.iterdir())
