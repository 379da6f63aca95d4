"""What a step has from the host, and a captured one cannot have: see :meth:`insitu.optim.base.TensorWise.advance`.

A CUDA graph repeats its kernels with the numbers and addresses of the capture. So what differs from step to step is on the
device: the updates of each tensor, from which bias corrections and random bits are computed there, and the projections,
which the host draws, in memory that stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from insitu.optim.projection import Layout, Projection, Sketch, make, moved
from insitu.optim.sharding import Part
from insitu.optim.task import Clock, Task, refuse_nonfinite
from insitu.optim.tensors import readable

_BACKENDS = ("auto", "reference", "triton")
_OF_LR = ", or give lr as a tensor on the device, which may be filled"


class Counters:
    """What the host knows of the counts on the devices, and what a captured step reads of the host's."""

    def __init__(self) -> None:
        self._seeds: dict[Tensor, Tensor] = {}
        self._skipped: dict[Tensor, int] = {}  # when they were read last
        self._counted: dict[torch.device, list[Tensor]] = {}  # what is added up to the totals
        self._totals: dict[torch.device, Tensor] = {}  # of skipped gradients, int64, in memory that the host reads
        self._known: dict[torch.device, int] = {}
        self._options: list[dict[str, Any]] | None = None  # of the capture
        self.left = 0.0  # steps that may start before a projection can be due

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._seeds

    def clock(self, tasks: Sequence[Task]) -> Clock:
        """Of tensors that something was renewed of."""
        seeds = [self._seeds[task.parameter] for task in tasks]
        return Clock(torch.stack([task.state["step"] for task in tasks]), torch.stack(seeds))

    def capture(self, groups: Sequence[dict[str, Any]]) -> None:
        """A step is captured now."""
        self._options = list(map(_options, groups))

    def refuse_other_than_captured(self, groups: Sequence[dict[str, Any]]) -> None:
        """RuntimeError where the graph would not do what the optimizer is told now."""
        if self._options is None:
            raise RuntimeError(
                "advance(), but no step of this optimizer was captured, or it was before load_state_dict(): expected it before "
                "the replays of a CUDA graph that updates the state that is here now; capture step() first"
            )
        found = list(map(_options, groups))
        if found == self._options:
            return
        for then, now in zip(self._options, found, strict=False):
            for name in then.keys() | now.keys():
                if then.get(name) != now.get(name):
                    raise RuntimeError(
                        f"{name} is {now.get(name)!r}, but was {then.get(name)!r} when the step was captured, and a CUDA graph "
                        f"repeats what it was: expected no change; capture again{_OF_LR if name == 'lr' else ''}"
                    )
        raise RuntimeError(f"{len(found)} groups, but {len(self._options)} when the step was captured: capture again")

    def quiet(self) -> bool:
        """Whether nothing asks for the host, as far as it knows without waiting."""
        return self.left > 0 and all(int(total) == self._known[device] for device, total in self._totals.items())

    def _read(self, tasks: Sequence[Task]) -> list[tuple[int, bool]]:
        """The updates of each tensor, and whether a gradient was skipped since this was read last. Waits for the devices."""
        by_device: dict[torch.device, list[Task]] = {}
        for task in tasks:
            by_device.setdefault(task.parameter.device, []).append(task)
            p = task.parameter
            if p not in self._seeds or self._seeds[p].device != p.device:
                self._seeds[p] = torch.tensor(task.state["seed"], device=p.device)
        found: dict[Tensor, tuple[int, bool]] = {}
        for device, there in by_device.items():
            both = torch.stack([task.state[count] for task in there for count in ("step", "skipped")])
            for task, (done, skipped) in zip(there, both.view(-1, 2).tolist(), strict=True):
                before = self._skipped.setdefault(task.parameter, skipped)
                self._skipped[task.parameter] = skipped
                found[task.parameter] = done, skipped > before
            self._counted[device] = [task.state["skipped"] for task in there]
            self._known[device] = int(both[1::2].sum())
            if device not in self._totals:
                self._totals[device] = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
            self._totals[device].fill_(self._known[device])
        return [found[task.parameter] for task in tasks]

    def renew(self, tasks: Sequence[Task], put: Callable[[Task, int], float]) -> None:
        """What the host chooses by the number of updates: ``put`` says for how many more that holds.

        Raises:
            ValueError: of the first tensor whose gradient was not finite, unless such gradients are to be skipped.
        """
        read = self._read(tasks)
        self.left = min((put(task, done) for task, (done, _) in zip(tasks, read, strict=True)), default=inf)
        for task, (_, newly_skipped) in zip(tasks, read, strict=True):
            if newly_skipped:
                refuse_nonfinite(task)

    def observe(self) -> None:
        """The end of a step, part of what is captured: how many gradients were skipped goes where the host finds it."""
        for device, total in self._totals.items():
            total.copy_(torch.stack(self._counted[device]).sum(), non_blocking=True)


