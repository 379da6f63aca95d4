"""Canaries, frozen: what a version of the model said to prompts that never take part in training, kept on disk.

Each canary is a greedy continuation with the log-probabilities of the whole vocabulary at each of its tokens, as they were at
the version at which it was first frozen: version 0 for those that ship, the version then served for one added later. Against
that origin the drift over many small updates is measured. The file is STATE/canaries.safetensors: tensors ``0``, ``1``, ...
(float16 [continuation, vocabulary]) and, in its metadata, JSON with prompt, version and token ids of each, and a sha256 over
both. A prompt of n tokens and a vocabulary V cost 2 V bytes a token: 9 MB for the eight that ship and V = 49,152.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from insitu.data.batch import collate
from insitu.data.chat import Example
from insitu.data.durable import fsync
from insitu.data.loss import target_distributions
from insitu.live.checkpoint import save_tensors

log = logging.getLogger("insitu.canaries")

FILE = "canaries.safetensors"
_LOWEST = -6e4  # float16 ends at -65504, and exp(-inf) * inf would be NaN


class CanaryFileError(ValueError):
    """The file is not what was written; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """One canary: prompt and greedy continuation as an example, with ``logprobs`` float16 [continuation, vocabulary] as
    ``version`` gave them. ``name`` is what it is listed and reported under; its prompt may be private."""

    name: str
    prompt: str
    version: int
    example: Example
    logprobs: Tensor


def half(logprobs: Tensor) -> Tensor:
    return logprobs.clamp(min=_LOWEST).to(torch.float16)


def freeze(model: Any, canaries: Mapping[str, str], said: Sequence[Example], version: int, pad: int) -> list[Frozen]:
    """The canaries (name -> prompt) with what the model says now of the continuations in ``said``."""
    frozen = []
    for (name, prompt), example in zip(canaries.items(), said, strict=True):
        logprobs, _ = target_distributions(model, collate([example], pad, device=model.device))
        frozen.append(Frozen(name, prompt, version, example, half(logprobs).cpu()))
    return frozen


def keep(
    path: Path,
    wanted: Mapping[str, str],
    freeze: Callable[[Mapping[str, str]], Sequence[Frozen]],
    *,
    version: int,
    vocabulary: int,
) -> list[Frozen]:
    """The ``wanted`` canaries (name -> prompt) from the file; those it lacks are frozen now, at ``version``, and put there.

    A file that is missing or broken is written anew; the figures then say since which version they speak. OSError if it
    cannot be written.
    """
    known: dict[str, Frozen] = {}
    try:
        known = {canary.prompt: canary for canary in load(path, vocabulary)}
    except FileNotFoundError:
        if version:
            log.warning("%s is missing: the drift is measured from version %d on", path, version)
    except CanaryFileError as error:
        log.warning("%s; all canaries are frozen anew: the drift is measured from version %d on", error, version)
    missing = {name: prompt for name, prompt in wanted.items() if prompt not in known}
    known |= {canary.prompt: canary for canary in (freeze(missing) if missing else ())}
    kept = [replace(known[prompt], name=name) for name, prompt in wanted.items()]
    if missing or len(known) > len(kept):
        save(path, kept)
    return kept


def save(path: Path, canaries: Sequence[Frozen]) -> None:
    """Replace the file by one rename: a crash leaves the old one or the new one. OSError if there is no room."""
    tensors = {str(i): canary.logprobs.contiguous() for i, canary in enumerate(canaries)}
    rows = [
        {"name": c.name, "prompt": c.prompt, "version": c.version, "ids": c.example.input_ids, "context": _context(c)}
        for c in canaries
    ]
    text = json.dumps(rows)
    partial = path.with_suffix(".partial")
    try:
        save_tensors(tensors, partial, metadata={"canaries": text, "sha256": _sha256(text, tensors)})
        partial.replace(path)
        fsync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(path: Path, vocabulary: int) -> list[Frozen]:
    """What :func:`save` wrote. FileNotFoundError; CanaryFileError if a single bit of it has changed, or if it is of a model of
    another vocabulary."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type for a file that is cut short
        raise CanaryFileError(f"{path} cannot be read: {error}") from error
    text = metadata.get("canaries", "")
    if metadata.get("sha256") != _sha256(text, tensors):
        raise CanaryFileError(f"{path} does not hold what was written (sha256 differs)")
    canaries = [_frozen(row, tensors[str(i)]) for i, row in enumerate(json.loads(text))]
    for canary in canaries:
        if canary.logprobs.shape != (sum(canary.example.loss_mask), vocabulary):
            shape = list(canary.logprobs.shape)
            raise CanaryFileError(f"{path} is of another model: {shape} in place of a vocabulary of {vocabulary}")
    return canaries


def _frozen(row: Mapping[str, Any], logprobs: Tensor) -> Frozen:
    ids, context = row["ids"], row["context"]
    example = Example(ids, [False] * context + [True] * (len(ids) - context))
    return Frozen(row["name"], row["prompt"], row["version"], example, logprobs)


def _context(canary: Frozen) -> int:
    return canary.example.loss_mask.index(True)


def _sha256(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
