"""Which tensors go through a step together, and which backends they share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from insitu.optim.quantized import backend_for
from insitu.optim.step import Backend, choose
from insitu.optim.step.scratch import Scratch
from insitu.optim.task import Task

_ELEMENTS = 1 << 26  # of tensors that go together
_SHARE = 2  # that part of a step's scratch memory is a bundle's at most: larger ones would leave more of it empty


def bundled(
    tasks: Sequence[Task], together: Callable[[Task], Hashable], waiting: Callable[[Task], int], room: int
) -> list[list[Task]]:
    """The tasks by ``together``, where it is not None, in bundles of moderate size.

    First come those that hold the least memory beside the size of their gradient: a gradient whose R finds no room is read once
    more.

    Args:
        waiting: bytes of scratch memory that a tensor holds until the sums of all are known.
        room: bytes of scratch memory that a step has.
    """
    alike: dict[Hashable, list[Task]] = {}
    for i, task in enumerate(tasks):
        key = together(task)
        alike.setdefault(i if key is None else (key,), []).append(task)
    bundles: list[list[Task]] = []
    sized = [(waiting(some[0]), some) for some in alike.values()]
    for held, some in sorted(sized, key=lambda each: each[0] / max(1, each[1][0].gradient.nbytes)):
        bundles += _of_moderate_size(some, room // (_SHARE * held) if held else len(some))
    return bundles


def _of_moderate_size(tasks: list[Task], fitting: int) -> Iterator[list[Task]]:
    """Together while the calls cost more than the arithmetic, and at most ``fitting``."""
    num = max(1, min(fitting, _ELEMENTS // max(1, tasks[0].part.tensor.numel())))
    for first in range(0, len(tasks), num):
        yield tasks[first : first + num]


class Backends:
    """The backends of one half of a step, each made once."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._made: dict[tuple[str, torch.device], Backend] = {}

    def of(self, group: dict[str, Any], p: Tensor) -> Backend:
        chosen = backend_for(p, group["backend"]), p.device
        if chosen not in self._made:
            self._made[chosen] = choose(*chosen, self._scratch)
        return self._made[chosen]
