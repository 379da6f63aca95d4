"""Transformers checkpoints: read one tensor by tensor, and write one that Transformers and vLLM load like any other."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from insitu.data.durable import fsync
from insitu.live.difference import bits

_SHARD = 4 << 30  # bytes of one file, as far as tensors allow
_INDEX = "model.safetensors.index.json"
ORIGIN = "insitu-version.json"
# What a base may have beside its config and tokenizer: the same weights in another form, and indexes of them.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class VersionError(ValueError):
    """A version that does not exist, was never committed, or whose files are not what was written."""


def checkpoint_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a Transformers checkpoint directory."""
    index = model_dir / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VersionError(f"{index} cannot be read: {error!r}; expected an object with a weight_map") from error
        return [model_dir / name for name in names]
    if (single := model_dir / "model.safetensors").exists():
        return [single]
    raise VersionError(f"{model_dir} holds no model.safetensors; convert the checkpoint with save_pretrained() first")


def read(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor in the order of names, one at a time, from memory-mapped files. Raises VersionError naming a file that
    cannot be read."""
    with ExitStack() as stack:
        places: list[tuple[str, Path, Any]] = []
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                places += [(name, file, opened) for name in opened.keys()]  # noqa: SIM118
            except Exception as error:  # safetensors raises its own type for a file that is cut short
                raise VersionError(f"{file} cannot be read: {error}") from error
        for name, file, opened in sorted(places, key=lambda place: place[0]):
            try:
                tensor = opened.get_tensor(name)
            except Exception as error:
                raise VersionError(f"{file} cannot be read: {error}") from error
            yield name, tensor


def digest(files: list[Path]) -> str:
    """The sha256 of all tensors in the order of their names, as :meth:`insitu.live.weights.arena.Arena.sha256` has it."""
    whole = hashlib.sha256()
    for _, tensor in read(files):
        whole.update(bits(tensor).data)
    return whole.hexdigest()


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, *, metadata: dict[str, str] | None = None, durable: bool = True
) -> None:
    """One safetensors file. Raises OSError when there is no room."""
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # what safetensors makes of the system's error
        raise OSError(f"{path} could not be written: {error}") from error
    if durable:
        fsync(path)


def write_checkpoint(
    directory: Path,
    base: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    origin: dict[str, Any],
    *,
    sha256: str | None = None,
) -> None:
    """A complete checkpoint under a new ``directory``: weights, and everything that ``base`` has beside its weights.

    It appears whole or not at all. ``origin`` is kept beside it as insitu-version.json. ``sha256`` is what :func:`digest` must
    say of what was written; version 0 has none when the base is of another dtype than what is served.

    Raises:
        FileExistsError: ``directory`` exists.
        OSError: there is no room.
        VersionError: whatever ``tensors`` raises; or what was written is not what ``sha256`` says.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists; choose a new directory")
    partial = made = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for file in base.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, partial / file.name)
        dtypes = _save_shards(partial, tensors)
        if sha256 is not None and digest(checkpoint_files(partial)) != sha256:
            raise VersionError(f"{directory} was not written: the tensors for it are not those that were committed")
        _say_dtype(partial / "config.json", dtypes)
        (partial / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        for file in partial.iterdir():
            fsync(file)
        fsync(partial)
        made = partial.rename(directory)
        fsync(directory.parent)
    except BaseException:
        shutil.rmtree(made)
        raise


def _save_shards(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[torch.dtype]:
    """Files of limited size, so that a large model is never in memory as a whole, and their index if there are several."""
    names: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}
    dtypes: set[torch.dtype] = set()
    size = total = 0

    def flush() -> None:
        nonlocal waiting, size
        save_tensors(waiting, directory / f"shard-{len(names)}")
        names.append(list(waiting))
        waiting, size = {}, 0

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > _SHARD:
            flush()
        waiting[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
        if tensor.dim() > 1:
            dtypes.add(tensor.dtype)
    flush()
    if len(names) == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return dtypes
    called = [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    for i, name in enumerate(called):
        (directory / f"shard-{i}").rename(directory / name)
    held = {tensor: called[i] for i, shard in enumerate(names) for tensor in shard}
    (directory / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": held}))
    return dtypes


def _say_dtype(config: Path, dtypes: set[torch.dtype]) -> None:
    """The weights may be narrower than the base's were; whoever loads them should not widen them."""
    if len(dtypes) != 1:
        return
    dtype = str(dtypes.pop()).removeprefix("torch.")
    told = json.loads(config.read_text())
    # An older Transformers knows the first name only; where the base was written for one, it may be read by one.
    for key in {"torch_dtype", "dtype"} & told.keys() or {"dtype"}:
        told[key] = dtype
    config.write_text(json.dumps(told, indent=2) + "\n")


def remove(path: Path) -> None:
    """A file, or a directory, which is never seen with some of its files."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name.removeprefix('.')}.removed")
        path.rename(hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)
