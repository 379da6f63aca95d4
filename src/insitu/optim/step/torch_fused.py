"""torch's own fused loops for CPUs, called so that an element has the same bits in a shard as in the whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LANES = 16  # of a vector of float32, at most


def possible(*tensors: Tensor) -> bool:
    """Whether torch's loops take them."""
    return all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors)


def adamw(
    W: Sequence[Tensor],
    G: Sequence[Tensor],
    M: Sequence[Tensor],
    V: Sequence[Tensor],
    *,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """torch's fused AdamW, in place."""
    sign = -1.0 if maximize else 1.0  # torch's own ``maximize`` would keep moments of -G
    updates = torch.tensor(float(step))

    def fused(w: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor]) -> None:
        torch._fused_adamw_(
            w, g, m, v, [], [updates] * len(w), lr=sign * float(lr), beta1=betas[0], beta2=betas[1],
            weight_decay=sign * weight_decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    _in_vectors(fused, W, G, M, V)


def adam(
    W: Sequence[Tensor],
    G: Sequence[Tensor],
    M: Sequence[Tensor],
    V: Sequence[Tensor],
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """W <- W - M^ / (sqrt(V^) + eps), in place, M and V too: torch's fused Adam with a rate of 1."""
    updates = torch.tensor(float(step))

    def fused(w: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor]) -> None:
        torch._fused_adam_(
            w, g, m, v, [], [updates] * len(w), lr=1.0, beta1=betas[0], beta2=betas[1],
            weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    _in_vectors(fused, W, G, M, V)


def _in_vectors(fused: Callable[..., None], *lists: Sequence[Tensor]) -> None:
    """Call a fused loop of torch that changes its tensors in place, with whole vectors only.

    What fills no vector it computes in another way, with other last places; as a part of a vector it has the same bits
    wherever it lies, in a shard or in the whole.
    """
    calls: list[list[Tensor]] = []
    rests: list[tuple[Tensor, Tensor]] = []
    for each in zip(*lists, strict=True):
        flat = [x.view(-1) for x in each]
        rest = flat[0].numel() % _LANES
        if rest < flat[0].numel():
            calls.append([x[: x.numel() - rest] for x in flat] if rest else flat)
        if rest:
            ends = [x[x.numel() - rest :] for x in flat]
            calls.append([torch.nn.functional.pad(end, (0, _LANES - rest)) for end in ends])
            rests += zip(ends, calls[-1], strict=True)
    if calls:
        fused(*map(list, zip(*calls, strict=True)))
    for end, padded in rests:
        end.copy_(padded[: end.numel()])
