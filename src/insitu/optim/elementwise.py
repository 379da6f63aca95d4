"""What is not projected: AdamW or SGD, element by element, so that a shard of a tensor needs nothing of the others but their
sum of squares."""

from __future__ import annotations

from typing import Any

from insitu.optim.base import Task, Write
from insitu.optim.exchange import Plan, Sum
from insitu.optim.sharding import local_of
from insitu.optim.step import Backend
from insitu.optim.step.reference import is_live


def arithmetic(task: Task) -> dict[str, Any]:
    """The numbers of a group that enter every formula, and which update this is, from 1."""
    options = {k: task.group[k] for k in ("lr", "eps", "weight_decay", "maximize")}
    return {"step": task.done + 1, "betas": tuple(task.group["betas"]), **options}


def plan_adamw(task: Task) -> Plan[Write]:
    """What is not projected: AdamW, element by element."""
    G = task.gradient.reshape(-1)
    _, (square,), _ = yield Sum(task.backend.square(G).view(1, 1))
    live = is_live(square)

    def write(backend: Backend) -> None:
        W = task.part.tensor.contiguous()
        M, V = (local_of(task.state[name]).view(-1) for name in ("exp_avg", "exp_avg_sq"))
        how = (task.moment_precision("exp_avg"), task.moment_precision("exp_avg_sq"))
        backend.adamw(W.view(-1), G, M, V, live, task.precision, how, **arithmetic(task))
        if W is not task.part.tensor:
            task.part.tensor.copy_(W)

    return write


def plan_sgd(task: Task) -> Plan[Write]:
    """Plain SGD with decoupled decay, and no state: G times eta."""
    group = task.group
    G = task.gradient.reshape(1, -1, task.precision.width)
    _, (square,), _ = yield Sum(task.backend.square(G.view(-1)).view(1, 1))
    live = is_live(square)
    eta = live * (-group["lr"] if group["maximize"] else group["lr"])
    decay = live * (group["lr"] * group["weight_decay"]) if group["weight_decay"] else None

    def write(backend: Backend) -> None:
        W = task.part.tensor.contiguous()
        backend.apply(W.view(G.shape), G, eta.view(1, 1, 1), decay, live, task.precision)
        if W is not task.part.tensor:
            task.part.tensor.copy_(W)

    return write
