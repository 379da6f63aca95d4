"""Products of bf16 matrices where the CPU has none: in float32, rounded once, as a bf16 unit would.

Without AVX-512 oneDNN takes no bf16, and torch's own loops multiply element by element: a backward pass of a linear layer then
takes fifteen times as long as in float32 (measured on an AMD CPU with AVX2: g W of 256 x 1536 x 576 in 250 ms, against 4).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FEW = 8  # rows: torch's own product of a vector reads bf16 as fast as memory gives it


def bf16_is_slow() -> bool:
    """Whether torch multiplies bf16 matrices on this CPU by loops of its own."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is not None and not asked()


def widen(model: nn.Module) -> nn.Module:
    """The model; its linear layers multiply bf16 in float32 where the CPU is slow otherwise. Weights stay what they are."""
    if bf16_is_slow():
        for module in model.modules():
            if type(module) is not nn.Linear:
                continue
            weight = module.weight.data
            if type(weight) is Tensor and weight.dtype == torch.bfloat16 and weight.is_cpu:  # and no shard
                module.__class__ = WideLinear
    return model


class WideLinear(nn.Linear):
    """A linear layer of bf16 whose products, forward and backward, are float32 and rounded once."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // max(1, input.shape[-1])
        if input.dtype != torch.bfloat16 or (rows < _FEW and not torch.is_grad_enabled()):
            return F.linear(input, self.weight, self.bias)
        return _Product.apply(input, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g, of_x, of_weight, of_bias = grad.float(), None, None, None
        if ctx.needs_input_grad[0]:
            of_x = (g @ weight.float()).to(x.dtype)
        rows = g.reshape(-1, g.shape[-1])
        if ctx.needs_input_grad[1]:
            of_weight = (rows.mT @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0).to(x.dtype)
        return of_x, of_weight, of_bias
