"""What is not projected: AdamW or SGD, element by element, so that a shard of a tensor needs nothing of the others but their
sum of squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from insitu.optim.bundles import Bound, Write
from insitu.optim.exchange import Plan, Sum
from insitu.optim.sharding import local_of
from insitu.optim.step import Backend
from insitu.optim.step.carried_elements import CarriedElements
from insitu.optim.step.native import PIECE
from insitu.optim.step.reference import is_live
from insitu.optim.task import Done, Task, moment_precisions, precisions, stored_as_kernels_take_it, weights_of


def arithmetic(group: dict[str, Any], done: Done) -> dict[str, Any]:
    """The numbers of a group that enter every formula, and which update this is, from 1: of each tensor on a device's clock."""
    options = {k: group[k] for k in ("lr", "eps", "weight_decay", "maximize")}
    return {"step": (done if isinstance(done, int) else done.done) + 1, "betas": tuple(group["betas"]), **options}


def _live(G: list[Tensor], backend: Backend) -> Plan[Tensor]:
    """1.0 or 0.0 for each of tensors of one shape, (T,); only one tensor if it is sharded."""
    own, everything, _ = yield Sum(backend.square(G).view(1, -1))
    return is_live(everything if len(G) == 1 else own[0])


def adamw(tasks: Sequence[Task]) -> Bound:
    """What is not projected: AdamW, element by element."""
    M, V = ([local_of(task.state[name]).view(-1) for task in tasks] for name in ("exp_avg", "exp_avg_sq"))
    weights, carried = weights_of(tasks, (-1,)), _carried(tasks, M, V)

    def plan(gradients: Sequence[Tensor], done: Done, backend: Backend) -> Plan[Write]:
        if isinstance(done, int) and carried is not None and carried.takes(backend, gradients):
            return carried.plan(gradients, backend, **arithmetic(tasks[0].group, done))
        G = [gradient.reshape(-1) for gradient in gradients]
        of_M, of_V = (moment_precisions(tasks, name, done) for name in ("exp_avg", "exp_avg_sq"))
        how, of_W = list(zip(of_M, of_V, strict=True)), precisions(tasks, done)

        def steps() -> Plan[Write]:
            live = yield from _live(G, backend)

            def write(backend: Backend) -> None:
                with weights(done) as W:
                    backend.adamw(W, G, M, V, live, of_W, how, **arithmetic(tasks[0].group, done))

            return write

        return steps()

    return plan


def _carried(tasks: Sequence[Task], M: Sequence[Tensor], V: Sequence[Tensor]) -> CarriedElements | None:
    """Where all is small and as the kernels take it: whole tensors on a CPU, stored as they are."""
    weights = [task.part.tensor for task in tasks]
    if not stored_as_kernels_take_it(tasks, (M, V)) or weights[0].numel() > PIECE:
        return None
    rounded = tasks[0].precision(0).key is not None
    return CarriedElements([w.view(-1) for w in weights], M, V, [task.state["seed"] for task in tasks], rounded=rounded)


def sgd(tasks: Sequence[Task]) -> Bound:
    """Plain SGD with decoupled decay, and no state: G times eta."""
    group, width = tasks[0].group, tasks[0].precision(0).width
    shape = (1, -1, width)
    weights = weights_of(tasks, shape)

    def plan(gradients: Sequence[Tensor], done: Done, backend: Backend) -> Plan[Write]:
        G = [gradient.reshape(shape) for gradient in gradients]
        how = precisions(tasks, done)

        def steps() -> Plan[Write]:
            live = yield from _live([g.view(-1) for g in G], backend)
            eta = live * (-group["lr"] if group["maximize"] else group["lr"])
            decay = live * (group["lr"] * group["weight_decay"]) if group["weight_decay"] else None

            def write(backend: Backend) -> None:
                with weights(done) as W:
                    backend.apply(W, G, eta.view(-1, 1, 1), decay, live, how)

            return write

        return steps()

    return plan
