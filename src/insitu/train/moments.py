"""How an optimizer keeps its moments between steps: in float32, bfloat16, float16 or float8, with any torch optimizer.

A step hook widens them to float32 before a step and narrows them after it, so what is counted between steps is narrow, and the
peak within a step is not: for that an optimizer must do it tensor by tensor, as this package's do for bfloat16.

    fp16, fp8    blocks of 256 numbers, each scaled so that its largest is the type's; 2 or 1 bytes and 4 per block
    bf16         the range of float32, so no scale; 2 bytes

Second moments are kept as their roots: v spans twice the decades of m, and where v is rounded to 0 and m is not, m / sqrt(v)
has no bound. Rounding is stochastic: with beta_2 = 0.999 a step changes v by a thousandth, which rounding to nearest would drop
every time (bfloat16 has steps of 1/128, e4m3 of 1/8). The random numbers are a function of seed, parameter and step, so a
resumed run rounds as the whole one does.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from insitu.optim.base import TensorWise
from insitu.optim.seeds import mix

BLOCK = 256
_SQUARED = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
_KNOWN = _SQUARED | {"exp_avg"}
_SCALE = "_scale"


class Format(NamedTuple):
    """A type: digits of its mantissa, exponent of its smallest normal number, its largest number if blocks are scaled to it."""

    dtype: torch.dtype
    digits: int
    exponent: int
    largest: float | None


FORMATS = {
    "bf16": Format(torch.bfloat16, 7, -126, None),
    "fp16": Format(torch.float16, 10, -14, 65504.0),
    "fp8": Format(torch.float8_e4m3fn, 3, -6, 448.0),
}


def store_moments(optimizer: Optimizer, kind: str, seed: int = 0) -> None:
    """Keep the moments of ``optimizer`` as ``kind`` from its next step on: "fp32" (nothing to do), "bf16", "fp16" or "fp8".

    Raises:
        ValueError: an unknown kind; one that this package's optimizers do not have; at a step, state that is not known.
    """
    if kind == "fp32":
        return
    if kind not in FORMATS:
        raise ValueError(f"precision.moments={kind!r}; expected 'fp32', 'bf16', 'fp16' or 'fp8'")
    if isinstance(optimizer, TensorWise):
        if kind != "bf16" or any("moments" not in group for group in optimizer.param_groups):
            raise ValueError(
                f"precision.moments={kind!r}: {type(optimizer).__name__} keeps its moments in 'fp32' or 'bf16' by itself"
            )
        for group in optimizer.param_groups:
            group["moments"] = "bfloat16"
        return
    format = FORMATS[kind]
    optimizer.register_step_pre_hook(lambda chosen, *_: _widen(chosen))
    optimizer.register_step_post_hook(lambda chosen, *_: _narrow(chosen, format, seed))


def encode(x: Tensor, format: Format, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
    """Round float32 ``x``, of any shape, stochastically; ``uniform`` is of its shape, in [0, 1). Returns the numbers and, where
    the type needs them, the scales of the blocks of 256, float32."""
    scales = None
    if format.largest is not None:
        flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        scales = flat.abs().amax(1) / format.largest
        # Below that the inverse is infinite: a row of an embedding whose token does not come decays so far in 900 steps.
        scales = torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 0.0)
        x = _times(x, torch.where(scales > 0, 1 / scales, 0.0))
    # The distance between neighbours of the type at x, a power of two.
    _, exponent = torch.frexp(x)
    spacing = torch.ldexp(torch.ones_like(x), (exponent - 1).clamp(min=format.exponent) - format.digits)
    whole = torch.floor(x / spacing)
    # Not floor(x / spacing + uniform): that sum is rounded itself, and could move what is a number of the type already.
    rounded = (whole + (1 - uniform < x / spacing - whole)) * spacing
    if format.largest is not None:
        rounded = rounded.clamp(-format.largest, format.largest)
    return rounded.to(format.dtype), scales


def decode(numbers: Tensor, scales: Tensor | None) -> Tensor:
    """What :func:`encode` has kept, float32."""
    return numbers.float() if scales is None else _times(numbers.float(), scales)


def _times(x: Tensor, per_block: Tensor) -> Tensor:
    return (x.reshape(-1) * per_block.repeat_interleave(BLOCK)[: x.numel()]).view(x.shape)


def _moments(optimizer: Optimizer) -> Iterator[tuple[int, Tensor, dict[str, Any], str]]:
    """Every moment there is: number of the parameter, the parameter, its state, and the name in it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(parameters):
        state = optimizer.state.get(p, {})
        for name in [name for name in state if not name.endswith(_SCALE)]:
            value = state[name]
            if name in _KNOWN and value is not None:
                if isinstance(value, DTensor):
                    raise ValueError(
                        "precision.moments: moments of sharded tensors are not narrowed yet; keep moments='fp32'"
                    )
                yield index, p, state, name
            elif isinstance(value, Tensor) and value.is_floating_point() and value.numel() == p.numel() > 1:
                raise ValueError(
                    f"precision.moments: {type(optimizer).__name__} keeps {name!r}, and how that may be rounded is "
                    "not known; keep moments='fp32'"
                )


def _widen(optimizer: Optimizer) -> None:
    for _, _, state, name in _moments(optimizer):
        value = decode(state[name], state.pop(name + _SCALE, None))
        state[name] = value.square() if name in _SQUARED else value


def _narrow(optimizer: Optimizer, format: Format, seed: int) -> None:
    for index, p, state, name in _moments(optimizer):
        value = state[name].float()
        drawn = torch.Generator(p.device).manual_seed(mix(seed, index, int(state["step"]), name in _SQUARED))
        uniform = torch.rand(value.shape, generator=drawn, device=p.device)
        numbers, scales = encode(value.sqrt() if name in _SQUARED else value, format, uniform)
        state[name] = numbers
        if scales is not None:
            state[name + _SCALE] = scales
