"""What is projected: APOLLO's step of matrices, by the general plan, or in one call of the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from insitu.optim.bundles import Bound, Write
from insitu.optim.captured import HeldProjections
from insitu.optim.elementwise import arithmetic
from insitu.optim.exchange import Plan
from insitu.optim.projection import Layout, Projection, ProjectionCache, narrow, singular_vectors
from insitu.optim.sharding import Split, local_of, split, whole_of
from insitu.optim.step import Backend
from insitu.optim.step.carried import Carried
from insitu.optim.step.reference import auto_alpha, plan
from insitu.optim.step.scratch import Scratch
from insitu.optim.task import Done, Task, moments_of, precisions, stored_as_kernels_take_it, weights_of


def projected(
    tasks: Sequence[Task], size: Layout, known: ProjectionCache, held: HeldProjections, scratch: Scratch
) -> Bound:
    """What carries matrices that are read as ``size`` through a step; of several, all are whole.

    What is looked up is looked up before any kernel runs: after a pass over gradients the interpreter is cold.
    """
    group, part = tasks[0].group, tasks[0].part
    parts = split(part, size, tasks[0].name)
    moments, weights = moments_of(tasks, parts.local[0]), weights_of(tasks, parts.local)
    last_norms = [local_of(task.state["update_norm"]) for task in tasks]
    carried = _carried(tasks, size, parts)

    def of_step(gradients: Sequence[Tensor], done: Done, backend: Backend) -> Plan[Write]:
        numbers = {
            "alpha": auto_alpha(size.projected, size.rank) if group["alpha"] == "auto" else group["alpha"],
            "granularity": _granularity(group),
            "denominator": group["denominator"],
            "limiter": group["limiter"],
            "backend": backend,
            "scratch": scratch,
            **arithmetic(group, done),
        }

        def random() -> list[Projection]:
            if not isinstance(done, int):
                return [held.get(task.parameter) for task in tasks]
            return [_random(known, task, size, parts, done) for task in tasks]

        if isinstance(done, int) and carried is not None and carried.takes(backend, gradients):
            return carried.plan(gradients, random, done // group["refresh"], **numbers)
        vectors = _singular(tasks[0], size, done) if isinstance(done, int) and group["projection"] == "svd" else None
        projections = random() if vectors is None else [narrow(vectors.narrow(0, *parts.stack), *parts.projected)]
        G = [gradient.reshape(parts.local) for gradient in gradients]
        planned = plan(
            G,
            lambda: moments(done),
            last_norms,
            projections,
            rank=size.rank,
            channel_dim=size.channel_dim,
            whole=part.mesh is None,
            **numbers,
        )
        how = precisions(tasks, done)

        def steps() -> Plan[Write]:
            eta_s, decay, live = yield from planned
            if vectors is not None:
                state = tasks[0].state
                state["projection"] = torch.where(live > 0, vectors, state.get("projection", vectors))

            def write(backend: Backend) -> None:
                with weights(done) as W:
                    backend.apply(W, G, eta_s, decay, live, how)

            return write

        return steps()

    return of_step


def _carried(tasks: Sequence[Task], size: Layout, parts: Split) -> Carried | None:
    """Where all is as the kernels take it: whole matrices on a CPU, stored as they are, of a projection that is not state."""
    weights = [task.part.tensor for task in tasks]
    M, V, norms = ([local_of(task.state[name]) for task in tasks] for name in ("exp_avg", "exp_avg_sq", "update_norm"))
    others = parts.local[0] != 1 or tasks[0].group["projection"] == "svd" or weights[0].numel() >= 2**31
    if others or not stored_as_kernels_take_it(tasks, (M, V, norms)):
        return None
    return Carried(
        [w.view(parts.local[1:]) for w in weights],
        M,
        V,
        norms,
        [task.state["seed"] for task in tasks],
        rounded=tasks[0].precision(0).key is not None,
        rank=size.rank,
        channel_dim=size.channel_dim,
    )


def _random(known: ProjectionCache, task: Task, size: Layout, parts: Split, done: int) -> Projection:
    kind, index = task.group["projection"], done // task.group["refresh"]
    task.state.pop("projection", None)
    return known.get(task.parameter, kind, task.state["seed"], index, size, parts.projected)


def _singular(task: Task, size: Layout, done: int) -> Tensor:
    """The projections of "svd", (b, r, m): those of the state, or at a refresh the gradient's singular vectors."""
    known = task.state.get("projection") if done else None
    if known is not None and done % task.group["refresh"]:
        return known  # type: ignore[no-any-return]
    assert task.parameter.grad is not None
    whole = whole_of(task.parameter.grad).nan_to_num()  # a NaN is refused later, by name
    whole = whole.reshape(size.stack or 1, size.rows, size.cols)
    fresh = singular_vectors(whole, size)
    # A matrix of a stack that has no gradient now keeps what it has.
    return fresh if known is None else torch.where(whole.any(-1).any(-1)[:, None, None], fresh, known)


def _granularity(group: dict[str, Any]) -> str:
    if group["granularity"] != "auto":
        return str(group["granularity"])
    return "tensor" if group["rank"] == 1 else "channel"
