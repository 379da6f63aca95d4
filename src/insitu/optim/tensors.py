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
    return tensor.is_cpu


def capturing() -> bool:
    """Whether what is done now becomes part of a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_capture() -> None:
    """RuntimeError while a CUDA graph is captured: a replay would repeat the step's number, projection and random bits."""
    if capturing():
        raise RuntimeError(
            "an optimizer step inside a CUDA graph capture: expected it outside, since its number, its projection and the "
            "random bits of its rounding come from the host, and a replay would repeat them; capture forward and backward, and "
            "call step() between replays, or make the optimizer (APOLLO, APOLLOMini) with capturable=True"
        )


def refuse_unprepared(name: str) -> None:
    """RuntimeError for a tensor that has no state in a capture: each replay would start it afresh."""
    raise RuntimeError(
        f"{name} has no state yet, or none of these options, and a CUDA graph is captured: expected a step outside before, "
        "which makes the state; call step() once as usual, then capture"
    )


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


def refuse_changed(p: Tensor, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    """ValueError for a parameter that is not any more what it was when the optimizer met it."""
    if p.shape != shape:
        raise ValueError(
            f"{name} has the shape {tuple(p.shape)}, but {tuple(shape)} when this optimizer first stepped it: expected the "
            "same tensor, since its moments belong to its elements; make a new optimizer for the new tensor"
        )
    if p.dtype != dtype:
        raise ValueError(
            f"{name} is {p.dtype}, but {dtype} when this optimizer first stepped it: expected one type throughout, since the "
            "bits lost in between are lost; convert the model before its first step, or, where this is meant, take the state "
            "over (it does not depend on the type) with optimizer.load_state_dict(optimizer.state_dict())"
        )
