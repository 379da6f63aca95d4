"""What a step has looked up, for the next one: on a CPU that costs a tenth to a quarter of a step.

All of it follows from parameters, state and options, and is found again as soon as one of them is another. Views of the
weights and of the moments are held from step to step, so only of tensors on a CPU: on a device that would keep memory from
whoever moves a model away in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor, strided

from insitu.optim.bundles import Bundle, Step
from insitu.optim.task import Turn
from insitu.optim.tensors import readable

_FREE = ("params", "param_names", "lr")  # what may change between steps without consequences


class Kept:
    """The bundles of a step, and what they hold for."""

    def __init__(self, groups: Sequence[dict[str, Any]], bundles: Sequence[Bundle]) -> None:
        self._groups, self._options = list(groups), [_options(group) for group in groups]
        self._bundles = bundles
        self._tasks = [task for bundle in bundles for task in bundle.tasks]
        self._values = [value for task in self._tasks for value in task.state.values()]
        self._held = [x for x in self._values if isinstance(x, Tensor)]
        self._facts = self._look()

    def again(
        self, groups: Sequence[dict[str, Any]], stepped: Sequence[Tensor], state: dict[Tensor, Any]
    ) -> list[Step] | None:
        """The bundles with their new gradients; None if anything is not what it was.

        Args:
            stepped: all parameters that have a gradient.
        """
        same = (
            len(stepped) == len(self._tasks)
            and set(map(id, stepped)) == {id(task.parameter) for task in self._tasks}
            and _are(self._groups, groups)
            and [_options(group) for group in groups] == self._options
            and all(state.get(task.parameter) is task.state for task in self._tasks)
            and _are(self._values, [value for task in self._tasks for value in task.state.values()])
            and self._look() == self._facts
        )
        if not same:
            return None
        steps = []
        for bundle in self._bundles:
            done = {int(task.state["step"]) for task in bundle.tasks}
            if len(done) > 1:
                return None
            gradients = [task.parameter.grad for task in bundle.tasks]
            steps.append(Step(bundle, [g for g in gradients if g is not None], done.pop()))
        return steps

    def _look(self) -> list[list[Any]]:
        """What bundles depend on besides the options, and which objects the state has."""
        params = [task.parameter for task in self._tasks]
        gradients = [p.grad for p in params if p.grad is not None]
        return [
            [p.data_ptr() for p in params],
            [p.shape for p in params],
            [p.dtype for p in params],
            [p.is_contiguous() for p in params],
            list(map(type, gradients)),
            [g.dtype for g in gradients],
            [g.layout is strided and g.is_contiguous() for g in gradients],
            [x.data_ptr() for x in self._held],
        ]


def keepable(turn: Turn) -> bool:
    """Whether it may be kept: a whole tensor on a CPU, stored as it is, its gradient as well."""
    task, g = turn.task, turn.gradient
    return readable(task.parameter) and g is task.parameter.grad and task.part.mesh is None and task.part.groups is None


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _FREE}


def _are(values: Sequence[object], others: Sequence[object]) -> bool:
    """Whether they are the same objects."""
    return len(values) == len(others) and all(map(is_, values, others))
