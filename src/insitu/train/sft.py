"""Supervised fine-tuning on chat examples: the file that ``insitu learn`` takes, as a data set for Trainer.

The examples are encoded as the live learner encodes them (:mod:`insitu.data.chat`), the targets are the same tokens, and the
loss is the same mean over all targets of an optimizer step, however it is cut into micro-batches: with the learner's optimizer
and order of examples the result is the learner's.

``packing`` lays the examples of a batch behind one another in one row, without padding. Positions restart at each example, and
from that Transformers builds the mask: none attends to another. With flash attention that costs nothing; ``sdpa`` and ``eager``
compute the square of the row and throw away what is outside the examples, so there it pays where lengths differ much.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from insitu.data.batch import IGNORE, collate
from insitu.data.chat import DataError, Example, encode_continuation, encode_messages
from insitu.data.jsonl import read_jsonl
from insitu.data.messages import TooLongError

log = logging.getLogger("insitu.train")


@dataclass(kw_only=True)
class SftConfig:
    """The ``sft`` section."""

    train: str = field(
        metadata={
            "help": "JSON Lines: chats (messages) or token ids (context_ids, continuation_ids); for method dpo prompt, chosen "
            "and rejected, each a list of messages."
        }
    )
    eval: str | None = field(default=None, metadata={"help": "Examples that are never trained on, in the same form."})
    method: Literal["sft", "dpo"] = field(
        default="sft", metadata={"help": "Learn the replies (sft), or prefer one to the other (dpo)."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest example in tokens; the model's context by default."}
    )
    too_long: Literal["error", "skip"] = field(
        default="error", metadata={"help": "An example over max_length is an error, or skipped and counted."}
    )
    packing: bool = field(default=False, metadata={"help": "The examples of a batch in one row without padding."})
    beta: float = field(default=0.1, metadata={"help": "Of DPO: how firmly the model is held to where it began."})
    evaluate: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-eval to run after training, such as arc_easy."}
    )

    def __post_init__(self) -> None:
        for name, expected in (("method", ("sft", "dpo")), ("too_long", ("error", "skip"))):
            if getattr(self, name) not in expected:
                raise ValueError(f"sft.{name}={getattr(self, name)!r}; expected {' or '.join(map(repr, expected))}")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 2):
            raise ValueError(f"sft.max_length={self.max_length!r}; expected an integer of at least 2, or null")
        if not self.beta > 0:
            raise ValueError(f"sft.beta={self.beta!r}; expected a number over 0, such as 0.1")
        if self.method == "dpo" and self.packing:
            raise ValueError("sft.packing=true: DPO compares two replies and does not pack; leave it out")


class Examples(Dataset[dict[str, list[int]]]):
    """Encoded examples, in the order of the file: ``input_ids`` and ``labels``, -100 where there is no target."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        labels = [id if target else IGNORE for id, target in zip(example.input_ids, example.loss_mask, strict=True)]
        return {"input_ids": example.input_ids, "labels": labels}


def make_sft(config: SftConfig, tokenizer: Any, model: Any) -> tuple[Examples, Examples | None, Any]:
    """The data sets to train and to evaluate on (None if there is no file for it), and the collator of both.

    Raises:
        DataError: an example that cannot be learned from, with file, line and field.
        ValueError: packing with a model that would let examples see each other; max_length beyond the model's context.
        OSError: a file that cannot be read.
    """
    length = _max_length(config, model)
    train = load(Path(config.train), tokenizer, model, length, config.too_long)
    held_out = load(Path(config.eval), tokenizer, model, length, config.too_long) if config.eval else None
    if config.packing:
        refuse_if_packing_leaks(model)
        return train, held_out, pack
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked wherever it stands
    # DataParallel, which Trainer takes for several GPUs in one process, would cut the list of columns as if it were a batch.
    parallel = torch.cuda.device_count() > 1 and not torch.distributed.is_initialized()
    return (
        train,
        held_out,
        Collator(pad, "logits_to_keep" in inspect.signature(model.forward).parameters and not parallel),
    )


