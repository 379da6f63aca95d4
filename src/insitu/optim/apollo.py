"""APOLLO and APOLLO-Mini: AdamW's learning rates from a random sketch of the gradient, at the memory of SGD.

Zhu et al. 2024, arXiv 2412.05270. The mathematics is in :mod:`insitu.optim.step.reference`, read that first; this file
holds arguments and state.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from insitu.optim import options
from insitu.optim.counting import StepCounts
from insitu.optim.projection import Layout, ProjectionCache, layout, matrix_shape
from insitu.optim.seeds import mix
from insitu.optim.step import Backend, choose
from insitu.optim.step.reference import auto_alpha, plan

_log = logging.getLogger(__name__)


class APOLLO(Optimizer):
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
            dimensions is projected, the rest takes AdamW.
        lr: learning rate; with ``alpha="auto"`` about AdamW's.
        rank: r, at most the projected side.
        refresh: steps between two projections.
        granularity: one scaling factor per "channel" or per "tensor"; "auto" is per tensor for rank 1.
        alpha: factor on the update; "auto" is sqrt(m / r), which makes the update as large as AdamW's.
        projection: "gaussian" (the paper's), or "sketch" (random signs and balanced buckets; one pass at any rank).
        denominator: of the scaling factors: the "projected" norm |R_j| (the paper's), or the "exact" |G_j|.
        limiter: gamma of the norm-growth limiter, or None. In groups of role "dense" None unless the group sets it.
        betas, eps: Adam's.
        weight_decay: decoupled, in proportion to lr.
        dense: "adamw" or "apollo": what embeddings and the output head take.
        rounding: of bf16 parameters: "stochastic" or "nearest".
        seed: of all randomness: projections and rounding.
        backend: "auto", "blocked" (CPU), or "reference".

    Every option may be given per group, and changed between steps. A changed rank starts the moments afresh.

    State of a parameter, made at its first step: ``step`` (int64, steps with a non-zero gradient), ``seed``, and in
    float32 ``exp_avg``, ``exp_avg_sq`` and, where it is projected, ``update_norm``. A gradient that is all zero changes
    nothing of its tensor.

    Raises:
        ValueError: a bad option, with its name, value, what was expected and the way out; sparse or complex tensors.
        TypeError: ``params`` is a module, or an unknown option.

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
        seed: int = 0,
        backend: str = "auto",
        **unknown: Any,
    ) -> None:
        options.refuse_unknown(unknown)
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params is a module ({type(params).__name__}); give insitu.param_groups(model), which projects the "
                "right tensors, or model.parameters()"
            )
        defaults = {
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
            "seed": seed,
            "backend": backend,
        }
        options.check(defaults)
        self._warned_of_rank = False
        self._forget()
        super().__init__(params, defaults)
        bare = [p for group in self.param_groups if group.get("role") is None for p in group["params"]]
        if bare:
            num = sum(p.ndim >= 2 for p in bare)
            _log.info("%d tensors of two or more dimensions are projected, %d take AdamW", num, len(bare) - num)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._warned_of_rank = True
        self._forget()

    def _forget(self) -> None:
        """Start afresh with what follows from the state, and so is not in a copy or a checkpoint."""
        self._projections = ProjectionCache()
        self._counts = StepCounts()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state keeps its own types: torch would cast the moments to the parameter's."""
        seen: list[dict[str, Any]] = []  # the dict as the user's own hooks have left it
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        saved = [index for group in seen[0]["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            for name, value in seen[0]["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(device=p.device, copy=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. ``role`` ("matrix", "dense" or "adamw") says what its tensors are."""
        group = dict(param_group)
        if group.get("role") == "dense":
            group.setdefault("limiter", None)
        super().add_param_group(group)
        try:
            options.check(group)
            self._check_tensors(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_tensors(self, group: dict[str, Any]) -> None:
        offset = sum(len(other["params"]) for other in self.param_groups[:-1])
        for i, p in enumerate(group["params"]):
            name = _name(group, i, offset + i)
            _refuse_unsuitable(p, name)
            size = _layout(p, group, name)
            if size and 2 * size.rank > size.projected > 1 and not self._warned_of_rank:
                self._warned_of_rank = True
                warnings.warn(
                    f"rank={group['rank']} is more than half of the projected side of {name}, {tuple(p.shape)}, so "
                    "its moments are hardly smaller than AdamW's; lower the rank, or keep AdamW there (role='adamw')",
                    UserWarning,
                    stacklevel=5,  # _check_tensors, add_param_group, Optimizer.__init__, __init__, the user's line
                )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every tensor that has a gradient; ``closure`` recomputes and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.prepare()()
        return loss

    @torch.no_grad()
    def prepare(self) -> Callable[[], None]:
        """The first half of a step: moments and scaling factors, from the gradients alone. No weight changes.

        Returns the second half, which writes the weights. Call it once, before the gradients change; if it is never called,
        the moments have still moved. For whoever must stop readers of the weights while they are written, and no longer.
        """
        backends = _Backends()
        writes: list[tuple[Tensor, dict[str, Any], Callable[[Backend], None]]] = []
        position = 0
        for group in self.param_groups:
            options.check(group)
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.numel():
                    name = _name(group, i, position)
                    writes.append(
                        (p, group, self._prepare_tensor(p, p.grad, group, name, position, backends.of(group, p)))
                    )
                position += 1

        @torch.no_grad()
        def write() -> None:
            fresh = _Backends()  # the number of threads may be another by now
            for p, group, write_tensor in writes:
                write_tensor(fresh.of(group, p))
            self._counts.observe({p: self.state[p]["step"] for p, _, _ in writes})

        return write

    def _prepare_tensor(
        self, p: Tensor, grad: Tensor, group: dict[str, Any], name: str, position: int, backend: Backend
    ) -> Callable[[Backend], None]:
        _refuse_unsuitable(p, name)
        _refuse_unsuitable(grad, f"the gradient of {name}")
        size = _layout(p, group, name)
        state = self.state[p]
        if "exp_avg" not in state or state["exp_avg"].shape != (size.moments if size else p.shape):
            seed = state.get("seed", mix(group["seed"], position))
            state.clear()  # another rank: the old moments mean nothing in the new space
            state.update(_new_state(p, size, seed))
            done = 0
        else:
            done = self._counts.read(p, state["step"])
        key = mix(state["seed"], done) if p.dtype == torch.bfloat16 and group["rounding"] == "stochastic" else None
        M, V = state["exp_avg"], state["exp_avg_sq"]
        common = {
            "step": done + 1,
            "lr": float(group["lr"]),
            "betas": tuple(group["betas"]),
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }

        def stepped(W: Tensor, live: Tensor) -> None:
            if W is not p:
                p.copy_(W)
            state["step"].add_(live.long())

        if size is None:

            def write_adamw(backend: Backend) -> None:
                W = p.contiguous()
                stepped(W, backend.adamw(W.view(-1), grad.reshape(-1), M.view(-1), V.view(-1), key=key, **common))

            return write_adamw

        G = grad.reshape(size.rows, size.cols)
        eta_s, decay, live = plan(
            G,
            M,
            V,
            state["update_norm"],
            self._projections.get(p, group["projection"], state["seed"], done // group["refresh"], size),
            channel_dim=size.channel_dim,
            alpha=auto_alpha(size.projected, size.rank) if group["alpha"] == "auto" else group["alpha"],
            granularity=_granularity(group),
            denominator=group["denominator"],
            limiter=group["limiter"],
            backend=backend,
            **common,
        )

        def write_matrix(backend: Backend) -> None:
            W = p.contiguous()
            backend.apply(W.view(size.rows, size.cols), G, eta_s, decay, key)
            stepped(W, live)

        return write_matrix


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


class _Backends:
    """The backends of one half of a step, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, torch.device], Backend] = {}

    def of(self, group: dict[str, Any], p: Tensor) -> Backend:
        chosen = group["backend"], p.device
        if chosen not in self._made:
            self._made[chosen] = choose(*chosen)
        return self._made[chosen]


def _new_state(p: Tensor, size: Layout | None, seed: int) -> dict[str, Any]:
    """Zero moments, float32 whatever the parameter's type: in bf16 a second moment could not decay."""
    shape = size.moments if size else tuple(p.shape)
    state = {
        "step": torch.zeros((), dtype=torch.int64, device=p.device),
        "seed": seed,
        "exp_avg": torch.zeros(shape, device=p.device),
        "exp_avg_sq": torch.zeros(shape, device=p.device),
    }
    if size:
        state["update_norm"] = torch.zeros((), device=p.device)
    return state


def _layout(p: Tensor, group: dict[str, Any], name: str) -> Layout | None:
    """How ``p`` is projected, or None where it takes AdamW."""
    role = group.get("role")
    if p.ndim < 2 or p.numel() == 0 or role == "adamw" or (role == "dense" and group["dense"] == "adamw"):
        return None
    rows, cols = matrix_shape(p.shape, conv=bool(group.get("conv")), name=name)
    return layout(rows, cols, group["rank"])


def _granularity(group: dict[str, Any]) -> str:
    if group["granularity"] != "auto":
        return str(group["granularity"])
    return "tensor" if group["rank"] == 1 else "channel"


def _name(group: dict[str, Any], index: int, position: int) -> str:
    """For messages only: nothing else may depend on names, which wrappers change."""
    names = group.get("param_names")
    return str(names[index]) if names else f"parameter {position}"


def _refuse_unsuitable(tensor: Tensor, name: str) -> None:
    if tensor.is_sparse or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} is sparse ({tensor.layout}): expected a dense tensor; use sparse=False, or SparseAdam"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}: expected a real floating type; leave it out of the optimizer")
    if type(tensor).__name__ == "DTensor":
        raise ValueError(f"{name} is sharded (DTensor): expected a whole tensor; sharding is not supported yet")
