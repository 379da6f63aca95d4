"""Preferences by DPO (Rafailov et al. 2023, arXiv 2305.18290), through TRL's trainer.

{"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", "content": "..."}],
 "rejected": [{"role": "assistant", "content": "..."}]}
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from insitu.data.messages import DataError, check_example, check_messages
from insitu.train.sft import SftConfig

_KEYS = ("prompt", "chosen", "rejected")


def read_preferences(path: Path) -> list[dict[str, Any]]:
    """The pairs of a file. DataError naming file, line and field of the first that is none."""
    rows = [_read(line, f"{path}:{number}") for number, line in _lines(path)]
    if not rows:
        raise DataError(f"{path}: no pairs; expected one JSON object per line, with {', '.join(_KEYS)}")
    return rows


def run_dpo(
    config: SftConfig,
    model: Any,
    tokenizer: Any,
    training: Mapping[str, Any],
    *,
    optimizer: Callable[[Any], tuple[Any, dict[str, Any]]] | None = None,
    callbacks: Sequence[Any] = (),
    resume_from_checkpoint: str | None = None,
) -> Any:
    """Train ``model`` to prefer the chosen replies; returns TRL's trainer.

    Args:
        config: the ``sft`` section with method dpo.
        training: the ``training`` section: names and values of TrainingArguments, which DPOConfig inherits.
        optimizer: from the DPOConfig to Trainer's ``optimizer_cls_and_kwargs``; Trainer's own by default.
        callbacks: of the trainer.
        resume_from_checkpoint: a checkpoint of the same run.

    Raises:
        ValueError: TRL is not installed.
        DataError: a pair that cannot be learned from.
    """
    train = read_preferences(Path(config.train))
    held_out = read_preferences(Path(config.eval)) if config.eval else None
    try:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise ValueError("sft.method='dpo' needs TRL: pip install trl") from error
    length = {} if config.max_length is None else {"max_length": config.max_length}
    args = DPOConfig(**{**training, **length, "beta": config.beta})
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),  # by itself TRL would read the checkpoint again, which this model need not be
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        callbacks=list(callbacks),
    )
    if optimizer is not None:
        trainer.optimizer_cls_and_kwargs = optimizer(args)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        yield from ((number, line) for number, line in enumerate(stream, 1) if line.strip())


def _read(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict) or sorted(value) != sorted(_KEYS):
        found = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{where}: expected an object with {', '.join(_KEYS)} and nothing else; found {found}")
    try:
        prompt = check_messages(value["prompt"])
        if prompt[-1].role == "assistant":
            raise DataError("prompt ends with an assistant turn; it belongs into chosen and rejected", "prompt")
        for key in _KEYS[1:]:
            if [turn.role for turn in check_example(value[key])] != ["assistant"]:
                raise DataError(f"{key} has other turns; expected one assistant message", key)
    except DataError as error:
        raise DataError(f"{where}: {error}", error.param) from error
    if value["chosen"] == value["rejected"]:
        raise DataError(f"{where}: chosen and rejected are the same; there is nothing to prefer", "rejected")
    return value
