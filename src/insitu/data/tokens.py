"""Documents as tokens on disk: encoded once, split into training and validation, mapped into memory."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from insitu.data.messages import DataError
from insitu.data.split import is_validation

SIDES = ("train", "validation")
_BATCH = 512  # documents encoded in one call: enough for all cores, little in memory


@dataclass(frozen=True)
class Tokens:
    """The tokens of documents, mapped from disk.

    Attributes:
        ids: [tokens], unsigned integers; each document ends in the end-of-text token.
        ends: int64 [documents], where in ``ids`` each document ends.
        digest: sha256 of ``ids`` and ``ends``.
    """

    ids: NDArray[Any]
    ends: NDArray[np.int64]
    digest: str


def write_tokens(texts: Iterable[str], tokenizer: Any, share: float, directory: Path) -> None:
    """Encode documents and write both sides of the split: ``SIDE.ids`` and ``SIDE.ends``, raw arrays, and ``tokens.json``.

    Text that spells a special token is encoded as the characters it is made of: only the end of a document is one.
    """
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    with (
        (directory / "train.ids").open("wb") as train,
        (directory / "validation.ids").open("wb") as validation,
    ):
        files: tuple[IO[bytes], IO[bytes]] = (train, validation)
        ends: tuple[list[int], list[int]] = ([], [])
        lengths, digests = [0, 0], [hashlib.sha256(), hashlib.sha256()]
        for side, ids in _encoded(texts, tokenizer, share):
            data = np.asarray(ids, dtype=dtype).tobytes()
            files[side].write(data)
            digests[side].update(data)
            lengths[side] += len(ids)
            ends[side].append(lengths[side])
    summary = {}
    for side, name in enumerate(SIDES):
        raw = np.asarray(ends[side], dtype="<i8").tobytes()
        (directory / f"{name}.ends").write_bytes(raw)
        digests[side].update(raw)
        summary[name] = {"documents": len(ends[side]), "tokens": lengths[side], "sha256": digests[side].hexdigest()}
    (directory / "tokens.json").write_text(json.dumps({"dtype": dtype.str, **summary}, indent=2) + "\n")


def _encoded(texts: Iterable[str], tokenizer: Any, share: float) -> Iterator[tuple[int, list[int]]]:
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH)):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # documents may be longer than the model's context: they are cut into sequences
        )["input_ids"]
        for text, ids in zip(batch, encoded, strict=True):
            yield int(is_validation(text, share)), [*ids, tokenizer.eos_token_id]


def read_tokens(directory: Path, side: str) -> Tokens:
    """Map one side of what :func:`write_tokens` wrote; ``side`` is "train" or "validation"."""
    summary = json.loads((directory / "tokens.json").read_text())
    expected, dtype = summary[side], np.dtype(summary["dtype"])
    arrays = []
    for name, count, kind in (("ids", expected["tokens"], dtype), ("ends", expected["documents"], np.dtype("<i8"))):
        path = directory / f"{side}.{name}"
        if path.stat().st_size != count * kind.itemsize:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes; expected {count * kind.itemsize}; delete {directory}"
            )
        # An empty file cannot be mapped.
        arrays.append(np.memmap(path, kind, mode="r", shape=(count,)) if count else np.empty(0, kind))
    return Tokens(arrays[0], arrays[1], expected["sha256"])


def tokenizer_key(tokenizer: Any) -> str:
    """What the tokens depend on in a tokenizer: its model, not the padding that a call before may have left switched on."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):
        content.pop(setting)
    return json.dumps([content, tokenizer.eos_token_id], sort_keys=True)
