"""How many updates a tensor has had, known to the host without waiting for the device.

A step whose gradient is all zero does not count, so the count follows from gradients and lives on the device, while the
host needs it to choose the projection and the random bits. On a CUDA device the counts are copied at the end of each
step, asynchronously, and read at the start of the next one, when the copy has long arrived.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Copy(NamedTuple):
    counts: Tensor  # int64, pinned host memory
    arrived: torch.cuda.Event


class StepCounts:
    """The host's copy of the ``step`` entries of an optimizer's state."""

    def __init__(self) -> None:
        self._copies: dict[Tensor, tuple[_Copy, int]] = {}

    def read(self, parameter: Tensor, step: Tensor) -> int:
        """The count of one parameter: from the last copy if there is one, else from the tensor itself."""
        known = self._copies.get(parameter)
        if known is None:
            return int(step)
        copy, row = known
        copy.arrived.synchronize()
        return int(copy.counts[row])

    def observe(self, steps: dict[Tensor, Tensor]) -> None:
        """Start copying the counts of the parameters that were stepped."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter in steps:
            if parameter.device.type == "cuda":
                by_device.setdefault(parameter.device, []).append(parameter)
        for device, parameters in by_device.items():
            with torch.cuda.device(device):
                counts = torch.empty(len(parameters), dtype=torch.int64, pin_memory=True)
                counts.copy_(torch.stack([steps[p] for p in parameters]), non_blocking=True)
                copy = _Copy(counts, torch.cuda.Event())  # type: ignore[no-untyped-call]
                copy.arrived.record()
            self._copies.update((p, (copy, row)) for row, p in enumerate(parameters))
