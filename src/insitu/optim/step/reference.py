"""READ FIRST: APOLLO for one tensor, as the paper writes it, in float32.

Zhu et al. 2024, "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270), Algorithm 1:

    R_t  = P_t G_t                                   the gradient in a random r-dimensional space      measure
    M_t  = beta1 M_{t-1} + (1 - beta1) R_t           Adam's moments, of R only                         adam_direction
    V_t  = beta2 V_{t-1} + (1 - beta2) R_t^2
    R~_t = M^_t / (sqrt(V^_t) + eps)                 ^ = bias-corrected
    s_j  = |R~_t[:, j]| / |R_t[:, j]|                how much Adam would scale channel j               factors
           (Mini: one s = |R~_t| / |R_t| per tensor)
    U_t  = alpha G_t diag(s)                         the raw gradient, scaled by channel
    U_t <- U_t min(1, gamma |U_{t-1}| / |U_t|)       norm-growth limiter (equation 4)                  limited
    W_t  = (1 - eta lambda) W_{t-1} - eta U_t        decoupled decay                                   descend

U is never formed: |U|^2 = alpha^2 sum_j s_j^2 |G_j|^2 follows from the sums of squares per channel, so a step is two
passes over G (measure, descend) with small work between them: ``plan`` below is all but the second pass.

Where a formula needs the whole of a tensor, ``plan`` yields (see :mod:`insitu.optim.exchange`): on one device the answer is
the question, and a reader may skip the line. Everything is a function of tensors and numbers; states change in place, and
nothing is read back to the host. A gradient that is all zero, or not finite, must change nothing, which is why the 0-dim
``live`` (1.0 or 0.0) appears.

Legend: G, W (..., rows, cols); R, M, V: (..., rows, r) where rows are channels (``channel_dim`` -2), else (..., r, cols);
n channels; ... is empty for a matrix, or the number of matrices of a stack. Tensors of one shape go through a step together,
as lists; of T tensors with b matrices each, what is small is one tensor of T b rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from insitu.optim.exchange import Gather, Plan, Scatter, Sum
from insitu.optim.projection import Projection, placed, project
from insitu.optim.rounding import Precision
from insitu.optim.step import Backend, Updates
from insitu.optim.step.scratch import Scratch

_TINY = torch.finfo(torch.float32).tiny


def measure(G: Tensor, projection: Projection, channel_dim: int) -> tuple[Tensor, Tensor]:
    """R = P G, and |G_j|^2 of each channel, (..., n); both float32."""
    G = placed(G.float())
    return project(G, projection, channel_dim), torch.linalg.vector_norm(G, dim=-3 - channel_dim).square_()


def is_live(G_sq: Tensor) -> Tensor:
    """1.0 if |G|^2 is finite and not zero, else 0.0; float32."""
    return (G_sq > 0).logical_and_(G_sq < inf).float()  # a NaN is neither


def adam_direction(
    R: Tensor, M: Tensor, V: Tensor, live: Tensor, *, step: Updates, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update the moments in place and return R~ = M^ / (sqrt(V^) + eps); ``step`` counts from 1.

    ``live`` broadcasts over R.
    """
    beta1, beta2 = betas
    step = step.double() if isinstance(step, Tensor) else step
    R = torch.where(live > 0, R, 0.0)  # a NaN would survive the product with 0
    M.lerp_(R, (1 - beta1) * live)
    V.lerp_(R.square(), (1 - beta2) * live)
    denominator = (V / (1 - beta2**step)).sqrt_().add_(eps)
    return torch.div(M, denominator, out=denominator).div_(1 - beta1**step)


def ratio(above_sq: Tensor, below_sq: Tensor, needed_sq: Tensor) -> Tensor:
    """sqrt(above / below) in float32, and 0 where ``below`` or ``needed`` is 0.

    A row of an embedding that had a gradient once and has none now must neither move nor become NaN.
    """
    s = above_sq.float().sqrt() / below_sq.float().sqrt().clamp_(min=_TINY)
    return torch.where(torch.minimum(below_sq, needed_sq).float() == 0, 0.0, s)


