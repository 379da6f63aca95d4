"""READ FIRST: APOLLO for one tensor, as the paper writes it, in float32.

Zhu et al. 2024, "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270), Algorithm 1:

    R_t  = P_t G_t                                   the gradient in a random r-dimensional space      measure
    M_t  = beta1 M_{t-1} + (1 - beta1) R_t           Adam's moments, of R only                         adam_direction
    V_t  = beta2 V_{t-1} + (1 - beta2) R_t^2
    R~_t = M^_t / (sqrt(V^_t) + eps)                 ^ = bias-corrected
    s_j  = |R~_t[:, j]| / |R_t[:, j]|                how much Adam would scale channel j               channel_scale
           (Mini: one s = |R~_t| / |R_t| per tensor)
    U_t  = alpha G_t diag(s)                         the raw gradient, scaled by channel               update_norm
    U_t <- U_t min(1, gamma |U_{t-1}| / |U_t|)       norm-growth limiter (equation 4)                  limit
    W_t  = (1 - eta lambda) W_{t-1} - eta U_t        decoupled decay                                   descend

U is never formed: |U|^2 = alpha^2 sum_j s_j^2 |G_j|^2 follows from the sums of squares per channel, so a step is two
passes over G (measure, descend) with small work between them: ``plan`` below is all but the second pass.

Everything is a function of tensors and numbers; states change in place, and nothing is read back to the host. A
gradient that is all zero must change nothing, which is why the 0-dim ``live`` (1.0 or 0.0) appears in the averages.

Legend: G, W (rows, cols); R, M, V: (rows, r) where rows are channels (``channel_dim`` 0), else (r, cols); n channels.
"""

from __future__ import annotations

from math import inf, sqrt

import torch
from torch import Tensor

from insitu.optim.projection import Sketch, project
from insitu.optim.rounding import store
from insitu.optim.step import Backend

_TINY = torch.finfo(torch.float32).tiny


def measure(G: Tensor, projection: Tensor | Sketch, channel_dim: int) -> tuple[Tensor, Tensor]:
    """R = P G, and |G_j|^2 of each channel, (n,); both float32."""
    G = G.float()
    return project(G, projection, channel_dim), torch.linalg.vector_norm(G, dim=1 - channel_dim).square_()


def is_live(G_sq: Tensor) -> Tensor:
    """1.0 if any gradient entry is non-zero (NaN counts as such), else 0.0; 0-dim float32."""
    return (G_sq.sum() != 0).float()


def adam_direction(
    R: Tensor, M: Tensor, V: Tensor, live: Tensor, *, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update the moments in place and return R~ = M^ / (sqrt(V^) + eps); ``step`` counts from 1."""
    beta1, beta2 = betas
    M.lerp_(R, (1 - beta1) * live)
    V.lerp_(R.square(), (1 - beta2) * live)
    denominator = (V / (1 - beta2**step)).sqrt_().add_(eps)
    return torch.div(M, denominator, out=denominator).div_(1 - beta1**step)


def channel_scale(
    R_tilde: Tensor, R: Tensor, G_sq: Tensor, channel_dim: int, *, granularity: str, denominator: str
) -> Tensor:
    """s per channel, (n,) float32; for granularity "tensor" one s, (1,).

    s = 0 where |G_j| = 0 or |R_j| = 0: a row of an embedding that had a gradient once and has none now must neither
    move nor become NaN. ``denominator="exact"`` divides by |G_j|, of which |R_j| is an estimate.
    """
    numerator, R_sq = R_tilde.square().sum(1 - channel_dim), R.square().sum(1 - channel_dim)
    if granularity == "tensor":
        numerator, R_sq, G_sq = (x.sum().reshape(1) for x in (numerator, R_sq, G_sq))
    below = R_sq if denominator == "projected" else G_sq
    s = numerator.sqrt() / below.sqrt().clamp(min=_TINY)
    return torch.where((G_sq == 0) | (R_sq == 0), 0.0, s)


def update_norm(s: Tensor, G_sq: Tensor, alpha: float) -> Tensor:
    """|U| = alpha |G diag(s)| before the limiter, without forming U; 0-dim."""
    return (s.square() * G_sq).sum().sqrt() * alpha


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
    G: Tensor,
    M: Tensor,
    V: Tensor,
    last_norm: Tensor,
    projection: Tensor | Sketch,
    *,
    channel_dim: int,
    step: int,
    lr: float,
    alpha: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    granularity: str,
    denominator: str,
    limiter: float | None,
    backend: Backend,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """All of one matrix's step but the change of W: M, V and ``last_norm`` (0-dim) in place.

    Returns ``eta_s`` and ``decay`` as :func:`descend` takes them, and ``live``.
    """
    R, G_sq = backend.measure(G, projection, channel_dim)
    live = is_live(G_sq)
    R_tilde = adam_direction(R, M, V, live, step=step, betas=betas, eps=eps)
    s = channel_scale(R_tilde, R, G_sq, channel_dim, granularity=granularity, denominator=denominator)
    factor, norm = limit(update_norm(s, G_sq, alpha), last_norm, inf if limiter is None else limiter)
    last_norm.copy_(norm)
    eta_s = s * (factor * (lr * alpha))
    decay = live * (lr * weight_decay) if weight_decay else None
    return eta_s[:, None] if channel_dim == 0 else eta_s[None, :], decay, live


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
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, Algorithm 2), in place on ``work``, M and V."""
    direction = adam_direction(G.float(), M, V, live, step=step, betas=betas, eps=eps)
    if weight_decay:
        work.mul_(1 - live * (lr * weight_decay))
    return work.sub_(direction.mul_(live * lr))


class Reference:
    """The backend that does each pass on whole tensors, in the words of this file."""

    def measure(self, G: Tensor, projection: Tensor | Sketch, channel_dim: int) -> tuple[Tensor, Tensor]:
        return measure(G, projection, channel_dim)

    def apply(self, W: Tensor, G: Tensor, eta_s: Tensor, decay: Tensor | None, key: int | None) -> None:
        store(W, descend(work_copy(W), G, eta_s, decay), key)

    def adamw(
        self,
        W: Tensor,
        G: Tensor,
        M: Tensor,
        V: Tensor,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        key: int | None,
    ) -> Tensor:
        live = is_live(G.float().square())
        work = adamw_descend(
            work_copy(W), G, M, V, live, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        store(W, work, key)
        return live


def work_copy(W: Tensor) -> Tensor:
    """W in the precision of the computation: float32, or float64 for a float64 W."""
    return W.to(torch.promote_types(W.dtype, torch.float32), copy=True)
