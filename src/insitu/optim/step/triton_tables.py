"""What a launch of several tensors finds in its table: where each lies, and the numbers that are its own.

Numbers come from the host, or, in a step that may be captured as part of a CUDA graph, from the device, which counts updates.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from insitu.optim.rounding import Precision, hash_numbers, in_one_period
from insitu.optim.step import Updates
from insitu.optim.step import triton_kernels as kernels
from insitu.optim.step.scratch import Scratch

Column = Sequence[int] | Tensor  # a number for each tensor of a launch, from the host or on the device
_STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
READ = {**_STORED, torch.float64: tl.float64}  # gradients


def table_of(
    scratch: Scratch, mine: Sequence[int], own: Sequence[Sequence[Tensor]], numbers: Sequence[Column] = ()
) -> tuple[Tensor, bool]:
    """The table of a launch, on the device: for each tensor its place t in the call, addresses of ``own[...][t]``, numbers.

    Also whether all addresses are multiples of 16.
    """
    rows, every = [], 0
    for i, t in enumerate(mine):
        addresses = [of_all[t].data_ptr() for of_all in own]
        for address in addresses:
            every |= address
        rows.append((t, *addresses, *(0 if isinstance(column, Tensor) else column[i] for column in numbers)))
    table = scratch.upload(rows, own[0][mine[0]].device)
    for j, column in enumerate(numbers, 1 + len(own)):
        if isinstance(column, Tensor):
            table[:, j] = column
    return table, every % 16 == 0


class Stored(NamedTuple):
    """What the kernels must know to store a tensor."""

    kind: tuple[int, Any, Any] | None  # how, and the types of the tensor and of its residual; None: they cannot
    residual: Tensor  # any tensor if there is none
    numbers: tuple[int, int, int] = (0, 0, 0)  # of its random bits
    key: Tensor | None = None  # or from what the device is to compute them


def stored_as(x: Tensor, precision: Precision) -> Stored:
    """The kernels store up to float32, without gaps, and round elements whose indices follow one another."""
    key, start, residual, groups = precision
    rest = x if residual is None else residual
    possible = x.dtype in _STORED and rest.dtype in _STORED and x.is_contiguous() and rest.is_contiguous()
    if groups is not None or not possible:
        return Stored(None, rest)
    types = _STORED[x.dtype], _STORED[rest.dtype]
    if residual is not None:
        return Stored((kernels.COMPENSATED.value, *types), rest)
    if key is None:
        return Stored((kernels.PLAIN.value, *types), rest)
    if not isinstance(start, int) or x.numel() >= 2**31 or not in_one_period(start, x.numel()):
        return Stored(None, rest)
    if isinstance(key, Tensor):
        return Stored((kernels.STOCHASTIC.value, *types), rest, key=key) if start == 0 else Stored(None, rest)
    return Stored((kernels.STOCHASTIC.value, *types), rest, hash_numbers(key, start))


def kind_of(g: Tensor, *stored: Stored) -> tuple[Any, ...] | None:
    """What must be equal for one launch; None where the kernels cannot."""
    kinds = [each.kind for each in stored]
    return None if g.dtype not in READ or None in kinds else (READ[g.dtype], *kinds)


def corrections(step: Updates, betas: tuple[float, float], mine: Sequence[int]) -> list[Column]:
    """1 - beta^t for both betas, the bits of float32."""
    if isinstance(step, Tensor):
        updates = torch.stack([step[t] for t in mine]).double()
        return [(1 - beta**updates).float().view(torch.int32) for beta in betas]
    return [struct.unpack("i", struct.pack("f", 1 - beta**step)) * len(mine) for beta in betas]


def random_numbers(stored: Iterable[Stored]) -> list[Column]:
    """The numbers of the random bits of each tensor."""
    stored = list(stored)
    keys = [each.key for each in stored if each.key is not None]
    if keys:
        base, factor, odd = hash_numbers(torch.stack(keys), 0)
        return [base, factor, [odd] * len(keys)]
    return list(zip(*(each.numbers for each in stored), strict=True))
