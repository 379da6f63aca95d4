"""How many updates a tensor has had, known to the host without waiting for the device.

A step whose gradient is all zero or not finite does not count, so the counts follow from gradients and live on the device,
while the host needs them to choose the projection and the random bits. On a CUDA device they are copied at the end of each
step, asynchronously, and read at the start of the next one, when the copy has long arrived.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from insitu.optim.tensors import readable


class HostCounts:
    """Counts in the memory of the host, 0-dim int64 each: torch takes 2 microseconds to add 1 to one."""

    def __init__(self, counts: Sequence[Tensor]) -> None:
        self._held = list(counts)  # as long as the numbers are used
        self._numbers = [ctypes.c_int64.from_address(count.data_ptr()) for count in counts]

    @staticmethod
    def of(counts: Sequence[Tensor]) -> HostCounts | None:
        """None where one of them is not there."""
        return HostCounts(counts) if all(x.dtype == torch.int64 and readable(x) for x in counts) else None

    def advance(self) -> None:
        """Add 1 to each."""
        for number in self._numbers:
            number.value += 1

    def common(self) -> int | None:
        """What all of them are, or None if they differ."""
        found = {number.value for number in self._numbers}
        return found.pop() if len(found) == 1 else None


class _Copy(NamedTuple):
    counts: Tensor  # (tensors, 2) int64, pinned host memory: updates, and gradients that were skipped
    arrived: torch.cuda.Event


class StepCounts:
    """The host's copy of the ``step`` and ``skipped`` entries of an optimizer's state."""

    def __init__(self) -> None:
        self._copies: dict[Tensor, tuple[_Copy, int]] = {}
        self._skipped: dict[Tensor, int] = {}

    def read(self, parameter: Tensor, state: dict[str, Any]) -> tuple[int, bool]:
        """The updates of one parameter, and whether a gradient was skipped since this was asked last."""
        known = self._copies.get(parameter)
        if known is None:
            step, skipped = int(state["step"]), int(state["skipped"])
            if readable(parameter):  # who steps it sees what is skipped, and says so at once
                return step, False
        else:
            copy, row = known
            copy.arrived.synchronize()
            step, skipped = copy.counts[row].tolist()
        before = self._skipped.setdefault(parameter, skipped)
        self._skipped[parameter] = skipped
        return step, skipped > before

    def observe(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Start copying the counts of the parameters that were stepped."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter in states:
            if parameter.device.type == "cuda":
                by_device.setdefault(parameter.device, []).append(parameter)
        for device, parameters in by_device.items():
            with torch.cuda.device(device):
                both = [states[p][count] for p in parameters for count in ("step", "skipped")]
                counts = torch.empty(len(parameters), 2, dtype=torch.int64, pin_memory=True)
                counts.copy_(torch.stack(both).view(-1, 2), non_blocking=True)
                copy = _Copy(counts, torch.cuda.Event())  # type: ignore[no-untyped-call]
                copy.arrived.record()
            self._copies.update((p, (copy, row)) for row, p in enumerate(parameters))
