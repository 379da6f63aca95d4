"""A state that is loaded: whether it is one of the tensors that are here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from insitu.optim.projection import matrix_shape
from insitu.optim.tensors import name_of


def refuse_foreign(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """ValueError for state that is no state of the optimizer's tensors. What does not match in number is torch's to refuse."""
    position = 0
    for mine, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=False):
        # torch adds the first itself, later; what was saved before there was the second has it from here.
        if missing := optimizer.defaults.keys() - saved.keys() - {"differentiable", "capturable"}:
            raise ValueError(
                f"the loaded group of {name_of(mine, 0, position)} has no {', '.join(sorted(missing))}: expected a "
                f"state_dict of {type(optimizer).__name__}; load it into the optimizer that made it, or start afresh"
            )
        for i, (p, index) in enumerate(zip(mine["params"], saved["params"], strict=False)):
            if state := loaded["state"].get(index):
                _refuse_other_state(p, {**mine, **saved}, name_of(mine, i, position + i), state)
        position += len(mine["params"])


def _refuse_other_state(p: Tensor, group: dict[str, Any], name: str, state: dict[str, Any]) -> None:
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