def limit(norm: Tensor, last: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Norm-growth limiter: the factor on U that keeps |U_t| <= gamma |U_{t-1}|, and the norm to remember.

    Equation 4 of the paper, from Fira (Chen et al. 2024, arXiv 2410.01623). ``last`` = 0 means that there is no earlier
    update, and nothing is limited; an update of norm zero is not remembered. Otherwise an all-zero gradient would
    freeze the tensor for ever.
    """
    limited = torch.where(last > 0, torch.minimum(norm, gamma * last), norm)
    moved = norm > 0
    return torch.where(moved, limited / norm.clamp(min=_TINY), 1.0), torch.where(moved, limited, last)


def auto_alpha(projected: int, rank: int) -> float:
    """alpha = sqrt(m / r) makes the update as large as AdamW's.

    |R~_j| ~ sqrt(r) where Adam's own direction has |G~_j| ~ sqrt(m), and |R_j| ~ |G_j|. (The paper writes sqrt(n / r)
    with n = the length of a channel, which is our m.)
    """
    return sqrt(projected / rank)


def plan(
    G: Sequence[Tensor],
    moments: Callable[[], AbstractContextManager[tuple[Sequence[Tensor], Sequence[Tensor]]]],
    last_norm: Sequence[Tensor],
    projections: Sequence[Projection],
    *,
    rank: int,
    channel_dim: int,
    whole: bool,
    step: Updates,
    lr: float | Tensor,
    alpha: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    granularity: str,
    denominator: str,
    limiter: float | None,
    maximize: bool,
    backend: Backend,
    scratch: Scratch,
) -> Plan[tuple[Tensor, Tensor | None, Tensor]]:
    """All of one step but the change of W, of T tensors of one shape; only one tensor if it is sharded (not ``whole``).

    Each G is (b, rows, cols), b matrices; ``last_norm`` (b,), or () for one, changes in place. ``moments`` gives access to M
    and V (b, ...) in float32: those that are stored otherwise are copies, and must not wait for the sums of all tensors.
    Returns ``eta_s`` (T b, rows or 1, cols or 1), ``decay`` (T b,) as :func:`descend` takes them, and ``live`` (T,).
    """
    side, num = -3 - channel_dim, len(G)  # side: the projected one
    shape, device = [num * len(G[0]), *G[0].shape[1:]], G[0].device
    shape[side] = rank
    memory = scratch.take(tuple(shape), device, wait=True) if whole else torch.empty(shape, device=device)
    if memory is None:  # no room to wait in: only |G|^2 now
        squares = backend.square([matrix.reshape(-1) for stack in G for matrix in stack])
        own, _, _ = yield Sum(squares[None])
        memory = scratch.take(tuple(shape), device, wait=False)
        assert memory is not None
        R, live = memory, is_live(own[0].view(num, -1).sum(1))
        G_sq = backend.measure(G, projections, channel_dim, R)
        R_sq = backend.norms(R, side)
        G_total, R_total = G_sq.sum(-1, dtype=torch.float64), R_sq.sum(-1, dtype=torch.float64)
    else:
        R = memory
        G_sq = backend.measure(G, projections, channel_dim, R)
        R, G_sq = yield Scatter(R, G_sq, channel_dim)
        R_sq = backend.norms(R, side)
        own, (everything, _), _ = yield Sum(
            torch.stack([G_sq.sum(-1, dtype=torch.float64), R_sq.sum(-1, dtype=torch.float64)])
        )
        G_total, R_total = own
        live = is_live(G_total.view(num, -1).sum(1) if whole else everything[None])
    with moments() as (M, V):
        numerator = backend.direct(R, M, V, live, side, step=step, betas=betas, eps=eps)
    del M, V  # copies must not wait for the other tensors
    scratch.give_back(R)
    each_live = live if len(R) == num else live.repeat_interleave(len(R) // num)
    if granularity == "tensor":  # as one channel
        total, _ = yield Gather(numerator.sum(-1, dtype=torch.float64))
        numerator, R_sq, G_sq = (x.float()[:, None] for x in (total, R_total, G_total))
    s, norm_sq = backend.factors(numerator, *((G_sq, R_sq) if denominator == "exact" else (R_sq, G_sq)), G_sq)
    if granularity != "tensor":
        norm_sq, s = yield Gather(norm_sq, s)
    gamma, eta = inf if limiter is None else limiter, -lr if maximize else lr
    eta_s = backend.limited(s, norm_sq, last_norm, each_live, alpha=alpha, gamma=gamma, eta=eta)
    decay = each_live * (lr * weight_decay) if weight_decay else None
    return eta_s.unsqueeze(side), decay, live


def factors(above_sq: Tensor, below_sq: Tensor, needed_sq: Tensor, G_sq: Tensor) -> tuple[Tensor, Tensor]:
    """s_j of k matrices, (k, n) float32, and |U|^2 / alpha^2 = sum_j s_j^2 |G_j|^2, (k,) float64.

    Args:
        above_sq: |R~_j|^2, (k, n) float32, and the others likewise.
        below_sq: that of what they are divided by.
        needed_sq: where this is 0, or ``below_sq``, s is 0.
    """
    s = ratio(above_sq, below_sq, needed_sq)
    return s, (s.square() * G_sq).sum(-1, dtype=torch.float64)


def limited(
    s: Tensor,
    norm_sq: Tensor,
    last_norm: Sequence[Tensor],
    live: Tensor,
    *,
    alpha: float,
    gamma: float,
    eta: float | Tensor,
) -> Tensor:
    """eta alpha s times the limiter's factor, (k, n), 0 where ``live`` (k,) is 0; ``last_norm`` changes in place.

    Args:
        s, norm_sq: of :func:`factors`.
        last_norm: tensors of one or more of the k matrices each, in their order.
        eta: negative to climb.
    """
    alive, known = live > 0, torch.stack(list(last_norm)).view(-1)
    factor, last = limit(norm_sq.float().sqrt() * alpha, known, gamma)
    last = torch.where(alive, last, known).view(len(last_norm), *last_norm[0].shape)
    torch._foreach_copy_(list(last_norm), list(last.unbind()))
    return torch.where(alive[:, None], s * (factor * (eta * alpha))[:, None], 0.0)


def descend(work: Tensor, G: Tensor, eta_s: Tensor, decay: Tensor | None) -> Tensor:
    """W (1 - eta lambda) - G diag(eta_s), in place on a float32 (or float64) copy ``work`` of W.

    ``eta_s`` is eta alpha s times the limiter's factor, shaped to broadcast over G; ``decay`` is eta lambda.
    """
    if decay is not None:
        work.mul_(1 - decay)
    return work.addcmul_(G.to(work.dtype), eta_s.to(work.dtype), value=-1)


def adamw_descend(
    work: Tensor,
    G: Tensor,
    M: Tensor,
    V: Tensor,
    live: Tensor,
    *,
    step: Updates,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> Tensor:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, Algorithm 2), in place on ``work``, M and V (float32)."""
    direction = adam_direction(G.float(), M, V, live, step=step, betas=betas, eps=eps)
    if weight_decay:
        work.mul_(1 - live * (lr * weight_decay))
    return work.sub_(direction.mul_(live * (-lr if maximize else lr)))


