"""Examples of different lengths as one rectangle of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from insitu.data.chat import Example

IGNORE = -100  # torch's and transformers' label for "no target here"


def collate(examples: Sequence[Example], pad_token_id: int, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, int64 [example, token], padded on the right.

    On the right, because then positions count from 0 and a causal model's real tokens never see the padding: the result of
    each example is what it would be alone. Labels are -100 outside the targets, aligned with ``input_ids`` (not shifted), so
    ``model(**batch)`` works too.
    """
    if not examples:
        raise ValueError("examples is empty; expected at least one Example")
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.where(torch.tensor(example.loss_mask), ids, IGNORE)
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": attention_mask.to(device),
        "labels": labels.to(device),
    }
