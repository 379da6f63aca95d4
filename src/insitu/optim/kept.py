"""What a step has looked up, for the next one: on a CPU that costs a tenth to a quarter of a step.

All of it follows from parameters, state and options, and is found again as soon as one of them is another. Views of the
weights and of the moments are held from step to step, so only of tensors on a CPU: on a device that would keep memory from
whoever moves a model away in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, strided

from insitu.optim.bundles import Bundle, Step
from insitu.optim.task import Turn
from insitu.optim.tensors import readable

_FREE = ("params", "param_names", "lr")  # what may change between steps without consequences


class Kept:
    """The bundles of a step of ``stepped``, all parameters that have a gradient, and what they hold for."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        bundles: Sequence[Bundle],
        stepped: Sequence[Tensor],
        state: dict[Tensor, Any],
    ) -> None:
        self._groups, self._options = list(groups), [_options(group) for group in groups]
        self._bundles, self._stepped = bundles, list(stepped)
        self._params = [task.parameter for bundle in bundles for task in bundle.tasks]
        self._known, self._states = list(state), list(state.values())
        self._values = self._state_values()
        # Whose addresses the kernels have.
        self._held = [
            x for p in self._params for name, x in state[p].items() if isinstance(x, Tensor) and name != "skipped"
        ]
        self._facts = self._look([p.grad for p in self._params if p.grad is not None])

    def again(
        self, groups: Sequence[dict[str, Any]], stepped: Sequence[Tensor], state: dict[Tensor, Any]
    ) -> list[Step] | None:
        """The bundles with their new gradients; None if anything is not what it was."""
        if not (_are(self._groups, groups) and _are(self._stepped, stepped)):
            return None
        gradients = [p.grad for p in self._params if p.grad is not None]
        same = (
            [_options(group) for group in groups] == self._options
            and _are(self._known, list(state))
            and _are(self._states, list(state.values()))
            and _are(self._values, self._state_values())
            and self._look(gradients) == self._facts
        )
        if not same:
            return None
        steps, first = [], 0
        for bundle in self._bundles:
            last = first + len(bundle.tasks)
            done = None if bundle.counts is None else bundle.counts.common()
            if done is None:
                return None
            steps.append(Step(bundle, gradients[first:last], done))
            first = last
        return steps

    def _state_values(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._states)))

    def _look(self, gradients: Sequence[Tensor]) -> list[list[Any]]:
        """What bundles depend on besides the options, and which objects the state has."""
        # One pass per fact: a tuple per tensor would have the garbage collector run in every step.
        return [
            list(map(Tensor.data_ptr, self._params)),
            [p.shape for p in self._params],
            [p.dtype for p in self._params],
            list(map(Tensor.is_contiguous, self._params)),
            list(map(type, gradients)),
            [g.dtype for g in gradients],
            [g.layout is strided and g.is_contiguous() for g in gradients],
            list(map(Tensor.data_ptr, self._held)),
        ]


def keepable(turn: Turn) -> bool:
    """Whether it may be kept: a whole tensor on a CPU, stored as it is, its gradient as well."""
    task, g = turn.task, turn.gradient
    by_host = turn.done is not None and readable(task.parameter)
    return by_host and g is task.parameter.grad and task.part.mesh is None and task.part.groups is None


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _FREE}


def _are(values: Sequence[object], others: Sequence[object]) -> bool:
    """Whether they are the same objects."""
    return len(values) == len(others) and all(map(is_, values, others))
