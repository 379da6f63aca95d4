"""float16 and float8 where the hardware has neither: numbers are rounded through the type, products are computed in float32.

Each linear layer multiplies what the type leaves of its input and weight, and its backward pass what is left of the gradient;
sums are float32, as on the hardware. What lies between (normalisation, softmax, the products of attention) stays float32: the
loss of a run under the type can be measured so, its speed and memory cannot.

    float16     inputs, weights, outputs and all gradients are float16; gradients are carried times the loss scale, as
                torch.amp.GradScaler does: it halves when a gradient overflows, whose step is left out, and doubles after 2,000
                steps without
    float8      inputs and weights e4m3, gradients e5m2, each tensor scaled to the type's largest number (torchao's recipe
                "tensorwise"); outputs and weight gradients float32
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from insitu.optim.quantized import Int8Weight


@dataclass
class LossScale:
    """What gradients are multiplied by before they are rounded; a power of two, so nothing else changes."""

    value: float = 1.0


def half(x: Tensor, scale: LossScale | None = None) -> Tensor:
    """``x`` as float16 has it, in its own type; with a scale, x times it is rounded and divided again. Overflow is inf."""
    if scale is None:
        return x.to(torch.float16).to(x.dtype)
    return (x * scale.value).to(torch.float16).to(x.dtype) / scale.value


def eighth(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as a float8 type has it after scaling its largest magnitude to the type's, in its own type. What is not finite
    stays so."""
    largest = x.detach().abs().amax() if x.numel() else x.new_zeros(())
    if not torch.isfinite(largest):
        return x
    scale = torch.finfo(dtype).max / largest.float().clamp(min=1e-12)
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


class _Linear(torch.autograd.Function):
    """y = x W^T + b on rounded factors; ``scale`` is the loss scale of float16, or None for float8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, scale: LossScale | None) -> Tensor:
        ctx.scale, ctx.bias = scale, b is not None
        if scale is not None:
            x, W = half(x), half(W)
            y = half(nn.functional.linear(x, W, b))
        else:
            x, W = eighth(x, torch.float8_e4m3fn), eighth(W, torch.float8_e4m3fn)
            y = nn.functional.linear(x, W, b)
        ctx.save_for_backward(x, W)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        x, W = ctx.saved_tensors
        to_b = g.reshape(-1, g.shape[-1]).sum(0) if ctx.bias else None  # no product
        g = half(g, ctx.scale) if ctx.scale is not None else eighth(g, torch.float8_e5m2)
        to_x, to_W = g @ W, g.reshape(-1, g.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        if ctx.scale is not None:
            to_x, to_W = half(to_x, ctx.scale), half(to_W, ctx.scale)
            to_b = half(to_b, ctx.scale) if to_b is not None else None
        return to_x, to_W, to_b, None


def emulate(layers: list[nn.Linear], scale: LossScale | None) -> None:
    """Let ``layers`` compute so from now on. Weights, their names and their type stay as they are."""
    for layer in layers:
        # On the instance: a subclass or a parametrisation would show in the checkpoint's names.
        layer.forward = partial(_forward, layer, scale)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, scale: LossScale | None, x: Tensor) -> Tensor:
    if isinstance(layer.weight, Int8Weight):
        raise ValueError("precision.compute='fp16' and 'fp8' are not emulated on int8 weights; compute in fp32 or bf16")
    made: Tensor = _Linear.apply(x, layer.weight, layer.bias, scale)  # type: ignore[no-untyped-call]
    return made


class DynamicLossScale(TrainerCallback, ExportableState):  # type: ignore[misc]
    """torch.amp.GradScaler's rule for emulated float16; its state is saved with Trainer's. Unlike there the learning rate
    schedule goes on in a step that is left out."""

    def __init__(self, scale: LossScale, start: float = 2.0**16, interval: int = 2000) -> None:
        self.scale = scale
        self.interval = interval
        self.value = start
        self.good = self.skipped = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"value": self.value, "good": self.good, "skipped": self.skipped}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Trainer restores callbacks by from_state only on request; what is saved is taken here.
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        for name, value in saved.get("attributes", {}).items() if state.global_step else ():
            setattr(self, name, value)
        self.scale.value = self.value

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        with_gradient = [p for p in model.parameters() if p.grad is not None]
        if all(bool(p.grad.isfinite().all()) for p in with_gradient if p.grad is not None):
            self.good += 1
            if self.good == self.interval:
                self.value, self.good = self.value * 2, 0
        else:
            for p in with_gradient:
                p.grad = None  # an optimizer leaves out what has no gradient
            self.value, self.good, self.skipped = self.value / 2, 0, self.skipped + 1
            if self.value < 1 or not math.isfinite(self.value):
                raise ValueError(
                    "precision.compute='fp16': gradients overflow at any loss scale, so the loss itself is not finite; lower "
                    "the learning rate, or compute in bf16"
                )
        self.scale.value = self.value
