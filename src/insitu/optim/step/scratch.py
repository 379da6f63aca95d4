"""Memory of a step that does not belong to its result, kept between steps on a CPU: fresh pages cost more than the arithmetic
on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, prod

import torch
from torch import Tensor

from insitu.optim.tensors import capturing

_TABLES = 1 << 18  # numbers of 8 bytes: a step of a model of 300 tensors takes some ten thousand


class Scratch:
    """What one optimizer needs beside its state: small buffers by name, and the R of tensors on their way.

    R must wait until the sums of all tensors are known, since nothing may change if one of them is not finite. At most
    ``limit`` bytes wait; whose R finds no room is measured after that.
    """

    def __init__(self) -> None:
        self._limit: float = inf
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._blocks: list[Tensor] = []  # flat float32
        self._taken: set[int] = set()  # addresses of blocks in use now
        self._useful: set[int] = set()  # and in this step at all
        self._pinned: list[Tensor] = []  # flat int64, for tables of captured steps; of the last one so much is free:
        self._free = 0

    def begin(self, limit: float) -> None:
        """A new step; nothing of the last one is on its way any more."""
        self._limit = limit
        self._blocks = [b for b in self._blocks if b.device.type == "cpu" and b.data_ptr() in self._useful]
        self._taken.clear()
        self._useful.clear()

    def take(self, shape: tuple[int, ...], device: torch.device, *, wait: bool) -> Tensor | None:
        """Memory for an R, float32; None if it is to ``wait`` and there is no room for it."""
        num = prod(shape)
        free = [b for b in self._blocks if b.device == device and b.numel() >= num and b.data_ptr() not in self._taken]
        if free:
            block = min(free, key=Tensor.numel)
        elif not wait:
            return torch.empty(shape, device=device)
        elif 4 * (num + sum(b.numel() for b in self._blocks)) > self._limit:
            return None
        else:
            self._blocks.append(block := torch.empty(num, device=device))
        self._taken.add(block.data_ptr())
        self._useful.add(block.data_ptr())
        return block[:num].view(shape)

    def give_back(self, R: Tensor) -> None:
        """What :meth:`take` gave is free."""
        self._taken.discard(R.data_ptr())

    def buffer(self, name: str, num: int, device: torch.device) -> Tensor:
        """(num,) float32; the same memory for the same name."""
        known = self._buffers.get((name, device))
        if known is None or known.numel() < num:
            known = self._buffers[name, device] = torch.empty(num, device=device)
        return known[:num]

    def reserve(self, devices: Iterable[torch.device]) -> None:
        """Before a step may be captured: during a capture no memory can be pinned."""
        if self._free < _TABLES // 2 and any(device.type == "cuda" for device in devices):
            self._pinned.append(torch.empty(_TABLES, dtype=torch.int64, pin_memory=True))
            self._free = _TABLES

    def upload(self, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """A table of int64 on a device, without waiting for it. What a captured step reads stays as long as this object."""
        if device.type == "cuda" and capturing():
            table = torch.tensor(rows, dtype=torch.int64)
            if table.numel() > self._free:
                raise RuntimeError(
                    f"a captured step needs more than the {_TABLES} numbers of tables that were reserved for it: expected "
                    "fewer tensors with capturable=True; use several optimizers, or capture without step()"
                )
            host = self._pinned[-1][len(self._pinned[-1]) - self._free :][: table.numel()].view(table.shape)
            self._free -= table.numel()
            return torch.empty(host.shape, dtype=torch.int64, device=device).copy_(host.copy_(table), non_blocking=True)
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        return table.to(device, non_blocking=True)
