"""APOLLO and APOLLO-Mini: AdamW's learning rates from a random sketch of the gradient, at the memory of SGD.

Zhu et al. 2024, arXiv 2412.05270. The mathematics is in :mod:`insitu.optim.step.reference`, read that first; this file
holds arguments and state.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from insitu.optim import options
from insitu.optim.base import TensorWise
from insitu.optim.bundles import Bound
from insitu.optim.captured import HeldProjections
from insitu.optim.elementwise import adamw, sgd
from insitu.optim.exchange import Links
from insitu.optim.matrices import projected
from insitu.optim.projection import Layout, ProjectionCache, layout, matrix_shape
from insitu.optim.sharding import Part, distributed, local_of, split
from insitu.optim.task import Clock, Task, Turn
from insitu.optim.tensors import name_of, refuse_flattened

_log = logging.getLogger(__name__)


class APOLLO(TensorWise):
    r"""APOLLO (Zhu et al. 2024, arXiv 2412.05270, Algorithm 1 and equation 4).

    For a matrix G turned so that its smaller side m is projected, with channels j along the larger:

    .. math::
        R = P G, \quad \tilde R = \hat M / (\sqrt{\hat V} + \epsilon), \quad s_j = |\tilde R_j| / |R_j|, \quad
        W \leftarrow (1 - \eta\lambda) W - \eta\, \mathrm{limit}(\alpha\, G\, \mathrm{diag}(s))

    Adam's moments M, V exist for R only: 2 r n numbers for a matrix of m x n. Vectors and scalars, and by default
    embeddings and the output head, take AdamW.

    Args:
        params: tensors, dicts (groups) or named tensors, as for any torch optimizer;
            ``insitu.param_groups(model)`` makes the right groups. Without it every floating tensor of two or more
            dimensions is projected, the rest takes AdamW. Three dimensions are a stack of matrices, such as experts
            (one projection, and a limiter for each); a group with ``conv=True``, or four and more, is first x rest.
        lr: learning rate; with ``alpha="auto"`` about AdamW's.
        rank: r, at most the projected side.
        refresh: steps between two projections.
        granularity: one scaling factor per "channel" or per "tensor"; "auto" is per tensor for rank 1.
        alpha: factor on the update; "auto" is sqrt(m / r), which makes the update as large as AdamW's.
        projection: "gaussian" (the paper's), "rademacher" (random signs), "sketch" (random signs and balanced buckets; one
            pass at any rank), or "svd" (the paper's ablation: singular vectors of the gradient, which are state).
        denominator: of the scaling factors: the "projected" norm |R_j| (the paper's), or the "exact" |G_j|.
        limiter: gamma of the norm-growth limiter, or None. In groups of role "dense" None unless the group sets it.
        betas, eps: Adam's.
        weight_decay: decoupled, in proportion to lr.
        dense: "adamw", "apollo" or "sgd": what embeddings and the output head take.
        rounding: of bf16 parameters: "stochastic", "nearest", or "compensated" (what does not fit is kept in a second
            bf16 tensor; of float16 parameters too).
        moments: how M and V are stored: "float32", or "bfloat16" (rounded stochastically, so that V decays).
        maximize: climb instead of descend.
        nonfinite: of a gradient that is not finite: "error", or "skip" (leave the tensor out, and count in ``skipped``).
        seed: of all randomness: projections and rounding.
        backend: "auto" (Triton on CUDA where it is installed; on a CPU the C++ kernels that were compiled at installation, else
            blocks), or by name: "reference" (the formulas as they are written), "blocked" (CPU), "native" (CPU, C++),
            "fused" (the same, each tensor written while its gradient is in the cache, so that one that is not finite is
            refused when the others have been updated), "compiled" (torch.compile), "triton" (CUDA).
        capturable: whether a step may be captured as part of a CUDA graph; then :meth:`advance` goes before each replay.

    Every option may be given per group, and changed between steps. A changed rank starts the moments afresh.

    State of a parameter, made at its first step: ``step`` (int64, steps with a finite gradient that is not zero),
    ``skipped`` (int64), ``seed`` and ``numel`` (numbers); ``exp_avg`` and ``exp_avg_sq`` (2 r n numbers, or 2 m n with
    AdamW, of 4 or 2 bytes each; none with "sgd"); where it is projected, ``update_norm`` (float32, one per matrix); with
    "svd" ``projection`` (r x m, float32); with "compensated" ``residual`` (2 bytes per element). A gradient that is all
    zero changes nothing of its tensor. Of a DTensor, ``exp_avg``, ``exp_avg_sq`` and ``residual`` are DTensors on its mesh.

    Raises:
        ValueError: a bad option, with its name, value, what was expected and the way out; sparse or complex tensors.
        TypeError: ``params`` is a module, or an unknown option.

    See :mod:`insitu.optim.presets` for the published recipes.

    >>> model = nn.Linear(64, 64)
    >>> optimizer = APOLLO(model.parameters(), lr=1e-2, rank=8)
    >>> loss = model(torch.ones(1, 64)).square().sum()
    >>> loss.backward()
    >>> optimizer.step()
    >>> tuple(optimizer.state[model.weight]["exp_avg"].shape)
    (64, 8)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        rank: int = 256,
        refresh: int = 200,
        granularity: str = "auto",
        alpha: float | str = "auto",
        projection: str = "gaussian",
        denominator: str = "projected",
        limiter: float | None = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        dense: str = "adamw",
        rounding: str = "stochastic",
        moments: str = "float32",
        maximize: bool = False,
        nonfinite: str = "error",
        seed: int = 0,
        backend: str = "auto",
        capturable: bool = False,
        **unknown: Any,
    ) -> None:
        options.refuse_unknown(unknown)
        self._warned_of_rank = False
        super().__init__(
            params,
            {
                "lr": lr,
                "rank": rank,
                "refresh": refresh,
                "granularity": granularity,
                "alpha": alpha,
                "projection": projection,
                "denominator": denominator,
                "limiter": limiter,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "dense": dense,
                "rounding": rounding,
                "moments": moments,
                "maximize": maximize,
                "nonfinite": nonfinite,
                "seed": seed,
                "backend": backend,
                "capturable": capturable,
            },
        )
        bare = [p for group in self.param_groups if group.get("role") is None for p in group["params"]]
        if bare:
            num = sum(p.ndim >= 2 for p in bare)
            _log.info("%d tensors of two or more dimensions are projected, %d take AdamW", num, len(bare) - num)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._warned_of_rank = True

    def _forget(self) -> None:
        super()._forget()
        self._projections, self._held = ProjectionCache(), HeldProjections()

    def _check(self, group: dict[str, Any]) -> None:
        options.check_apollo(group)
        if group.get("params") and group.get("matrices") and all(p.ndim < 2 for p in group["params"]):
            refuse_flattened(name_of(group, 0, 0), group["params"][0].shape)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. ``role`` ("matrix", "dense" or "adamw") says what its tensors are."""
        group = dict(param_group)
        if group.get("role") == "dense":
            group.setdefault("limiter", None)
        super().add_param_group(group)
        added = self.param_groups[-1]
        if added.get("role") in (None, "matrix"):  # remembered, to notice when a wrapper has made vectors of them
            added["matrices"] = any(p.ndim >= 2 for p in added["params"])

    def _check_tensor(self, p: Tensor, group: dict[str, Any], name: str) -> None:
        size = _layout(p, group, name)
        if size and 2 * size.rank > size.projected > 1 and not self._warned_of_rank:
            self._warned_of_rank = True
            warnings.warn(
                f"rank={group['rank']} is more than half of the projected side of {name}, {tuple(p.shape)}, so "
                "its moments are hardly smaller than AdamW's; lower the rank, or keep AdamW there (role='adamw')",
                UserWarning,
                # _check_tensor, add_param_group twice, Optimizer.__init__, TensorWise.__init__, __init__, the user's line
                stacklevel=7,
            )

    def _fits(self, p: Tensor, group: dict[str, Any], name: str, state: dict[str, Any]) -> bool:
        if not state:
            return False
        size = _layout(p, group, name)
        if size is None and _sgd(group):
            return "exp_avg" not in state
        found = state.get("exp_avg")
        return (
            found is not None
            and found.dtype == _moment_dtype(group)
            and found.shape == (size.moments if size else p.shape)
        )

    def _new_state(self, p: Tensor, group: dict[str, Any], part: Part, name: str) -> dict[str, Any]:
        size = _layout(p, group, name)
        if size is None and _sgd(group):
            return {}
        # float32 by default, whatever the parameter's type.
        of: dict[str, Any] = {"device": p.device, "dtype": _moment_dtype(group)}
        names = ("exp_avg", "exp_avg_sq")
        if size is None:
            local = part.tensor.shape
            return {k: distributed(torch.zeros(local, **of), part.shape, part, part.placements) for k in names}
        parts = split(part, size, name)
        state = {k: distributed(torch.zeros(parts.moments, **of), size.moments, part, parts.placements) for k in names}
        norms = torch.zeros(size.norms and parts.stack[1:], device=p.device)
        state["update_norm"] = distributed(norms, size.norms, part, parts.norm_placements) if size.norms else norms
        if group["projection"] == "svd":  # not known before the first gradient
            state["projection"] = torch.zeros(size.stack or 1, size.rank, size.projected, device=p.device)
        return state

    def _links(self, task: Task) -> Links:
        size = _layout(task.parameter, task.group, task.name)
        return split(task.part, size, task.name).links if size else super()._links(task)

    def _together(self, turn: Turn) -> Hashable:
        task, gradient = turn.task, turn.gradient
        if task.part.mesh is not None or task.group["projection"] == "svd" or not gradient.is_contiguous():
            return None  # the last: of a bundle's gradients no copies are made at once
        p = task.parameter
        # Also by how they are stored: an int8 weight says that it is float.
        return id(task.group), p.shape, task.part.tensor.dtype, p.device, gradient.dtype, turn.done

    def _waiting(self, task: Task) -> int:
        if _layout(task.parameter, task.group, task.name) is None or task.part.mesh is not None:
            return 0
        M = local_of(task.state["exp_avg"])
        copies = 0 if M.dtype == torch.float32 else 2  # of M and V; they do not wait, but a bundle's are there at once
        return 4 * M.numel() * (1 + copies)

    def _renew(self, task: Task, done: int) -> float:
        size = _layout(task.parameter, task.group, task.name)
        if size is None:
            return super()._renew(task, done)
        refresh: int = task.group["refresh"]
        self._held.renew(task.parameter, task.group["projection"], task.state["seed"], done // refresh, size)
        return refresh - done % refresh

    def _due(self, tasks: Sequence[Task], clock: Clock) -> Tensor | None:
        return self._held.due(tasks, clock) if _layout(tasks[0].parameter, tasks[0].group, tasks[0].name) else None

    def _bind(self, tasks: Sequence[Task]) -> Bound:
        task = tasks[0]
        size = _layout(task.parameter, task.group, task.name)
        if size:
            # And not self, which holds what is bound.
            return projected(tasks, size, self._projections, self._held, self._scratch)
        return sgd(tasks) if _sgd(task.group) else adamw(tasks)


class APOLLOMini(APOLLO):
    """APOLLO-Mini: rank 1 and one scaling factor per tensor, so the state is 2 n numbers for a matrix of m x n.

    Takes the options of :class:`APOLLO`, less ``rank``.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, **options: Any) -> None:
        if "rank" in options:
            raise TypeError(
                f"unexpected option rank={options['rank']!r}: APOLLOMini is rank 1; "
                "use APOLLO(rank=..., granularity='tensor')"
            )
        super().__init__(params, lr, rank=1, **options)


def _sgd(group: dict[str, Any]) -> bool:
    return group.get("role") == "dense" and group["dense"] == "sgd"


def _layout(p: Tensor, group: dict[str, Any], name: str) -> Layout | None:
    """How ``p`` is projected, or None where it is treated element by element."""
    role = group.get("role")
    if p.numel() == 0 or role == "adamw" or (role == "dense" and group["dense"] != "apollo"):
        return None
    if p.ndim < 2:
        if role in ("matrix", "dense"):
            refuse_flattened(name, p.shape)
        return None
    return _layout_of(p.shape, bool(group.get("conv")), group["rank"])


@functools.cache
def _layout_of(shape: torch.Size, conv: bool, rank: int) -> Layout:
    stack, rows, cols = matrix_shape(shape, conv=conv)
    return layout(rows, cols, rank, stack)


def _moment_dtype(group: dict[str, Any]) -> torch.dtype:
    return torch.float32 if group["moments"] == "float32" else torch.bfloat16
