"""Checkpoints that are whole or not there, and only go on into the run that they are of.

Trainer writes a checkpoint file by file. Here it does so in ``.partial``; then everything is forced to disk and the directory
gets its name, ``checkpoint-STEP``, in one rename. Beside Trainer's files it holds ``insitu_run.json``: the configuration, the
state of the data, and the size of every file, so that a directory that lost one later is not taken either.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from insitu.data.durable import fsync, sync, write_text
from insitu.train.fields import ConfigError

log = logging.getLogger("insitu.train")

RECORD = "insitu_run.json"
PARTIAL = ".partial"
SHARDED = "optimizer_sharded"  # each process's part of the optimizer's state
_GONE = ".deleted"
_NAME = re.compile(r"checkpoint-(\d+)")
# What may differ from the run that wrote a checkpoint: places, and how many processes share the weights.
_FREE = re.compile(r"data\.directory|data\.sources\.\d+\.path|data\.tokenizer\.path|model\.fsdp_size|sft\..*path")
# Of the training arguments, those that decide what is drawn; others may change, and are told.
_FIXED = ("seed", "data_seed")


def complete(partial: Path, final: Path, record: Mapping[str, Any]) -> None:
    """Make the directory ``partial`` the checkpoint ``final``: the record is written, all is forced to disk, then renamed."""
    (partial / "training_args.bin").unlink(
        missing_ok=True
    )  # a pickle that nothing reads; the record has the configuration
    files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
    write_text(partial / RECORD, json.dumps({**record, "files": files}, indent=1) + "\n")
    sync(partial)
    if final.exists():
        _remove(final)
    partial.rename(final)
    fsync(final.parent)


def read(checkpoint: Path) -> dict[str, Any]:
    """The record of a complete checkpoint.

    Raises:
        ConfigError: it is not complete, or not one of ours.
    """
    if (reason := why_incomplete(checkpoint)) is not None:
        raise ConfigError(f"{checkpoint} cannot be resumed: {reason}")
    found: dict[str, Any] = json.loads((checkpoint / RECORD).read_text())
    return found


def why_incomplete(checkpoint: Path) -> str | None:
    """What is missing of a checkpoint, or None."""
    if not checkpoint.is_dir():
        return "there is no such directory"
    try:
        files = json.loads((checkpoint / RECORD).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {RECORD}, which `insitu train` writes into each of its checkpoints"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {RECORD} cannot be read ({error})"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or has another size than it was written with"
    return None


def steps_in(output_dir: Path) -> dict[int, Path]:
    """The directories called checkpoint-STEP, by step."""
    found = [(match, path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: int(pair[0][1]))}


def newest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; of newer ones that are not complete it is said why they are left alone."""
    for path in reversed(steps_in(output_dir).values()):
        if (reason := why_incomplete(path)) is None:
            return path
        log.warning("%s is not resumed: %s; it is left alone", path, reason)
    return None


def check_directory(output_dir: Path, resume: bool, step: int) -> None:
    """Refuse an output directory that holds steps which the run would write again.

    Raises:
        ConfigError: checkpoints after ``step``, or any when the run does not ``resume``.
    """
    for number, path in steps_in(output_dir).items():
        if not resume:
            raise ConfigError(
                f"training.output_dir={output_dir} holds {path.name} of an earlier run: go on from it with --resume, move it "
                "away, or give another output_dir"
            )
        if number > step:
            raise ConfigError(
                f"{path} is after step {step}, from which the run is to go on and would write it again: move it away, or "
                "resume from it"
            )


def check_kind(checkpoint: Path, sharded: bool) -> None:
    """Refuse a checkpoint without an optimizer, or one whose optimizer is in shards where the run's is not, or the reverse."""
    found = [path.name for path in checkpoint.glob("optimizer*")]
    if not found:
        raise ConfigError(f"{checkpoint} was saved with save_only_model: it has no optimizer to go on with")
    if (SHARDED in found) != sharded:
        wrote = "a sharded run" if SHARDED in found else "a run that was not sharded"
        raise ConfigError(
            f"{checkpoint} is of {wrote}, and its optimizer is read by such a one: set model.fsdp_size so"
        )