def load(path: Path, tokenizer: Any, model: Any, max_length: int, too_long: str) -> Examples:
    """All examples of a file, encoded."""
    found, skipped = [], 0
    vocab_size = model.get_input_embeddings().num_embeddings
    for number, line in read_jsonl(path):
        if line.get("freeze_context"):
            raise DataError(
                f"{path}:{number}: freeze_context=true is for the live learner; here whole examples are run with gradient: "
                "leave it out",
                "freeze_context",
            )
        try:
            found.append(_encode(line, tokenizer, vocab_size, max_length))
        except DataError as error:
            if too_long == "skip" and isinstance(error, TooLongError):
                skipped += 1
                continue
            raise DataError(f"{path}:{number}: {error}", error.param) from error
    if skipped:
        log.warning(
            "%s: %d examples longer than %d tokens are left out, %d are kept", path, skipped, max_length, len(found)
        )
    if not found:
        raise DataError(f"{path}: all examples are longer than sft.max_length={max_length}; raise it")
    return Examples(found)


def _encode(line: dict[str, Any], tokenizer: Any, vocab_size: int, max_length: int) -> Example:
    if "messages" in line:
        return encode_messages(tokenizer, line["messages"], max_length=max_length)
    return encode_continuation(
        line["context_ids"], line["continuation_ids"], vocab_size=vocab_size, max_length=max_length
    )


@dataclass(frozen=True)
class Collator:
    """Examples as a padded batch that a causal model takes: ``input_ids``, ``attention_mask``, ``labels``, int64 [B, T].

    With ``keep`` also ``logits_to_keep`` [K] and ``shift_labels`` [B, K]: the columns at which some example predicts a target.
    The model's head runs on these alone; most of a chat is context, and fp32 logits cost 4 V bytes a token.
    """

    pad_token_id: int
    keep: bool

    def __call__(self, features: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        examples = [Example(f["input_ids"], [label != IGNORE for label in f["labels"]]) for f in features]
        batch = collate(examples, self.pad_token_id)
        if self.keep:
            ahead = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
            columns = (ahead != IGNORE).any(0).nonzero()[:, 0]
            batch |= {"logits_to_keep": columns, "shift_labels": ahead[:, columns]}
        return batch


def pack(features: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Examples in one row: ``input_ids``, ``labels`` and ``position_ids``, int64 [1, T]. Without a cache, because with one
    Transformers does not look at the positions, and every example would see those before it."""
    from transformers import DataCollatorWithFlattening

    return {**DataCollatorWithFlattening()(features), "use_cache": False}


def refuse_if_packing_leaks(model: Any) -> None:
    """ValueError unless a sequence behind another in one row has the logits that it has alone: tried on the model itself,
    because nothing in a model's type says so."""
    first, second = [1, 2, 3, 4, 5], [6, 7, 8, 9]
    row = torch.tensor([[*first, *second]], device=model.device) % model.get_input_embeddings().num_embeddings
    positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=model.device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            if "position_ids" not in inspect.signature(model.forward).parameters:
                apart = float("inf")
            else:
                packed = model(input_ids=row, position_ids=positions, use_cache=False).logits[:, len(first) :]
                alone = model(input_ids=row[:, len(first) :], use_cache=False).logits
                apart = float((packed - alone).float().norm() / alone.float().norm())
    finally:
        for module in training:
            module.training = True
    if not apart < 0.02:  # bf16 products in another order: 0.004
        raise ValueError(
            f"sft.packing=true: in {type(model).__name__} an example would see the one before it in its row; leave packing out"
        )


def _max_length(config: SftConfig, model: Any) -> int:
    context = getattr(model.config, "max_position_embeddings", None)
    if config.max_length is None:
        if context is None:
            raise ValueError("sft.max_length is needed: the model's config does not say how long its context is")
        return int(context)
    if context is not None and config.max_length > context:
        raise ValueError(f"sft.max_length={config.max_length}: the model has {context} positions; give at most so many")
    return config.max_length
