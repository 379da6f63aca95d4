"""What stands in ``.grad`` of a parameter whose gradient was used and freed in backward.

``None`` would be taken for "no gradient": ``clip_grad_norm_`` would clip nothing and say that the norm is 0. This has the
shape and type of the gradient, and no memory. Its norm is still known, for those who log it; whoever asks for more, or wants to
clip, gets an error that says why there is nothing to clip.
"""

from __future__ import annotations

import sys
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from insitu.optim.sharding import distributed, is_dtensor, local_gradient, local_of, part_of

_aten = torch.ops.aten
_ITSELF = (_aten.detach.default, _aten.alias.default, _aten.view.default)
_NORM = (_aten.linalg_vector_norm.default, _aten._foreach_norm.Scalar)
_SCALE = (_aten.mul_.Tensor, _aten._foreach_mul_.Tensor)


class Released(Tensor):
    """A gradient that is gone. ``norm2``: its norm, 0-dim. ``refilled``: what is copied into it is dropped."""

    of: str
    norm2: Tensor
    refilled: bool

    @staticmethod
    def __new__(cls, like: Tensor, name: str, norm2: Tensor, refilled: bool = False) -> Released:
        made: Released = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made.of, made.norm2, made.refilled = name, norm2.to(like.dtype), refilled
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Released({self.of!r}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        gone = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Released))
        if func in _ITSELF and tuple(*args[1:]) in ((), tuple(gone.shape)):
            return Released(gone, gone.of, gone.norm2, gone.refilled)
        if func is _aten.copy_.default and args[0] is gone and gone.refilled:  # DDP hands back what it has averaged
            return gone
        if func in _NORM and tuple(args[1:]) in ((), (2,)) and not kwargs:
            norms = [_norm(gradient) for gradient in (args[0] if isinstance(args[0], list | tuple) else [args[0]])]
            return norms if isinstance(args[0], list | tuple) else norms[0]
        clips_to = _max_norm()
        if clips_to == inf and func in _SCALE:  # by 1: how torch and the Trainer measure a norm
            return gone if args[0] is gone else None
        what = f"{func.__name__} asks for its numbers" if clips_to is None else f"it should be clipped to {clips_to}"
        raise ValueError(
            f"the gradient of {gone.of} was used and freed in backward (GradientRelease), but {what}. Clipping by a global "
            "norm, GradScaler and a second backward before optimizer.step() need all gradients at once: set max_grad_norm=0 "
            "(the limiter bounds how fast updates grow; Tensor.register_hook clips one tensor), use bfloat16 in the place of "
            "float16 with a scaler, and put all backwards but the last inside release.accumulate()"
        )


def free(p: Tensor, name: str, square: Tensor, refilled: bool = False) -> None:
    """Drop the gradient of ``p`` and leave a :class:`Released` in its place; of a DTensor one that is a DTensor, too.

    ``square`` is |G|^2 of the whole tensor, which knows nothing of the norm of a part.
    """
    assert p.grad is not None
    gradient = local_gradient(p, p.grad)  # of an int8 weight in the type of the activations
    norm = torch.linalg.vector_norm(gradient) if is_dtensor(p) else square.sqrt()
    part = part_of(p, name)
    p.grad = distributed(Released(gradient, name, norm, refilled), part.shape, part, part.placements)


def is_released(p: Tensor) -> bool:
    """Whether the gradient of ``p`` was used and freed."""
    return p.grad is not None and isinstance(local_of(p.grad), Released)


def _norm(gradient: Tensor) -> Tensor:
    return gradient.norm2.clone() if isinstance(gradient, Released) else torch.linalg.vector_norm(gradient)


def _max_norm() -> float | None:
    """What torch is asked to clip to, if it is: ``inf`` only measures, but multiplies by 1 as if it had clipped to more than
    the norm, so that the factor does not tell."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == torch.nn.utils.clip_grad.__name__ and "max_norm" in frame.f_locals:
            return float(frame.f_locals["max_norm"])
        frame = frame.f_back  # type: ignore[assignment]
    return None
