"""Watch a model load its checkpoint: every copy into a parameter, and where its elements came from."""

import bisect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from insitu.live.weights.layout import Copy


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active while a checkpoint is loaded into ``parameters`` (name -> tensor, contiguous, in memory that will not move).

    Places are told by address and not by name: loaders narrow, rename and read ahead. ``copies`` and ``sources`` hold what
    was seen. Tensors of the checkpoint are kept until :meth:`forget`, so that no address is used twice.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[Copy] = []
        self.sources: dict[str, tuple[int, ...]] = {}
        self._slots = _Ranges(parameters.items())
        self._sources = _Ranges(())

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, remembered as sources."""
        for name, tensor in tensors:
            self.sources[name] = tuple(tensor.shape)
            self._sources.add(name, tensor)
            yield name, tensor

    def forget(self) -> None:
        self._sources = _Ranges(())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._note(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, target: torch.Tensor, source: torch.Tensor) -> None:
        slot = self._slots.find(target)
        if slot is None:
            return
        origin = self._sources.find(source)
        self.copies.append(
            Copy(
                source=origin[0] if origin else None,
                source_start=origin[1] if origin else 0,
                slot=slot[0],
                slot_start=slot[1],
                count=target.numel(),
                contiguous=target.is_contiguous() and source.is_contiguous() and source.numel() == target.numel(),
            )
        )


class _Ranges:
    """Tensors by the addresses of their elements."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._starts: list[int] = []
        self._held: list[tuple[str, torch.Tensor]] = []
        for name, tensor in tensors:
            self.add(name, tensor)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        at = bisect.bisect(self._starts, tensor.data_ptr())
        self._starts.insert(at, tensor.data_ptr())
        self._held.insert(at, (name, tensor))

    def find(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """The tensor that holds the first element of this one, and which of its elements that is."""
        address = tensor.data_ptr()
        at = bisect.bisect(self._starts, address) - 1
        if at < 0 or not tensor.numel():
            return None
        name, held = self._held[at]
        inside = address - held.data_ptr()
        if inside >= held.numel() * held.element_size():
            return None
        return name, inside // held.element_size()
