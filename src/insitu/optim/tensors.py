"""What a parameter or a gradient must be, and what it is called in messages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def name_of(group: dict[str, Any], index: int, position: int) -> str:
    """For messages only: nothing else may depend on names, which wrappers change."""
    names = group.get("param_names")
    return str(names[index]) if names and index < len(names) else f"parameter {position}"


def readable(tensor: Tensor) -> bool:
    """Whether the host can read it without waiting for a device."""
    return tensor.device.type == "cpu"


def refuse_unsuitable(tensor: Tensor, name: str) -> None:
    """ValueError for what no optimizer here can take: sparse, complex, integer, or flattened by a wrapper."""
    if tensor.is_sparse or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} is sparse ({tensor.layout}): expected a dense tensor; use sparse=False, or SparseAdam"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}: expected a real floating type; leave it out of the optimizer")
    if getattr(tensor, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} was flattened by FullyShardedDataParallel (FSDP1): expected a tensor of its own shape, because rows and "
            "columns matter here; use fully_shard (FSDP2)"
        )
    if hasattr(tensor, "ds_id"):
        raise ValueError(
            f"{name} is partitioned by DeepSpeed ZeRO-3: expected a whole tensor or a DTensor; use fully_shard (FSDP2)"
        )


def refuse_flattened(name: str, shape: torch.Size) -> None:
    """ValueError for a matrix that has become a vector since the optimizer was made."""
    raise ValueError(
        f"{name} has the shape {tuple(shape)} but was given as a matrix: a wrapper (DeepSpeed ZeRO, FSDP1) has flattened it, "
        "and rows and columns matter here; use fully_shard (FSDP2), or torch.optim.AdamW with that wrapper"
    )