@dataclass
class _Held:
    made_of: tuple[object, ...]
    index: int
    on_device: Tensor  # the index, 0-dim int64
    projection: Projection


class HeldProjections:
    """The projections of steps that may be captured: one per parameter, where it was first put."""

    def __init__(self) -> None:
        self._held: dict[Tensor, _Held] = {}

    def renew(self, parameter: Tensor, kind: str, seed: int, index: int, size: Layout) -> None:
        """Put there the projection of refresh ``index``, as :func:`insitu.optim.projection.make` draws it."""
        made_of, device = (kind, seed, size, parameter.device), parameter.device
        held = self._held.get(parameter)
        if held is not None and held.made_of == made_of:
            if held.index == index:
                return
            for memory, fresh in zip(_tensors(held.projection), _tensors(make(kind, seed, index, size)), strict=True):
                memory.copy_(fresh)
            held.on_device.fill_(index)
            held.index = index
            return
        made = moved(make(kind, seed, index, size), device)
        self._held[parameter] = _Held(made_of, index, torch.tensor(index, device=device), made)

    def get(self, parameter: Tensor) -> Projection:
        """What lies there."""
        return self._held[parameter].projection

    def due(self, tasks: Sequence[Task], clock: Clock) -> Tensor:
        """Whether what lies there is of an earlier refresh than the update to come: (T,) bool, on the device."""
        indices = torch.stack([self._held[task.parameter].on_device for task in tasks])
        due: Tensor = indices != clock.done // tasks[0].group["refresh"]
        return due


def _tensors(projection: Projection) -> list[Tensor]:
    return [projection.order, projection.signs] if isinstance(projection, Sketch) else [projection]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What a graph repeats of a group."""
    tensor = isinstance(group["lr"], Tensor)
    return {k: v for k, v in group.items() if k not in ("params", "param_names") and not (k == "lr" and tensor)}


def refuse_uncapturable(p: Tensor, group: dict[str, Any], name: str, part: Part) -> None:
    """ValueError where a step that could be captured is not possible."""
    if part.mesh is not None:
        raise ValueError(
            f"{name} is sharded (DTensor): expected a whole tensor for capturable=True; use capturable=False"
        )
    if group["backend"] not in _BACKENDS:
        raise ValueError(
            f"backend={group['backend']!r} with capturable=True: expected one of {', '.join(map(repr, _BACKENDS))}; the others "
            "have numbers of a step from the host"
        )
    if readable(p) and group["backend"] == "auto":
        raise ValueError(
            f"capturable=True, but {name} is on {p.device}: expected a CUDA device, since the step is to be part of a CUDA "
            "graph; use capturable=False (or name backend='reference', to try it slowly)"
        )
    if isinstance(group["lr"], Tensor) and group["lr"].device != p.device:
        raise ValueError(
            f"lr is a tensor on {group['lr'].device}, but {name} is on {p.device}: expected it there with capturable=True; "
            f"give lr.to({str(p.device)!r}), and change it with lr.fill_()"
        )