def clean(output_dir: Path) -> None:
    """Remove what a killed run left half written or half deleted, and say so."""
    for name in (PARTIAL, _GONE):
        for path in (output_dir / name).glob("*"):
            done = "written" if name == PARTIAL else "deleted"
            log.warning("%s was left half %s by a run that was killed: removed", path, done)
        if (output_dir / name).exists():
            shutil.rmtree(output_dir / name)


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep ``limit`` checkpoints: the newest, and the best where Trainer knows one. A killed deletion leaves no torn one."""
    if limit is None or limit <= 0:
        return
    paths = list(steps_in(output_dir).values())
    kept = {paths[-1], *([output_dir / Path(best).name] if best else [])}
    surplus = len(paths) - max(limit, len(kept))
    for path in [path for path in paths if path not in kept][: max(0, surplus)]:
        _remove(path)


def check_same(checkpoint: Path, record: Mapping[str, Any], config: Mapping[str, Any], sequences_per_step: int) -> None:
    """Refuse to go on with another model, other data or another optimizer than the checkpoint is of; tell of what else changed.

    Raises:
        ConfigError: naming the first key that differs.
    """
    before, now = _flat(record["config"]), _flat(config)
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) == now.get(key) or _FREE.fullmatch(key) or key.startswith("monitor."):
            continue
        if key.startswith("training.") and key.removeprefix("training.") not in _FIXED:
            if key not in ("training.output_dir", "training.resume_from_checkpoint"):
                log.warning(
                    "%s: %s was %r and is %r: from here on it is another run",
                    checkpoint,
                    key,
                    before.get(key),
                    now.get(key),
                )
            continue
        raise ConfigError(
            f"{checkpoint} is of another run: {key} was {before.get(key)!r} and is {now.get(key)!r}; set it back, or start a "
            "new run in another output_dir"
        )
    if record["sequences_per_step"] != sequences_per_step:
        raise ConfigError(
            f"{checkpoint} was trained with {record['sequences_per_step']} sequences in a step and this run has "
            f"{sequences_per_step} (per_device_train_batch_size x gradient_accumulation_steps x processes): they must agree"
        )


def check_weights(checkpoint: Path, model: Any) -> None:
    """Refuse a checkpoint whose tensors are not those of ``model``: Trainer would load what fits and warn of the rest.

    Raises:
        ConfigError: naming the first tensor that differs.
    """
    from safetensors import safe_open

    saved: dict[str, tuple[int, ...]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    state = model.state_dict()
    places = {tensor.data_ptr() for name, tensor in state.items() if name in saved}
    for name, tensor in state.items():
        # Of tied tensors one is saved.
        if name not in saved and tensor.data_ptr() not in places:
            raise ConfigError(f"{checkpoint} is of another model: it has no {name}, which this one has")
        if name in saved and saved[name] != tuple(tensor.shape):
            raise ConfigError(
                f"{checkpoint} is of another model: {name} has the shape {saved[name]} there and {tuple(tensor.shape)} here"
            )
    if extra := saved.keys() - state.keys():
        raise ConfigError(f"{checkpoint} is of another model: it has {sorted(extra)[0]}, which this one has not")


def _remove(path: Path) -> None:
    trash = path.parent / _GONE
    trash.mkdir(exist_ok=True)
    target = trash / path.name
    if target.exists():
        shutil.rmtree(target)
    path.rename(target)
    shutil.rmtree(trash)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        pairs = list(enumerate(value))
    else:
        return {key: list(value) if isinstance(value, tuple) else value}
    return {k: v for name, item in pairs for k, v in _flat(item, f"{key}.{name}" if key else str(name)).items()}
