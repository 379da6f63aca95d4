"""Q-APOLLO: linear layers whose weights are int8, and nothing else; no float copy is kept anywhere.

Zhu et al. 2024, arXiv 2412.05270, table 8. The forward and the backward pass read the weight in the type of the activations,
the gradient is an ordinary dense one, and the optimizer's second pass reads int8, computes in float32 and writes int8 with
stochastic rounding: a storage format like another (:class:`insitu.optim.rounding.Precision`).

The authors' implementation has uint8 with a zero point for each group; here the numbers are symmetric
(:mod:`insitu.optim.int8`), so a group whose weights all have one sign is no special case, and a scale is two bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from insitu.optim.int8 import Groups, grouped

aten = torch.ops.aten
VISIBLE = (torch.float32, torch.bfloat16, torch.float16)
_BACKENDS = ("auto", "blocked", "reference")  # those that read and write int8


class Int8Weight(Tensor):
    """A (rows, cols) weight stored as int8; to autograd it is a tensor of ``dtype``, the type of its gradient.

    Attributes:
        int_data: (rows, cols) int8.
        scale: (rows, groups) bfloat16, whatever ``dtype`` is.
        group_size: columns that share a scale; the last group of a row may be smaller.

    Only what a linear layer, a module, FSDP2 and the optimizers of this package need is defined. Anything else, such as an
    optimizer that would add a float update to it, is a NotImplementedError.
    """

    int_data: Tensor
    scale: Tensor
    group_size: int

    @staticmethod
    def __new__(cls, int_data: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Int8Weight:
        made: Int8Weight = Tensor._make_wrapper_subclass(cls, int_data.shape, dtype=dtype, device=int_data.device)
        made.int_data, made.scale, made.group_size = int_data, scale, group_size
        return made

    @property
    def groups(self) -> Groups:
        """The scales, sharing memory."""
        return Groups(self.scale, self.group_size, self.int_data.shape[1])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """A plain copy in ``dtype`` (default: its own), rounded once; no gradient flows through it."""
        dtype = dtype or self.dtype
        # Of float16 a scale might be too large or too small.
        work = torch.float32 if dtype == torch.float16 else dtype
        return self.groups.dequantize(self.int_data.to(work)).to(dtype)

    def with_data(self, int_data: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Int8Weight:
        """Other numbers with the same grouping."""
        return Int8Weight(int_data, scale, self.group_size, dtype or self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"Int8Weight(shape={tuple(self.shape)}, group_size={self.group_size}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, requires_grad={self.requires_grad})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype]]:
        return ["int_data", "scale"], (self.group_size, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[int, torch.dtype], size: Any, stride: Any
    ) -> Int8Weight:
        return Int8Weight(inner["int_data"], inner["scale"], *context)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for torch's cache of it on disk."""
        kind = (self.shape, self.scale.shape, self.group_size, self.dtype, self.device, self.requires_grad)
        return sha256(f"{type(self).__qualname__} {kind}".encode()).hexdigest()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in _OPERATIONS:
            raise NotImplementedError(  # a TypeError from an operator would become Python's own
                f"{func} is not defined for int8 weights: expected a linear layer (F.linear), or an optimizer of insitu, which "
                "knows how they are stored; weight.dequantize() is a float copy"
            )
        return _OPERATIONS[func](*args, **(kwargs or {}))

    # The two halves of FSDP2's all-gather: int8 and scales travel, and no float weight.
    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """What each rank gives."""
        return (self.int_data, self.scale), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Int8Weight, tuple[Tensor, ...]] | None:
        """The whole weight, on the memory of what was gathered; ``out`` is that of before, on the same memory."""
        if out is not None:
            return None
        int_data, scale = outputs
        return self.with_data(int_data, scale, param_dtype), outputs


class _Linear(torch.autograd.Function):
    """x W^T + b. Saved are the int8 numbers, not the weight in the type of x; their version counters tell of a change."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight.int_data, weight.scale)
        ctx.group_size, ctx.has_bias = weight.group_size, bias is not None
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = gradients
        x, int_data, scale = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = grad @ Int8Weight(int_data, scale, ctx.group_size, x.dtype).dequantize()
        if ctx.needs_input_grad[1]:
            by_weight = flat.mT @ x.reshape(-1, x.shape[-1])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            by_bias = flat.sum(0)
        return by_x, by_weight, by_bias


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with an :class:`Int8Weight`, read in the type of ``input``, or of autocast where that is on."""
    if not isinstance(weight, Int8Weight):
        raise TypeError("the input of a linear layer is an int8 weight: expected activations; use dequantize()")
    kind = input.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return out


