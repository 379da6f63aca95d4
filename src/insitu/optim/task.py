"""One tensor of an optimizer: what its formulas read in every step, and how what they give is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from insitu.optim.rounding import Precision
from insitu.optim.seeds import mix
from insitu.optim.sharding import Part, local_of, part_of

Held = TypeVar("Held")
# After so many updates. Copies, where they are needed, are made when it is asked for, and of a bundle at a time; everything
# else before.
Access = Callable[[int], AbstractContextManager[Held]]


class Place(NamedTuple):
    """One parameter, and what its place among all says of it."""

    parameter: Tensor
    group: dict[str, Any]
    name: str  # for messages only
    position: int


class Task(NamedTuple):
    """One tensor, as it is in every step."""

    parameter: Tensor
    group: dict[str, Any]
    name: str
    part: Part
    state: dict[str, Any]

    def moment_precision(self, name: str, done: int) -> Precision:
        """How a moment is stored after ``done`` updates.

        Stochastic: rounded to nearest in bf16, a second moment times 0.999 would be itself, and never decay.
        """
        if self.state[name].dtype != torch.bfloat16:
            return Precision()
        salt = 1 + sum(name.encode())
        return Precision(mix(self.state["seed"], done, salt), part_of(self.state[name], name).start)

    def precision(self, done: int) -> Precision:
        """How the parameter is stored after ``done`` updates."""
        p, how = self.part.tensor, self.group["rounding"]
        if self.part.groups is not None:
            key = mix(self.state["seed"], done) if how == "stochastic" else None
            return Precision(key, self.part.start, groups=self.part.groups)
        if p.dtype == torch.bfloat16 and how == "stochastic":
            return Precision(mix(self.state["seed"], done), self.part.start)
        if "residual" in self.state:
            return Precision(residual=local_of(self.state["residual"]))
        return Precision()


class Turn(NamedTuple):
    """One tensor in one step."""

    task: Task
    gradient: Tensor  # of the part
    done: int  # updates so far


def weights_of(tasks: Sequence[Task], shape: Sequence[int]) -> Access[list[Tensor]]:
    """Access to the weights, each as ``shape``, to be written; those that are not contiguous are copies, and copied back."""
    weights = [task.part.tensor for task in tasks]
    if all(weight.is_contiguous() for weight in weights):
        views = [weight.view(shape) for weight in weights]
        return lambda _: nullcontext(views)

    @contextmanager
    def access(_: int) -> Iterator[list[Tensor]]:
        W = [weight.contiguous() for weight in weights]
        yield [w.view(shape) for w in W]
        for weight, w in zip(weights, W, strict=True):
            if w is not weight:
                weight.copy_(w)

    return access


def moments_of(tasks: Sequence[Task], num: int) -> Access[tuple[list[Tensor], list[Tensor]]]:
    """Access to M and V of ``num`` matrices each, (num, ...) float32, to be changed: copies where they are stored otherwise."""
    names = ("exp_avg", "exp_avg_sq")
    stored = [[local_of(task.state[name]) for task in tasks] for name in names]
    shape = (num, *stored[0][0].shape[-2:])
    if all(x.dtype == torch.float32 for each in stored for x in each):
        M, V = ([x.view(shape) for x in each] for each in stored)
        return lambda _: nullcontext((M, V))

    @contextmanager
    def access(done: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        M, V = ([x.float().view(shape) for x in each] for each in stored)
        yield M, V
        for name, each, computed in zip(names, stored, (M, V), strict=True):
            for task, x, value in zip(tasks, each, computed, strict=True):
                task.moment_precision(name, done).write(x, value.view(x.shape))

    return access


def stored_as_kernels_take_it(tasks: Sequence[Task], states: Sequence[Sequence[Tensor]]) -> bool:
    """Whether these are whole tensors on a CPU, float32 or bf16, contiguous, with nothing beside them, and float32 states."""
    weights, how = [task.part.tensor for task in tasks], tasks[0].precision(0)
    return (
        all(w.device.type == "cpu" and w.dtype in (torch.float32, torch.bfloat16) for w in weights)
        and tasks[0].part.mesh is None
        and how.residual is None
        and how.groups is None
        and weights[0].numel() > 0
        and all(x.dtype == torch.float32 and x.is_contiguous() for each in states for x in each)
        and all(w.is_contiguous() for w in weights)
    )


def refuse_nonfinite(task: Task) -> None:
    """ValueError for its gradient, unless such gradients are to be skipped."""
    if task.group["nonfinite"] == "error":
        raise ValueError(
            f"the gradient of {task.name} is not finite (NaN or infinity, or a norm beyond 1e19): expected finite numbers; the "
            "tensor was not changed. Find the cause (a bad batch, a learning rate that is too high), or set nonfinite='skip' "
            "to leave such a tensor out of the step and count it in its state"
        )
