"""What is not projected: AdamW or SGD, element by element, so that a shard of a tensor needs nothing of the others but their
sum of squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from insitu.optim.base import Write
from insitu.optim.exchange import Plan, Sum
from insitu.optim.sharding import local_of
from insitu.optim.step import Backend
from insitu.optim.step.reference import is_live
from insitu.optim.task import Task, weights_of


def arithmetic(task: Task) -> dict[str, Any]:
    """The numbers of a group that enter every formula, and which update this is, from 1."""
    options = {k: task.group[k] for k in ("lr", "eps", "weight_decay", "maximize")}
    return {"step": task.done + 1, "betas": tuple(task.group["betas"]), **options}


def _live(tasks: Sequence[Task], G: list[Tensor]) -> Plan[Tensor]:
    """1.0 or 0.0 for each of tensors of one shape, (T,); only one tensor if it is sharded."""
    own, everything, _ = yield Sum(tasks[0].backend.square(G).view(1, -1))
    return is_live(everything if len(tasks) == 1 else own[0])


def plan_adamw(tasks: Sequence[Task]) -> Plan[Write]:
    """What is not projected: AdamW, element by element."""
    G = [task.gradient.reshape(-1) for task in tasks]
    M, V = ([local_of(task.state[name]).view(-1) for task in tasks] for name in ("exp_avg", "exp_avg_sq"))
    how = [(task.moment_precision("exp_avg"), task.moment_precision("exp_avg_sq")) for task in tasks]
    weights, precisions = weights_of(tasks, (-1,)), [task.precision for task in tasks]

    def steps() -> Plan[Write]:
        live = yield from _live(tasks, G)

        def write(backend: Backend) -> None:
            with weights() as W:
                backend.adamw(W, G, M, V, live, precisions, how, **arithmetic(tasks[0]))

        return write

    return steps()


def plan_sgd(tasks: Sequence[Task]) -> Plan[Write]:
    """Plain SGD with decoupled decay, and no state: G times eta."""
    group = tasks[0].group
    precisions = [task.precision for task in tasks]
    G = [task.gradient.reshape(1, -1, precision.width) for task, precision in zip(tasks, precisions, strict=True)]
    weights = weights_of(tasks, G[0].shape)

    def steps() -> Plan[Write]:
        live = yield from _live(tasks, [g.view(-1) for g in G])
        eta = live * (-group["lr"] if group["maximize"] else group["lr"])
        decay = live * (group["lr"] * group["weight_decay"]) if group["weight_decay"] else None

        def write(backend: Backend) -> None:
            with weights() as W:
                backend.apply(W, G, eta.view(-1, 1, 1), decay, live, precisions)

        return write

    return steps()
