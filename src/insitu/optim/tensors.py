"""What a parameter or a gradient must be, and what it is called in messages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from insitu.optim.projection import matrix_shape


def name_of(group: dict[str, Any], index: int, position: int) -> str:
    """For messages only: nothing else may depend on names, which wrappers change."""
    names = group.get("param_names")
    return str(names[index]) if names and index < len(names) else f"parameter {position}"


def readable(tensor: Tensor) -> bool:
    """Whether the host can read it without waiting for a device."""
    return tensor.is_cpu


def refuse_capture() -> None:
    """RuntimeError while a CUDA graph is captured: a replay would repeat the step's number, projection and random bits."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "an optimizer step inside a CUDA graph capture: expected it outside, since its number, its projection and the "
            "random bits of its rounding come from the host, and a replay would repeat them; capture forward and backward, and "
            "call step() between replays"
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


def refuse_other_state(p: Tensor, group: dict[str, Any], name: str, state: dict[str, Any]) -> None:
    """ValueError for a loaded ``state`` that is another optimizer's, or of a tensor of another shape than ``p``.

    At any rank and in any role: those are options, and may have changed after the last step.
    """
    if not {"seed", "skipped", "numel"} <= state.keys():
        raise ValueError(
            f"the loaded state of {name} has the entries {', '.join(map(str, sorted(state)))}: expected the state of an "
            "optimizer of this package (step, skipped, seed, numel, ...); load it into the one that made it, or start afresh"
        )
    moments = state.get("exp_avg")
    found = p.shape if moments is None else moments.shape
    if state["numel"] != p.numel() or not (found == p.shape or _sketches(found, p.shape, bool(group.get("conv")))):
        raise ValueError(
            f"the loaded state of {name} is of a tensor of {state['numel']} elements with moments {tuple(found)}, but {name} "
            f"has the shape {tuple(p.shape)}: expected the state of the same tensor; give the optimizer the parameters in the "
            "order of the run that saved it, or leave this state out"
        )


def _sketches(moments: torch.Size, shape: torch.Size, conv: bool) -> bool:
    """Whether ``moments`` are those of a projected tensor of ``shape`` at some rank."""
    if len(shape) < 2:
        return False
    stack, rows, cols = matrix_shape(shape, conv=conv)
    if len(moments) != (2 if stack is None else 3) or (stack is not None and moments[0] != stack):
        return False
    rank, channels = (moments[-1], moments[-2]) if rows >= cols else (moments[-2], moments[-1])
    return channels == max(rows, cols) and rank <= min(rows, cols)
