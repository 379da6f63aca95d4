"""What an optimizer of this package says of a tensor; :mod:`insitu.optim.base` carries all tensors through a step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import inf
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from insitu.optim.bundles import Bound
from insitu.optim.exchange import Links
from insitu.optim.sharding import Part
from insitu.optim.task import Clock, Task, Turn


class Formulas(Optimizer):
    """What is not implemented here every optimizer must; the rest is for a tensor of which nothing special is known."""

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for the first bad option of a group."""
        raise NotImplementedError

    def _check_tensor(self, p: Tensor, group: dict[str, Any], name: str) -> None:
        """Raise ValueError for a tensor that this optimizer cannot take."""

    def _new_state(self, p: Tensor, group: dict[str, Any], part: Part, name: str) -> dict[str, Any]:
        """What a tensor's state holds besides ``step``, ``skipped``, ``seed`` and ``residual``."""
        raise NotImplementedError

    def _fits(self, p: Tensor, group: dict[str, Any], name: str, state: dict[str, Any]) -> bool:
        """Whether ``state`` is of the shape that the options of the group ask for now."""
        raise NotImplementedError

    def _links(self, task: Task) -> Links:
        """Over which process groups the tensor's sums go."""
        return task.part.links

    def _together(self, turn: Turn) -> Hashable:
        """Equal for tensors that may go through a step together, as one plan; None for one that goes alone."""
        return None

    def _waiting(self, task: Task) -> int:
        """Bytes of scratch memory that the tensor holds until the sums of all tensors are known."""
        return 0

    def _renew(self, task: Task, done: int) -> float:
        """Put what the host chooses by the number of updates where a captured step finds it: for how many more it holds."""
        return inf

    def _due(self, tasks: Sequence[Task], clock: Clock) -> Tensor | None:
        """Of which of these tensors the host has to renew something first, (T,) bool on the device; None: of none."""
        return None

    def _bind(self, tasks: Sequence[Task]) -> Bound:
        """What carries tensors that go together through a step: the first half, whose result is the second.

        Here is looked up what does not change from step to step. The first row of the plan's Sum is |G|^2, of each tensor if
        there are several. Where that is 0 or not finite, nothing of the tensor may change.
        """
        raise NotImplementedError
