"""What the optimizers of this package have in common: parameters, state, and the two halves of a step.

An optimizer says what one tensor does (``_bind``); here all tensors are carried through a step together, so that sharded ones
need few collectives, and what a user gave is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from insitu.optim.bundles import Backends, Bundle, Step, bundled
from insitu.optim.captured import Counters, refuse_uncapturable
from insitu.optim.counting import HostCounts, StepCounts
from insitu.optim.exchange import Links, run
from insitu.optim.formulas import Formulas
from insitu.optim.kept import Kept, keepable
from insitu.optim.loading import refuse_foreign
from insitu.optim.quantized import refuse_for_int8
from insitu.optim.seeds import mix
from insitu.optim.sharding import Part, distributed, local_gradient, local_of, part_of
from insitu.optim.step import Backend
from insitu.optim.step.scratch import Scratch
from insitu.optim.task import Clock, Place, Task, Turn, refuse_nonfinite
from insitu.optim.tensors import (
    capturing,
    name_of,
    readable,
    refuse_capture,
    refuse_changed,
    refuse_unprepared,
    refuse_unsuitable,
)


class TensorWise(Formulas):
    """A torch optimizer whose update is made tensor by tensor; the base of all optimizers of this package."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params is a module ({type(params).__name__}); give insitu.param_groups(model), which finds the role of "
                "each tensor, or model.parameters()"
            )
        self._check(defaults)
        self._forget()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Start afresh with what follows from the state, and so is not in a copy or a checkpoint."""
        self._counts, self._counters = StepCounts(), Counters()
        self._seen: dict[Tensor, tuple[torch.Size, torch.dtype]] = {}
        self._scratch = Scratch()
        self._kept: Kept | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. ``role`` ("matrix", "dense" or "adamw") says what its tensors are."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        offset = sum(len(other["params"]) for other in self.param_groups[:-1])
        try:
            self._check(group)
            for i, p in enumerate(group["params"]):
                name = name_of(group, i, offset + i)
                refuse_unsuitable(p, name)
                refuse_for_int8(local_of(p), group, name)
                self._check_tensor(p, group, name)
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state keeps its own types: torch would cast the moments to the parameter's.

        Raises:
            ValueError: state of another optimizer, or of tensors of other shapes; nothing has changed then.
        """
        seen: list[dict[str, Any]] = []  # the dict as the user's own hooks have left it

        def inspect(_: Optimizer, loaded: dict[str, Any]) -> None:
            seen.append(loaded)
            refuse_foreign(self, loaded)

        hook = self.register_load_state_dict_pre_hook(inspect)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._forget()
        for group in self.param_groups:
            for option, value in self.defaults.items():  # one that came after it was saved
                group.setdefault(option, value)
        saved = [index for group in seen[0]["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            for name, value in seen[0]["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(device=p.device, copy=True).contiguous()

    def initial_state(self, p: Tensor, group: dict[str, Any], name: str = "parameter", seed: int = 0) -> dict[str, Any]:
        """What the state of ``p`` in ``group`` is before its first step, on its device: of a meta tensor it costs nothing."""
        part = part_of(p, name)
        counts = {count: torch.zeros((), dtype=torch.int64, device=p.device) for count in ("step", "skipped")}
        state = {**counts, "seed": seed, "numel": p.numel(), **self._new_state(p, group, part, name)}
        return {**state, **_residual(p, group, part)}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every tensor that has a gradient; ``closure`` recomputes and returns the loss.

        Raises:
            ValueError: a gradient that is not finite, unless ``nonfinite="skip"``. On a CPU before anything has changed, or, of
                ``backend="fused"``, when the other tensors have been updated; other devices are not waited for, so there at
                the next step. The tensor itself was left alone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._halves(at_once=True)()
        return loss

    @torch.no_grad()
    def prepare(self) -> Callable[[], None]:
        """The first half of a step: moments and scaling factors, from the gradients alone. No weight changes.

        Returns the second half, which writes the weights. Call it once, before the gradients change; if it is never called,
        the moments have still moved. For whoever must stop readers of the weights while they are written, and no longer.
        ``backend="fused"``, which knows no halves, is "native" here.
        """
        return self._halves(at_once=False)

    @torch.no_grad()
    def advance(self) -> None:
        """Before each replay of a CUDA graph that holds a step of this optimizer (``capturable=True``).

        Renews, where one is due, the projections that the graph reads; a tensor whose projection is due and was not renewed
        stands still. It waits for the device only then, once in ``refresh`` steps. Options must be those of the capture; an
        ``lr`` that is a tensor on the device may be filled with another number.

        Raises:
            ValueError: a gradient in an earlier replay was not finite, unless ``nonfinite="skip"``. It is met at the next call
                or, where the device is late, at one after it; the tensor itself was left alone.
            RuntimeError: inside a capture; no step was captured; an option is another than in the capture.
        """
        if capturing():
            raise RuntimeError(
                "advance() inside a CUDA graph capture: expected it before each replay, outside of the graph"
            )
        self._counters.refuse_other_than_captured(self.param_groups)
        if not self._counters.quiet():
            self._renew_all()
        self._counters.left -= 1

    def _renew_all(self) -> None:
        self._scratch.reserve([p.device for group in self.param_groups for p in group["params"]])
        tasks = [
            Task(p, group, name, part_of(p, name), self.state[p])
            for p, group, name, _ in self.places()
            if group.get("capturable") and self.state.get(p)
        ]
        self._counters.renew(tasks, self._renew)

    def _halves(self, *, at_once: bool) -> Callable[[], None]:
        if not all(group.get("capturable") for group in self.param_groups):
            refuse_capture()
        for group in self.param_groups:
            self._check(group)
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        steps = None if self._kept is None else self._kept.again(self.param_groups, stepped, self.state)
        if steps is None:
            self._kept = None
            chosen = set(stepped)
            turns = [self._turn(place) for place in self.places() if place.parameter in chosen]
            if capturing():
                self._counters.capture(self.param_groups)
            elif any(turn.done is None for turn in turns):
                self._renew_all()
                self._counters.left -= 1
            steps = self._bundles(turns)
            if all(map(keepable, turns)):
                self._kept = Kept(self.param_groups, [step.bundle for step in steps], stepped, self.state)
        late: list[Task] | None = None
        if at_once and any(group["backend"] == "fused" for group in self.param_groups):
            late = []  # some weights are written before all gradients are seen
        write_tensors, _ = self._prepare(steps, Backends(self._scratch, at_once), late)
        kept = self._kept is not None  # then all are on a CPU

        @torch.no_grad()
        def write() -> None:
            write_tensors(Backends(self._scratch, at_once))  # the number of threads may be another by now
            self.observe(() if kept else stepped)
            for task in late or ():
                refuse_nonfinite(task)

        return write

    @torch.no_grad()
    def one_by_one(self) -> Callable[[Place], Tensor]:
        """A step in which each tensor is updated as soon as its gradient is there; :meth:`observe` ends it.

        Returns what updates one tensor, with the bits that :meth:`step` would give it (no formula asks for another tensor),
        and returns |G|^2, 0-dim float64.
        """
        refuse_capture()
        for group in self.param_groups:
            self._check(group)
            if group.get("capturable"):
                raise ValueError(
                    "capturable=True with an update in backward: expected whole steps; use capturable=False"
                )
        backends = Backends(self._scratch, at_once=True)

        @torch.no_grad()
        def update(place: Place) -> Tensor:
            write, squares = self._prepare(self._bundles([self._turn(place)]), backends)
            write(backends)
            return squares[0][0]

        return update

    def places(self) -> Iterator[Place]:
        """All parameters, and where each is found."""
        position = 0
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                yield Place(p, group, name_of(group, i, position), position)
                position += 1

    def _bundles(self, turns: Sequence[Turn]) -> list[Step]:
        """Who goes through the step together, bound."""
        room = max((turn.task.part.tensor.nbytes for turn in turns), default=0)
        steps = []
        for together in bundled(turns, self._together, self._waiting, room):
            tasks = [turn.task for turn in together]
            links = self._links(tasks[0]) if len(tasks) == 1 else Links()
            done = together[0].done
            counts = None if done is None else HostCounts.of([task.state["step"] for task in tasks])
            largest = max(task.part.tensor.nbytes for task in tasks)
            bundle = Bundle(tasks, self._bind(tasks), links, counts, largest)
            clock = self._counters.clock(tasks) if done is None else done
            steps.append(Step(bundle, [turn.gradient for turn in together], clock))
        return steps

    def _prepare(
        self, steps: Sequence[Step], backends: Backends, late: list[Task] | None = None
    ) -> tuple[Callable[[Backends], None], dict[int, Tensor]]:
        """The first half of a step of these tensors; the second, still without :meth:`observe`, and the |G|^2 of each, by
        bundle. Whose gradient is not finite is refused at once, or put into ``late``."""
        self._scratch.begin(max((step.bundle.nbytes for step in steps), default=0))
        squares: dict[int, Tensor] = {}
        all_step: dict[int, bool] = {}  # known where the host can read it

        def inspect(i: int, own: Tensor, totals: Tensor) -> None:
            together, done = steps[i].bundle.tasks, steps[i].done
            if isinstance(done, Clock) and (due := self._due(together, done)) is not None:
                own[0].view(len(together), -1).masked_fill_(due[:, None], 0)  # as if its gradient were zero
                totals[:1].masked_fill_(due.any(), 0)
            square = totals[:1] if len(together) == 1 else own[0].view(len(together), -1).sum(1)
            squares[i] = square
            if isinstance(done, int) and readable(square):
                found = square.tolist()
                all_step[i] = all(isfinite(x) and x != 0 for x in found)
                for task, x in zip(together, found, strict=True):
                    if isfinite(x):
                        continue
                    if late is None:
                        refuse_nonfinite(task)
                    else:
                        late.append(task)

        def of(backends: Backends, task: Task) -> Backend:
            return backends.of(task.group, task.part.tensor)

        plans = [bundle.plan(gradients, done, of(backends, bundle.tasks[0])) for bundle, gradients, done in steps]
        writes = run(plans, [step.bundle.links for step in steps], inspect)

        def write(backends: Backends) -> None:
            for i, (step, write_tensors) in enumerate(zip(steps, writes, strict=True)):
                together = step.bundle.tasks
                write_tensors(of(backends, together[0]))
                if all_step.get(i) and step.bundle.counts is not None:
                    step.bundle.counts.advance()
                    continue
                finite = squares[i].isfinite()
                stepped = finite & (squares[i] != 0)
                for count, counted in (("step", stepped), ("skipped", ~finite)):
                    torch._foreach_add_([task.state[count] for task in together], list(counted.long().unbind()))

        return write, squares

    def observe(self, stepped: Iterable[Tensor]) -> None:
        """The end of a step of these tensors: the host will know, without waiting for a device, how many each has had."""
        self._counts.observe({p: self.state[p] for p in stepped if not readable(p) and p not in self._counters})
        self._counters.observe()

    def _turn(self, place: Place) -> Turn:
        p, group, name, position = place
        grad = p.grad
        assert grad is not None
        part = part_of(p, name)
        if part.groups is not None:
            refuse_for_int8(local_of(p), group, name)
        known = self._seen.get(p)
        if known is None:
            refuse_unsuitable(p, name)
            known = self._seen[p] = (p.shape, p.dtype)
        refuse_changed(p, name, *known)
        if grad.dtype != p.dtype or grad.layout != torch.strided:
            refuse_unsuitable(grad, f"the gradient of {name}")
        state, capturable = self.state[p], bool(group.get("capturable"))
        if capturable:
            refuse_uncapturable(p, group, name, part)
            made = p in self._counters and self._fits(p, group, name, state)
            if capturing() and not (made and _compensated(p, group) == ("residual" in state)):
                refuse_unprepared(name)
        if not self._fits(p, group, name, state):  # none yet, or of another rank: it means nothing in the new space
            seed = state.get("seed", mix(group["seed"], position))
            state.clear()
            state.update(self.initial_state(p, group, name, seed))
        if not _compensated(p, group):
            state.pop("residual", None)
        elif "residual" not in state:
            state.update(_residual(p, group, part))
        task = Task(p, group, name, part, state)
        if capturable:
            return Turn(task, local_gradient(p, grad), None)
        done, newly_skipped = self._counts.read(p, state)
        if newly_skipped:
            refuse_nonfinite(task)
        return Turn(task, local_gradient(p, grad), done)


def _compensated(p: Tensor, group: dict[str, Any]) -> bool:
    return group["rounding"] == "compensated" and p.dtype in (torch.bfloat16, torch.float16)


def _residual(p: Tensor, group: dict[str, Any], part: Part) -> dict[str, Tensor]:
    """What does not fit into the parameter: the second tensor of ``rounding="compensated"``, if it is asked for."""
    if not _compensated(p, group):
        return {}
    residual = torch.zeros_like(part.tensor, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    return {"residual": distributed(residual, part.shape, part, part.placements)}
