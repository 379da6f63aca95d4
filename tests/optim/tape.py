"""A CUDA graph where there is no CUDA: operations are recorded with their memory and their numbers, and repeated.

As in a graph, a replay knows nothing of Python: it reads and writes the same tensors, and a number that came from the host is
the number of the capture. What a capture forbids, a value that the host reads, is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default, _aten.nonzero.default}


class Tape(TorchDispatchMode):
    def __init__(self, watched: list[torch.Tensor]) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        # The memory of the device. torch reads small constants in that of the host, which is not forbidden.
        self._device = set(map(_memory, watched))

    def __enter__(self) -> "Tape":
        self._tolist = torch.Tensor.tolist  # the one read that is no operation

        def tolist(x: torch.Tensor) -> Any:
            self._refuse_read("tolist", [x])
            return self._tolist(x)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    def _refuse_read(self, what: object, inputs: list[torch.Tensor]) -> None:
        if not self._device.isdisjoint(map(_memory, inputs)):
            raise AssertionError(f"{what} makes the host wait for the device")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        if func in _READS:
            self._refuse_read(func, inputs)
        out = func(*args, **kwargs)
        outputs, known = _tensors(out), set(map(_memory, inputs))
        if not self._device.isdisjoint(known):
            self._device.update(map(_memory, outputs))
        fresh = [i for i, x in enumerate(outputs) if _memory(x) not in known]

        def again() -> None:
            repeated = _tensors(func(*args, **kwargs))
            for i in fresh:
                outputs[i].copy_(repeated[i])

        self.calls.append(again)
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for call in self.calls:
                call()


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@contextmanager
def captured(monkeypatch: pytest.MonkeyPatch, watched: list[torch.Tensor]) -> Iterator[Tape]:
    """Everything within is recorded, and not done; ``watched`` are the tensors of the device, which are put back."""
    tape = Tape(watched)
    before = [x.detach().clone() for x in watched]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        try:
            from triton.runtime.interpreter import InterpretedFunction
        except ImportError:
            pass
        else:
            run = InterpretedFunction.run

            def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
                tape.calls.append(lambda: run(self, *args, **kwargs))

            patch.setattr(InterpretedFunction, "run", recorded)
        with tape:
            yield tape
    with torch.no_grad():
        for x, old in zip(watched, before, strict=True):
            x.copy_(old)