class Reference:
    """The backend that does each pass on whole tensors, in the words of this file."""

    factors, limited = staticmethod(factors), staticmethod(limited)

    def measure(self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int, R: Tensor) -> Tensor:
        found, G_sq = zip(*(measure(g, P, channel_dim) for g, P in zip(G, projections, strict=True)), strict=True)
        torch.cat(found, out=R)
        return torch.cat(G_sq)

    def norms(self, R: Tensor, side: int) -> Tensor:
        return R.square().sum(side)

    def direct(
        self,
        R: Tensor,
        M: Sequence[Tensor],
        V: Sequence[Tensor],
        live: Tensor,
        side: int,
        *,
        step: Updates,
        betas: tuple[float, float],
        eps: float,
    ) -> Tensor:
        return torch.cat(
            [
                adam_direction(*each, step=t, betas=betas, eps=eps).square().sum(side)
                for *each, t in zip(R.chunk(len(M)), M, V, live, _each(step, len(M)), strict=True)
            ]
        )

    def square(self, G: Sequence[Tensor]) -> Tensor:
        return torch.stack([g.float().square().sum(dtype=torch.float64) for g in G])

    def apply(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        eta_s: Tensor,
        decay: Tensor | None,
        live: Tensor,
        precisions: Sequence[Precision],
    ) -> None:
        for i, (w, g, precision) in enumerate(zip(W, G, precisions, strict=True)):
            mine = slice(i * len(w), (i + 1) * len(w))
            work = precision.read(work_copy(w))
            g = torch.where(live[i] > 0, g, 0.0)  # a NaN would survive the product with 0
            precision.write(w, descend(work, g, eta_s[mine], None if decay is None else decay[mine, None, None]))

    def adamw(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        M: Sequence[Tensor],
        V: Sequence[Tensor],
        live: Tensor,
        precisions: Sequence[Precision],
        moments: Sequence[tuple[Precision, Precision]],
        *,
        step: Updates,
        **numbers: Any,
    ) -> None:
        for i, (w, g, m, v, t) in enumerate(zip(W, G, M, V, _each(step, len(W)), strict=True)):
            m32, v32 = m.float(), v.float()  # m and v themselves if they are float32
            work = adamw_descend(precisions[i].read(work_copy(w)), g, m32, v32, live[i], step=t, **numbers)
            precisions[i].write(w, work)
            for stored, computed, precise in zip((m, v), (m32, v32), moments[i], strict=True):
                if stored is not computed:
                    precise.write(stored, computed)


def _each(step: Updates, num: int) -> Sequence[Updates]:
    return step.unbind() if isinstance(step, Tensor) else [step] * num


def work_copy(W: Tensor) -> Tensor:
    """W in the precision of the computation: float32, or float64 for a float64 W."""
    return W.to(torch.promote_types(W.dtype, torch.float32), copy=True)
