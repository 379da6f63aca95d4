"""Gradient release: every tensor is updated in backward as soon as its gradient is there, and the gradient is freed.

So the gradients of a model are never in memory together. The optimizer stays one optimizer: its groups, state, schedulers
and checkpoints are what they were, and a step has the bits of the plain one, because no formula of a tensor asks for another.
(Fused backward and update: Lv et al. 2023, LOMO, arXiv 2306.09782; torch has ``register_post_accumulate_grad_hook`` for it.)

A step is a round: it opens with the first gradient, and ``optimizer.step()`` closes it. In between ``.grad`` holds a
:class:`insitu.optim.released.Released`, so that nothing takes a gradient that is gone for one that was never there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from insitu.optim.base import TensorWise
from insitu.optim.buckets import update_after_averaging
from insitu.optim.released import free, is_released
from insitu.optim.sharding import is_dtensor
from insitu.optim.task import Place
from insitu.optim.tensors import readable


class GradientRelease:
    """Update in backward, for any optimizer of this package. The loop stays as it is; call it after the model is wrapped.

    ``optimizer.step()`` is still called after each (last) backward: it updates what got its gradient in another way, and ends
    the step. ``.grad`` is None after it.

    Args:
        optimizer: one of this package; of a wrapper such as accelerate's, what it wraps.
        last: asked when a gradient arrives, whether this backward is the last before ``optimizer.step()``; if not, the gradient
            is kept and added to. Such as ``lambda: accelerator.sync_gradients``. Without it every backward outside of
            :meth:`accumulate` is the last.
        ddp: the DistributedDataParallel around the model, with no communication hook of its own: its buckets are averaged as
            ever, and then updated. False: processes that need no averaging. (FSDP2 and tensor parallel need neither.)

    What differs from the plain step: a gradient that is not finite is found when other tensors have been updated already (with
    ``nonfinite="error"`` backward raises; "skip" is the same); options such as lr must not change between backward and
    ``step()``. Of a released gradient the norm is known still (``get_total_norm``, ``clip_grad_norm_(..., inf)``), and no
    more. DDP keeps a copy of all gradients in its buckets, so there only ``.grad`` is saved.

    Raises:
        TypeError: not an optimizer of this package, or a ``ddp`` that is none.
        ValueError: in backward, for a second gradient of a tensor before ``optimizer.step()`` (accumulation without
            :meth:`accumulate`, or reentrant checkpointing of a shared tensor), and for several processes without ``ddp``; from
            ``step()``, for a closure or options that changed since backward; from whatever reads a gradient that is gone, such
            as ``clip_grad_norm_``, ``clip_grad_value_`` or ``GradScaler``.

    >>> model = nn.Linear(64, 64)
    >>> optimizer = APOLLO(model.parameters(), lr=1e-2, rank=8)
    >>> release = GradientRelease(optimizer)
    >>> with release.accumulate():
    ...     model(torch.ones(1, 64)).square().sum().backward()
    >>> model(torch.zeros(1, 64)).square().sum().backward()  # the weights change here
    >>> optimizer.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        last: Callable[[], bool] | None = None,
        ddp: DistributedDataParallel | Literal[False] | None = None,
    ) -> None:
        if not isinstance(optimizer, TensorWise):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}: expected an optimizer of insitu, such as insitu.APOLLO; of a "
                "wrapper (accelerate's AcceleratedOptimizer) give what it wraps, wrapper.optimizer"
            )
        self.optimizer = optimizer
        self._last, self._ddp = last, ddp
        self._holding = False
        self._round: _Round | None = None
        self._lock = Lock()  # each device has a thread in backward
        self._watched: dict[Tensor, Any] = {}
        if ddp:
            update_after_averaging(ddp, optimizer, self._averaged)
        else:
            self._watch()
        self._before_step = optimizer.register_step_pre_hook(self._finish)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around every backward but the last of a step: gradients are kept, and added up in ``.grad``."""
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before

    def remove(self) -> None:
        """From here on the optimizer steps as if this had never been."""
        self._close()
        self._before_step.remove()
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()
        self._holding = True  # DDP cannot forget its hook

    def _watch(self) -> None:
        """Be told of the gradients of all parameters; wrappers may have replaced some, or a group was added."""
        if self._ddp:
            return
        for place in self.optimizer.places():
            p = place.parameter
            if p.requires_grad and p.is_leaf and p not in self._watched:
                self._watched[p] = p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _arrived(self, p: Tensor) -> None:
        """The gradient of ``p`` is complete for this backward."""
        with self._lock:
            if self._holding or not (self._last is None or self._last()):
                return
            if self._round is None:
                self._round = _Round(self.optimizer)
            place = self._round.places.get(p)
            if place is None or not p.numel():  # not, or no longer, the optimizer's
                return
            try:
                self._refuse_wrong(place)
                square = self._round.update(place)
            except BaseException:
                self._close()
                raise
            self._round.updated.append(p)
            free(p, place.name, square, refilled=bool(self._ddp))

    def _averaged(self, p: Tensor, mean: Tensor) -> None:
        """As :meth:`_arrived`, from a bucket of DDP; ``.grad`` is still the gradient of this process alone."""
        own, p.grad = p.grad, mean
        try:
            self._arrived(p)
        finally:
            if not is_released(p):
                p.grad = own

    def _refuse_wrong(self, place: Place) -> None:
        assert self._round is not None
        p, name = place.parameter, place.name
        if is_released(p):
            raise ValueError(
                f"the gradient of {name} was used by another GradientRelease: expected one; call remove() on the other"
            )
        if p in self._round.seen:
            raise ValueError(
                f"{name} got a second gradient before optimizer.step(), but the first was used and freed: put all backwards "
                "but the last of a step inside release.accumulate(), call optimizer.step() after the last, and use "
                "checkpoint(..., use_reentrant=False) where checkpointed parts share a tensor"
            )
        self._round.seen.add(p)
        if self._ddp is None and not is_dtensor(p) and _num_processes() > 1:
            raise ValueError(
                f"{_num_processes()} processes run, and {name} is not sharded, so its gradient here is not yet the mean: "
                "give GradientRelease(optimizer, ddp=model) the DistributedDataParallel, use fully_shard (FSDP2), or say "
                "ddp=False for processes that need no averaging"
            )

    def _finish(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the optimizer's own step, which takes what has a gradient still."""
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise ValueError(
                "a closure with GradientRelease: the weights have changed when step() would call it; call backward() and then "
                "step() without one, or remove() the release"
            )
        changed = self._round.changed_options(self.optimizer) if self._round else ""
        self._close()
        self._watch()
        if changed:
            raise ValueError(
                f"{changed} between backward and optimizer.step(), but with GradientRelease the weights were updated in "
                "backward: change options, and step schedulers, after optimizer.step() or before backward"
            )

    def _close(self) -> None:
        """End the round: what is in ``.grad`` from here on are gradients."""
        ended, self._round = self._round, None
        if ended is None:
            return
        for p in ended.updated:
            if is_released(p):
                p.grad = None
        self.optimizer.observe(ended.updated)


class _Round:
    """One step, from its first gradient to ``optimizer.step()``."""

    def __init__(self, optimizer: TensorWise) -> None:
        self.update = optimizer.one_by_one()
        self.places = {place.parameter: place for place in optimizer.places()}
        self.seen: set[Tensor] = set()
        self.updated: list[Tensor] = []
        self._options = _options(optimizer)

    def changed_options(self, optimizer: TensorWise) -> str:
        """The first option of a group that is not what it was, in words; "" if there is none."""
        for number, (now, before) in enumerate(zip(_options(optimizer), self._options, strict=False)):
            for name, value in now.items():
                if value != before.get(name, value):
                    return f"{name} of group {number} changed from {before[name]!r} to {value!r}"
        return ""


def _options(optimizer: TensorWise) -> list[dict[str, Any]]:
    """Of each group, by value where the host can read it without waiting for a device."""
    return [
        {
            name: float(value) if isinstance(value, Tensor) and readable(value) else value
            for name, value in group.items()
            if name not in ("params", "param_names") and not (isinstance(value, Tensor) and not readable(value))
        }
        for group in optimizer.param_groups
    ]


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
