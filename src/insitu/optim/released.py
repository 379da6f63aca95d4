"""What stands in ``.grad`` of a parameter whose gradient was used and freed in backward.

``None`` would be taken for "no gradient": ``clip_grad_norm_`` would clip nothing and say that the norm is 0. This has the
shape and type of the gradient and no memory, and whoever asks it for numbers gets an error that says why there are none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from insitu.optim.sharding import distributed, local_of, part_of

_aten = torch.ops.aten
_ITSELF = (_aten.detach.default, _aten.alias.default, _aten.view.default)


class Released(Tensor):
    """A gradient that is gone. ``refilled``: what is copied into it is dropped (DDP hands back what it has averaged)."""

    of: str
    refilled: bool

    @staticmethod
    def __new__(cls, like: Tensor, name: str, refilled: bool = False) -> Released:
        made: Released = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made.of, made.refilled = name, refilled
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Released({self.of!r}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        gone = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Released))
        if func in _ITSELF and tuple(*args[1:]) in ((), tuple(gone.shape)):
            return Released(gone, gone.of, gone.refilled)
        if func is _aten.copy_.default and args[0] is gone and gone.refilled:
            return gone
        raise ValueError(
            f"the gradient of {gone.of} was used and freed in backward (GradientRelease), but {func.__name__} asks for its "
            "numbers. Clipping by a global norm, GradScaler and a second backward before optimizer.step() need all gradients "
            "at once: set max_grad_norm=0 (the limiter bounds how fast updates grow; Tensor.register_hook clips one tensor), "
            "use bfloat16 instead of float16 with a scaler, and put all backwards but the last inside release.accumulate()"
        )


def free(p: Tensor, name: str, refilled: bool = False) -> None:
    """Drop the gradient of ``p`` and leave a :class:`Released` in its place; of a DTensor one that is a DTensor, too."""
    part = part_of(p, name)
    p.grad = distributed(Released(part.tensor, name, refilled), part.shape, part, part.placements)


def is_released(p: Tensor) -> bool:
    """Whether the gradient of ``p`` was used and freed."""
    return p.grad is not None and isinstance(local_of(p.grad), Released)
