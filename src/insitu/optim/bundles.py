"""Which tensors go through a step together, and which backends they share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from insitu.optim.counting import HostCounts
from insitu.optim.exchange import Links, Plan
from insitu.optim.quantized import backend_for
from insitu.optim.step import Backend, choose
from insitu.optim.step.scratch import Scratch
from insitu.optim.task import Done, Task, Turn

_ELEMENTS = 1 << 26  # of tensors that go together
_SHARE = 2  # that part of a step's scratch memory is a bundle's at most: larger ones would leave more of it empty

Write = Callable[[Backend], None]
# The first half of a step, of gradients and after so many updates; its result is the second, which writes the weights.
Bound = Callable[[Sequence[Tensor], Done, Backend], Plan[Write]]


class Bundle(NamedTuple):
    """Tensors that go through a step together, and what carries them through it."""

    tasks: list[Task]
    plan: Bound
    links: Links
    counts: HostCounts | None  # their updates, where the host has them
    nbytes: int  # of the largest


class Step(NamedTuple):
    """A bundle in one step."""

    bundle: Bundle
    gradients: list[Tensor]
    done: Done  # updates so far, of each


def bundled(
    turns: Sequence[Turn], together: Callable[[Turn], Hashable], waiting: Callable[[Task], int], room: int
) -> list[list[Turn]]:
    """The tensors by ``together``, where it is not None, in bundles of moderate size.

    First come those that hold the least memory beside the size of their gradient: a gradient whose R finds no room is read once
    more.

    Args:
        waiting: bytes of scratch memory that a tensor holds until the sums of all are known.
        room: bytes of scratch memory that a step has.
    """
    alike: dict[Hashable, list[Turn]] = {}
    for i, turn in enumerate(turns):
        key = together(turn)
        alike.setdefault(i if key is None else (key,), []).append(turn)
    bundles: list[list[Turn]] = []
    sized = [(waiting(some[0].task), some) for some in alike.values()]
    for held, some in sorted(sized, key=lambda each: each[0] / max(1, each[1][0].gradient.nbytes)):
        bundles += _of_moderate_size(some, room // (_SHARE * held) if held else len(some))
    return bundles


def _of_moderate_size(turns: list[Turn], fitting: int) -> Iterator[list[Turn]]:
    """Together while the calls cost more than the arithmetic, and at most ``fitting``."""
    num = max(1, min(fitting, _ELEMENTS // max(1, turns[0].task.part.tensor.numel())))
    for first in range(0, len(turns), num):
        yield turns[first : first + num]


class Backends:
    """The backends of one half of a step, each made once; "fused" only where a step may be done ``at_once``."""

    def __init__(self, scratch: Scratch, at_once: bool) -> None:
        self._scratch, self._at_once = scratch, at_once
        self._made: dict[tuple[str, torch.device], Backend] = {}

    def of(self, group: dict[str, Any], p: Tensor) -> Backend:
        name = backend_for(p, group["backend"])
        chosen = "native" if name == "fused" and not self._at_once else name, p.device
        if chosen not in self._made:
            self._made[chosen] = choose(*chosen, self._scratch)
        return self._made[chosen]