def refuse_for_int8(local: Tensor, group: dict[str, Any], name: str) -> None:
    """ValueError for options of an optimizer that have no meaning for an int8 weight."""
    if not isinstance(local, Int8Weight):
        return
    if group["rounding"] == "compensated":
        raise ValueError(
            f"rounding='compensated' for {name}, which is int8: expected 'stochastic' or 'nearest'; a residual would cost more "
            "than the weight"
        )
    if group["backend"] not in _BACKENDS:
        raise ValueError(
            f"backend={group['backend']!r} for {name}, which is int8: expected one of {', '.join(map(repr, _BACKENDS))}"
        )


def backend_for(stored: Tensor, name: str) -> str:
    """The backend that "auto" is for a tensor as it is stored: not every one reads int8."""
    if stored.dtype != torch.int8 or name != "auto":
        return name
    return "blocked" if stored.device.type == "cpu" else "reference"


def _each(func: Callable[..., Any]) -> Callable[..., Int8Weight]:
    """An operation that treats numbers and scales alike."""
    return lambda w, *args, **kwargs: w.with_data(func(w.int_data, *args, **kwargs), func(w.scale, *args, **kwargs))


def _to_copy(w: Int8Weight, *, dtype: torch.dtype | None = None, **where: Any) -> Int8Weight:
    """``.to()``, ``.half()``, ``.cuda()``: another type is that of gradients; what is stored stays int8 and bfloat16."""
    if dtype is not None and dtype not in VISIBLE:
        raise ValueError(
            f"an int8 weight cannot become {dtype}: expected {', '.join(map(str, VISIBLE))}; use dequantize()"
        )
    return w.with_data(aten._to_copy(w.int_data, **where), aten._to_copy(w.scale, **where), dtype)


def _copy(w: Int8Weight, source: Tensor, non_blocking: bool = False) -> Int8Weight:
    """In place, from a weight that is grouped in the same way."""
    if not isinstance(w, Int8Weight) or not isinstance(source, Int8Weight) or w.group_size != source.group_size:
        raise ValueError(
            f"copy_ from {_told(source)} to {_told(w)}: expected int8 weights of one group size; load_state_dict of a module "
            "takes float weights too"
        )
    w.int_data.copy_(source.int_data, non_blocking)
    w.scale.copy_(source.scale, non_blocking)
    return w


def _told(tensor: Tensor) -> str:
    kind = f"int8 in groups of {tensor.group_size}" if isinstance(tensor, Int8Weight) else str(tensor.dtype)
    return f"{tuple(tensor.shape)} {kind}"


def _split(w: Int8Weight, size: int, dim: int = 0) -> list[Int8Weight]:
    if dim != 0 or w.shape[0] % size:
        raise ValueError(
            f"an int8 weight of {tuple(w.shape)} cannot be cut into pieces of {size} along dimension {dim}: expected equal "
            "numbers of whole rows (FSDP2's Shard(0) on a number of ranks that divides them); leave such layers float with "
            "insitu.quantize(model, skip=[pattern])"
        )
    return [w.with_data(q, s) for q, s in zip(torch.split(w.int_data, size), torch.split(w.scale, size), strict=True)]


def _rows(w: Int8Weight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Int8Weight:
    if dim != 0:
        raise ValueError("an int8 weight is cut by whole rows only: expected dimension 0; use dequantize()")
    return w.with_data(aten.slice(w.int_data, 0, start, end, step), aten.slice(w.scale, 0, start, end, step))


def _new_zeros(w: Int8Weight, size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Int8Weight:
    if len(size) != 2 or size[1] != w.shape[1]:
        raise ValueError(f"an int8 weight of zeros has {w.shape[1]} columns as the other: {tuple(size)} was asked for")
    device = w.device if device is None else device
    q = torch.zeros(tuple(size), dtype=torch.int8, device=device)
    return w.with_data(q, grouped(size[0], size[1], w.group_size, device).scale, dtype)


def _same(w: Int8Weight, *_: Any) -> Int8Weight:
    """FSDP2 asks for a flat view that it does not read, and for itself with ``as_strided``."""
    return w.with_data(w.int_data, w.scale)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _each(aten.detach),
    aten.alias.default: _each(aten.alias),
    aten.clone.default: _each(aten.clone),
    aten.empty_like.default: _each(lambda x, *, dtype=None, **how: aten.empty_like(x, **how)),
    aten._pin_memory.default: _each(aten._pin_memory),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.split.Tensor: _split,
    aten.slice.Tensor: _rows,
    aten.new_zeros.default: _new_zeros,
    aten.view.default: _same,
    aten.as_strided.default: _same,
}
torch.serialization.add_safe_globals([Int8Weight])
