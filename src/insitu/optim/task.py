"""One tensor of an optimizer: what its formulas read in every step, and how what they give is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from insitu.optim.rounding import Precision
from insitu.optim.seeds import mix, mix_on_device
from insitu.optim.sharding import Part, local_of, part_of


class Clock(NamedTuple):
    """The updates so far of T tensors whose step may be captured: known on their device only. Both (T,) int64."""

    done: Tensor
    seeds: Tensor

    def keys(self, *salts: int) -> Iterator[Tensor]:
        """The hash of seed, updates and ``salts`` of each tensor, 0-dim int64: what :func:`mix` of them is."""
        return iter(mix_on_device(self.seeds, self.done, *salts).unbind())


Held = TypeVar("Held")
Done = int | Clock  # updates so far of the tensors of a bundle
# After so many updates. Copies, where they are needed, are made when it is asked for, and of a bundle at a time; everything
# else before.
Access = Callable[[Done], AbstractContextManager[Held]]


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
        return Precision(mix(self.state["seed"], done, _salt(name)), part_of(self.state[name], name).start)

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
    done: int | None  # updates so far; None where only the device counts them


def precisions(tasks: Sequence[Task], done: Done) -> list[Precision]:
    """How the parameters are stored after ``done`` updates."""
    if isinstance(done, int):
        return [task.precision(done) for task in tasks]
    return _keyed([task.precision(0) for task in tasks], done)


def moment_precisions(tasks: Sequence[Task], name: str, done: Done) -> list[Precision]:
    """How a moment of each is stored."""
    if isinstance(done, int):
        return [task.moment_precision(name, done) for task in tasks]
    return _keyed([task.moment_precision(name, 0) for task in tasks], done, _salt(name))


def _keyed(those_of_step_0: list[Precision], clock: Clock, *salts: int) -> list[Precision]:
    if all(how.key is None for how in those_of_step_0):
        return those_of_step_0
    keys = clock.keys(*salts)
    return [how if how.key is None else how._replace(key=key) for how, key in zip(those_of_step_0, keys, strict=True)]


def _salt(name: str) -> int:
    return 1 + sum(name.encode())


def weights_of(tasks: Sequence[Task], shape: Sequence[int]) -> Access[list[Tensor]]:
    """Access to the weights, each as ``shape``, to be written; those that are not contiguous are copies, and copied back."""
    weights = [task.part.tensor for task in tasks]
    if all(weight.is_contiguous() for weight in weights):
        views = [weight.view(shape) for weight in weights]
        return lambda _: nullcontext(views)

    @contextmanager
    def access(_: Done) -> Iterator[list[Tensor]]:
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
    def access(done: Done) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        M, V = ([x.float().view(shape) for x in each] for each in stored)
        yield M, V
        for name, each, computed in zip(names, stored, (M, V), strict=True):
            for how, x, value in zip(moment_precisions(tasks, name, done), each, computed, strict=True):
                how.write(x, value.view(x.shape))

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
