"""Apollo and ApolloW: a diagonal quasi-Newton method. Not APOLLO, which is another method of the same name.

Ma 2020, arXiv 2009.13586. The mathematics is in :mod:`insitu.optim.step.quasi_newton`, read that first; this file holds
arguments and state.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from insitu.optim import options
from insitu.optim.base import TensorWise
from insitu.optim.bundles import Bound, Write
from insitu.optim.exchange import Plan
from insitu.optim.sharding import Part, distributed, local_of
from insitu.optim.step import Backend
from insitu.optim.step.quasi_newton import State, Stored, descend, pieces, plan, warmed_up
from insitu.optim.step.reference import Reference
from insitu.optim.task import Done, Task
from insitu.optim.tensors import readable

_ENOUGH_WARMUP = 100  # "Please set warmup to at least 100 updates to achieve stable convergence": the author's notes
_BLOCK = 1 << 16  # elements treated at a time by a thread of a CPU, so that they stay in the cache of its core
_CHUNK = 1 << 24  # elsewhere, so that temporary memory stays below 1 GB
_MATHEMATICAL = ("beta", "eps", "sigma", "rebound", "weight_decay", "decay", "maximize")


class ApolloQN(TensorWise):
    r"""Apollo (Ma 2020, arXiv 2009.13586): the diagonal of the Hessian, from how the average gradient m changes.

    .. math::
        B_t = B_{t-1} - \frac{d_{t-1}^\top (m_t - m_{t-1}) + d_{t-1}^\top B_{t-1} d_{t-1}}{(|d_{t-1}|_4 + \epsilon')^4}
        \,\mathrm{Diag}(d_{t-1}^2), \quad d_t = m_t / \max(|B_t|, \sigma), \quad \theta \leftarrow \theta - \eta_t d_t

    Every tensor is treated alike, element by element, with one secant equation per tensor.

    Args:
        params: tensors, dicts (groups) or named tensors, as for any torch optimizer.
        lr: learning rate; the paper's are 0.01 (images) and 0.1 (language, translation).
        beta: of the average gradient.
        eps: of the secant equation, in units of sigma: eps' = eps / sigma ("constant"), eps ("belief").
        rebound: what |B| is bounded below by: sigma ("constant"), or max |g - m| of the tensor, and eps / a_t is added
            ("belief").
        sigma: the bound of "constant".
        warmup: updates T during which the learning rate grows; the paper asks for at least 100, and fewer warn.
        init_lr: learning rate of the first update.
        weight_decay: the paper's are 2.5e-4 (CIFAR-10) and 1e-4 (ImageNet) with "l2", 100 times that with "decoupled".
        decay: "l2" (part of the gradient), "decoupled" (added to the direction), or "stable" (that, divided by the mean of
            the tensor's denominator).
        rounding: of bf16 parameters: "stochastic", "nearest", or "compensated" (what does not fit is kept in a second
            bf16 tensor; of float16 parameters too).
        moments: how m and B (and d) are stored: "float32", or "bfloat16" (rounded stochastically).
        maximize: climb instead of descend.
        nonfinite: of a gradient that is not finite: "error", or "skip" (leave the tensor out, and count in ``skipped``).
        seed: of stochastic rounding.
        backend: as :class:`insitu.APOLLO`'s. Here it says only how many elements are treated at a time: on a CPU blocks that
            fit its cache, unless it is "reference". The result is the same.

    Every option may be given per group, and changed between steps.

    Warm-up: a tensor's update t <= T takes eta_t = init_lr + (lr - init_lr) (t - 1) / T, so the first exactly init_lr, and
    from T + 1 on exactly ``lr``. ``lr`` is what the tensor's group holds at that step: a scheduler is followed during
    the warm-up too (the author's implementation ignores it until the warm-up ends), and where it warms up itself both
    slow down; then give ``warmup=0``. Where lr < init_lr, eta_t is lr, so lr=0 keeps the weights still.

    State of a parameter: ``step``, ``skipped``, ``seed``, ``numel`` as in :class:`insitu.APOLLO`; ``floor`` and ``offset``
    (what bounds |B| from below, and what is added, 0-dim float32); and per element

    ==========================================  ==============================  =======================================
    rebound, decay                              state                           bytes, "float32" / "bfloat16" moments
    ==========================================  ==============================  =======================================
    either, "l2" or weight_decay = 0            ``exp_avg``, ``hessian``        8 / 4
    either, "decoupled" or "stable"             these and ``direction``         12 / 6
    "compensated" bf16 and float16 parameters   ``residual`` beside these       2 more
    ==========================================  ==============================  =======================================

    The direction d_{t-1} is m / D of the stored m, B, floor and offset, exactly. With a decay in it, it needs the weights of
    before the step, which those of now give only up to rounding, and only if nobody else has written them. Where
    weight_decay becomes 0, ``direction`` stays. A gradient that is all zero changes nothing of its tensor. Of a DTensor the
    state per element is DTensors on its mesh.

    Raises:
        ValueError: a bad option, with its name, value, what was expected and the way out; sparse or complex tensors.
        TypeError: ``params`` is a module, or an unknown option.

    >>> model = nn.Linear(64, 64)
    >>> optimizer = ApolloQN(model.parameters(), lr=0.01, warmup=500)
    >>> loss = model(torch.ones(1, 64)).square().sum()
    >>> loss.backward()
    >>> optimizer.step()
    >>> tuple(optimizer.state[model.weight]["hessian"].shape)
    (64, 64)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        beta: float = 0.9,
        eps: float = 1e-4,
        rebound: str = "constant",
        sigma: float = 0.01,
        warmup: int = 500,
        init_lr: float = 1e-5,
        weight_decay: float = 0.0,
        decay: str = "l2",
        rounding: str = "stochastic",
        moments: str = "float32",
        maximize: bool = False,
        nonfinite: str = "error",
        seed: int = 0,
        backend: str = "auto",
        **unknown: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "eps": eps,
            "rebound": rebound,
            "sigma": sigma,
            "warmup": warmup,
            "init_lr": init_lr,
            "weight_decay": weight_decay,
            "decay": decay,
            "rounding": rounding,
            "moments": moments,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "seed": seed,
            "backend": backend,
        }
        options.refuse_unknown_quasi_newton(unknown, defaults)
        self._warned_of_warmup = False
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._warned_of_warmup = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; warns once of a warm-up that is shorter than the paper asks for."""
        super().add_param_group(param_group)
        warmup = self.param_groups[-1]["warmup"]
        if warmup < _ENOUGH_WARMUP and not self._warned_of_warmup:
            self._warned_of_warmup = True
            warnings.warn(
                f"warmup={warmup}: the paper's author asks for at least {_ENOUGH_WARMUP} updates of warm-up, without which it "
                "may diverge; raise warmup, or ignore this where a scheduler warms up",
                UserWarning,
                stacklevel=_frames_to_user(),
            )

    def _check(self, group: dict[str, Any]) -> None:
        options.check_quasi_newton(group)

    def _fits(self, p: Tensor, group: dict[str, Any], name: str, state: dict[str, Any]) -> bool:
        found = state.get("exp_avg")
        return (
            found is not None
            and {"hessian", "floor", "offset"} <= state.keys()
            and found.dtype == _moment_dtype(group)
            and found.shape == p.shape
        )

    def _new_state(self, p: Tensor, group: dict[str, Any], part: Part, name: str) -> dict[str, Any]:
        names = ("exp_avg", "hessian", "direction") if _keeps_direction(group) else ("exp_avg", "hessian")
        state = {k: _zeros(group, part) for k in names}
        # Not 0, so that the direction before the first step is 0 / 1.
        return {**state, "floor": torch.ones((), device=p.device), "offset": torch.zeros((), device=p.device)}

    def _bind(self, tasks: Sequence[Task]) -> Bound:
        (task,) = tasks

        def plan(gradients: Sequence[Tensor], done: Done, backend: Backend) -> Plan[Write]:
            assert isinstance(done, int)
            return _steps(task, gradients[0], done, backend)

        return plan


class ApolloQNW(ApolloQN):
    """ApolloW: :class:`ApolloQN` with decoupled weight decay; the paper's are 2.5e-2 (CIFAR-10) and 1e-2 (ImageNet)."""

    def __init__(self, params: Any, lr: float | Tensor = 0.01, *, decay: str = "decoupled", **options: Any) -> None:
        super().__init__(params, lr, decay=decay, **options)


def _steps(task: Task, gradient: Tensor, done: int, backend: Backend) -> Plan[Write]:
    group, precision = task.group, task.precision(done)
    in_cache = readable(task.part.tensor) and not isinstance(backend, Reference)
    size = _BLOCK * torch.get_num_threads() if in_cache else _CHUNK
    size = max(1, size // precision.width) * precision.width
    state = _state(task, done)
    if _keeps_direction(group) and state.d is None:  # from here on it is needed
        task.state["direction"] = _zeros(group, task.part)
        known, state = state, _state(task, done)
        assert state.d is not None
        for piece in pieces(task.part.tensor.numel(), size):
            state.d.write(piece, known.direction(piece))
    live, decay = yield from plan(
        gradient.reshape(-1),
        Stored(task.part.tensor.reshape(-1), precision),
        state,
        size=size,
        elements=prod(task.part.shape),
        step=done + 1,
        **{name: group[name] for name in _MATHEMATICAL},
    )
    lr = warmed_up(done + 1, group["lr"], group["init_lr"], group["warmup"])

    def write(backend: Backend) -> None:
        W = task.part.tensor.contiguous()
        descend(Stored(W.view(-1), precision), state, live, decay, lr, size)
        if W is not task.part.tensor:
            task.part.tensor.copy_(W)

    return write


def _state(task: Task, done: int) -> State:
    def stored(name: str) -> Stored:
        return Stored(local_of(task.state[name]).view(-1), task.moment_precision(name, done))

    d = stored("direction") if "direction" in task.state else None
    return State(stored("exp_avg"), stored("hessian"), task.state["floor"], task.state["offset"], d)


def _zeros(group: dict[str, Any], part: Part) -> Tensor:
    local = torch.zeros(part.tensor.shape, dtype=_moment_dtype(group), device=part.tensor.device)
    return distributed(local, part.shape, part, part.placements)


def _keeps_direction(group: dict[str, Any]) -> bool:
    """Whether it holds a share of the weights, and so does not follow from the rest of the state."""
    return bool(group["weight_decay"]) and group["decay"] != "l2"


def _moment_dtype(group: dict[str, Any]) -> torch.dtype:
    return torch.float32 if group["moments"] == "float32" else torch.bfloat16


def _frames_to_user() -> int:
    """A ``stacklevel`` for the caller's warning: the first line that is neither ours nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in ("insitu", "torch"):
        level, frame = level + 1, frame.f_back
    return level
