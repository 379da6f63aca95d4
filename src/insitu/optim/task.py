"""One tensor in one step: what its formulas read, and how what they give is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from insitu.optim.rounding import Precision
from insitu.optim.seeds import mix
from insitu.optim.sharding import Part, local_of, part_of
from insitu.optim.step import Backend


class Place(NamedTuple):
    """One parameter, and what its place among all says of it."""

    parameter: Tensor
    group: dict[str, Any]
    name: str  # for messages only
    position: int


class Task(NamedTuple):
    """One tensor in one step."""

    parameter: Tensor
    group: dict[str, Any]
    name: str
    part: Part
    gradient: Tensor  # of the part
    done: int  # updates so far
    state: dict[str, Any]
    backend: Backend

    def moments(self, *names: str) -> list[Tensor]:
        """State tensors, the parts that are here, in float32: themselves where they are stored so."""
        return [local_of(self.state[name]).float() for name in names]

    def store_moments(self, computed: dict[str, Tensor]) -> None:
        """Write back what :meth:`moments` gave, where that was a copy."""
        for name, value in computed.items():
            if (stored := local_of(self.state[name])).dtype != torch.float32:
                self.moment_precision(name).write(stored, value.view(stored.shape))

    def moment_precision(self, name: str) -> Precision:
        """Stochastic: rounded to nearest in bf16, a second moment times 0.999 would be itself, and never decay."""
        if self.state[name].dtype != torch.bfloat16:
            return Precision()
        salt = 1 + sum(name.encode())
        return Precision(mix(self.state["seed"], self.done, salt), part_of(self.state[name], name).start)

    @property
    def precision(self) -> Precision:
        """How the parameter is stored."""
        p, how = self.part.tensor, self.group["rounding"]
        if self.part.groups is not None:
            key = mix(self.state["seed"], self.done) if how == "stochastic" else None
            return Precision(key, self.part.start, groups=self.part.groups)
        if p.dtype == torch.bfloat16 and how == "stochastic":
            return Precision(mix(self.state["seed"], self.done), self.part.start)
        if "residual" in self.state:
            return Precision(residual=local_of(self.state["residual"]))
        return Precision()


@contextmanager
def contiguous(tasks: Sequence[Task], shape: Sequence[int]) -> Iterator[list[Tensor]]:
    """The weights, each as ``shape``, to be written; those that are not contiguous are copies, and copied back."""
    weights = [task.part.tensor for task in tasks]
    W = [weight.contiguous() for weight in weights]
    yield [w.view(shape) for w in W]
    for weight, w in zip(weights, W, strict=True):
        if w is not weight:
            weight.copy_(w)


def refuse_nonfinite(task: Task) -> None:
    """ValueError for its gradient, unless such gradients are to be skipped."""
    if task.group["nonfinite"] == "error":
        raise ValueError(
            f"the gradient of {task.name} is not finite (NaN or infinity, or a norm beyond 1e19): expected finite numbers; the "
            "tensor was not changed. Find the cause (a bad batch, a learning rate that is too high), or set nonfinite='skip' "
            "to leave such a tensor out of the step and count it in its state"
        )
