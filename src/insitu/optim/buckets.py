"""Updates in the buckets of DistributedDataParallel, where the mean of the gradients is known first.

DDP averages a bucket after the hooks of its parameters, which see the gradient of this process alone. Its communication hook
is the public place that comes after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from insitu.optim.base import TensorWise


def update_after_averaging(ddp: Any, optimizer: TensorWise, update: Callable[[Tensor, Tensor], None]) -> None:
    """Have every bucket averaged as DDP itself does it, and then ``update(parameter, mean gradient)`` called for its tensors.

    Raises:
        TypeError: ``ddp`` is none.
        ValueError: what DDP, or this way of updating, does not offer together; a parameter that ``ddp`` does not average.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"ddp is a {type(ddp).__name__}: expected the DistributedDataParallel around the model, or False for processes "
            "that need no averaging"
        )
    if ddp.gradient_as_bucket_view or ddp.mixed_precision is not None:
        raise ValueError(
            "ddp has gradient_as_bucket_view=True or mixed_precision: expected neither with GradientRelease; .grad is freed "
            "anyway, and for the other there are bfloat16 parameters or autocast"
        )
    averaged = {p for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore}
    for place in optimizer.places():
        if place.parameter.requires_grad and place.parameter not in averaged:
            raise ValueError(
                f"{place.name} is not averaged by ddp: expected an optimizer of the parameters of that model alone; give the "
                "others an optimizer of their own"
            )

    def average(bucket: Any) -> Any:
        mean = bucket.buffer().mul_(1 / ddp.process_group.size())  # as DDP does it, whose division is a product
        dist.all_reduce(mean, group=ddp.process_group)
        for p, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            update(p, gradient)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(mean)
        return done

    try:
        ddp.register_comm_hook(None, lambda _, bucket: average(bucket))  # torch would read annotations, not strings
    except RuntimeError as error:
        raise ValueError(
            "ddp has a communication hook already: expected none, for it can have but one; wrap the model again"
        ) from error
