"""READ FIRST: Ma's Apollo for one tensor, in float32.

Ma 2020, "Apollo: An Adaptive Parameter-wise Diagonal Quasi-Newton Method for Nonconvex Stochastic Optimization" (arXiv
2009.13586), with the bounds, the decay and the warm-up of its author's implementation (the one with sigma = 0.01):

    g_t = G_t, or -G_t to climb;  decay "l2": + lambda theta_{t-1}                                effective_gradient
    a_t = (1 - beta) / (1 - beta^t)                     so that m needs no correction                   average_weight
    z_t = d_{t-1}^T (m_t - m_{t-1}) + d_{t-1}^T B_{t-1} d_{t-1}    where m_t - m_{t-1} = a_t (g_t - m_{t-1})   measure
    m_t = m_{t-1} + a_t (g_t - m_{t-1})                                                                 update
    B_t = B_{t-1} - z_t d_{t-1}^2 / (|d_{t-1}|_4 + eps')^4                                              update
    D_t = max(|B_t|, f_t) + o_t                         positive, whatever the curvature                denominator
            rebound "constant":  f_t = sigma,                  o_t = 0,          eps' = eps / sigma     plan
            rebound "belief":    f_t = max |g_t - m_{t-1}|,    o_t = eps / a_t,  eps' = eps
    d_t = m_t / D_t;  decay "decoupled": + lambda theta_{t-1};  "stable": + lambda / mean(D_t) theta_{t-1}     descend
    theta_t = theta_{t-1} - eta_t d_t                                                                   descend
    eta_t = eta_0 + (eta - eta_0) (t - 1) / T  for t <= T, then eta; eta_0 = min(init_lr, eta)           warmed_up

m_0 = B_0 = d_0 = 0. B is the diagonal that is nearest to the last one and meets the weak secant equation d^T B_t d =
-d^T (m_t - m_{t-1}): the step was -eta d, and B lives in units where eta is 1.

What a step needs of d_{t-1} follows from m_{t-1}, B_{t-1} and the two numbers f_{t-1} and o_{t-1}, which are stored; the
weights are moved by the direction of m and B as they were stored. So what is recalled is, to the bit, what was done, in
bf16 too, and whatever options have changed since. Only a decay that is part of d needs the weights of before the step:
then d is stored.

Where a formula needs the whole of a tensor, ``plan`` yields (see :mod:`insitu.optim.exchange`). Every tensor is flat here,
and read a piece at a time. A gradient that is all zero, or not finite, must change nothing, hence ``live``, 1.0 or 0.0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from insitu.optim.exchange import Gather, Plan, Sum
from insitu.optim.rounding import Precision
from insitu.optim.step.reference import is_live, work_copy
from insitu.optim.tensors import readable

_TINY = torch.finfo(torch.float32).tiny


class Stored(NamedTuple):
    """A flat tensor and how it is stored: a piece becomes a float32 copy (float64 of float64), and is written back."""

    tensor: Tensor
    precision: Precision = Precision()

    def read(self, piece: slice) -> Tensor:
        return self._precision(piece).read(work_copy(self.tensor[piece]))

    def write(self, piece: slice, value: Tensor) -> None:
        """The content of ``value`` is lost."""
        self._precision(piece).write(self.tensor[piece], value)

    def _precision(self, piece: slice) -> Precision:
        return self.precision.of(piece.start, piece.stop - piece.start)


class State(NamedTuple):
    """What is remembered of one parameter."""

    m: Stored
    B: Stored
    floor: Tensor  # f of the last step, 0-dim float32
    offset: Tensor  # o of the last step
    d: Stored | None  # the last direction, where it does not follow from the others

    def denominator(self, piece: slice) -> Tensor:
        """D."""
        return denominator(self.B.read(piece), self.floor, self.offset)

    def direction(self, piece: slice) -> Tensor:
        """m / D."""
        return self.m.read(piece).div_(self.denominator(piece))

    def last_direction(self, piece: slice) -> Tensor:
        """d_{t-1}, if asked before m and B have changed."""
        return self.direction(piece) if self.d is None else self.d.read(piece)


def pieces(num: int, size: int) -> list[slice]:
    """Slices of up to ``size`` that cover ``num`` elements; none if there are none."""
    return [slice(first, min(first + size, num)) for first in range(0, num, size)]


def effective_gradient(G: Tensor, W: Stored, piece: slice, maximize: bool, l2: float) -> Tensor:
    """g of a piece, a new tensor: the user's gradient stays what it is."""
    g = G[piece].to(torch.float32, copy=True)
    if maximize:
        g.neg_()
    return g.add_(W.read(piece), alpha=l2) if l2 else g


def denominator(B: Tensor, floor: Tensor, offset: Tensor) -> Tensor:
    """max(|B|, f) + o, in place of B."""
    return B.abs_().clamp_(min=floor).add_(offset)


def average_weight(step: int, beta: float) -> float:
    """a_t: 1 at the first step, 1 - beta in the end."""
    return (1 - beta) / (1 - beta**step)


def warmed_up(step: int, lr: float | Tensor, init_lr: float, warmup: int) -> float | Tensor:
    """eta_t: exactly eta_0 at step 1, exactly ``lr`` from step ``warmup`` + 1 on."""
    if step > warmup:
        return lr
    start = lr.clamp(max=init_lr) if isinstance(lr, Tensor) else min(lr, init_lr)
    return start + (lr - start) * ((step - 1) / warmup)


def measure(G: Tensor, change: Tensor, B: Tensor, d: Tensor) -> Tensor:
    """|G|^2, |d|_4^4, d^T (g - m) and d^T B d of a piece, (4,) float64; ``change`` is g - m."""
    d_sq = d.double().square_()
    sums = (G.float().square().double(), d_sq.square(), change.double().mul_(d), d_sq.mul(B))
    return torch.stack([x.sum() for x in sums])


def update(
    m: Tensor, B: Tensor, g: Tensor, d: Tensor, live: Tensor, *, weight: float, norm: Tensor, curvature: Tensor
) -> None:
    """m_t and B_t in place; ``norm`` is |d|_4 + eps', ``curvature`` is z_t / norm^2."""
    m.lerp_(torch.where(live > 0, g, 0.0), weight * live)  # a NaN would survive the product with 0
    B.addcmul_(d.div(norm).square_(), curvature, value=-1)


def plan(
    G: Tensor,
    W: Stored,
    state: State,
    *,
    size: int,
    elements: int,
    step: int,
    beta: float,
    eps: float,
    sigma: float,
    rebound: str,
    weight_decay: float,
    decay: str,
    maximize: bool,
) -> Plan[tuple[Tensor, Tensor | None]]:
    """The first half of a step: m, B and the bounds, in place; W is only read, and only with decay "l2".

    ``size`` elements are treated at a time; ``elements`` are in the whole tensor. Returns ``live``, and lambda_t where the
    direction includes a decay.
    """
    m, B, floor, offset, _ = state
    weight, belief = average_weight(step, beta), rebound == "belief"
    l2 = weight_decay if decay == "l2" else 0.0
    cut = pieces(G.numel(), size)

    sums = torch.zeros(4, 1, dtype=torch.float64, device=floor.device)
    largest = torch.zeros(1, device=floor.device)
    for piece in cut:
        change = effective_gradient(G, W, piece, maximize, l2).sub_(m.read(piece))
        if belief:
            largest = torch.maximum(largest, change.abs().amax())
        sums[:, 0].add_(measure(G[piece], change, B.read(piece), state.last_direction(piece)))
    _, (square, fourth, moved, curved), most = yield Sum(sums, largest if belief else None)

    live = is_live(square)
    norm = fourth.sqrt().sqrt() + (eps if belief else eps / sigma)
    curvature = torch.where(live > 0, (weight * moved + curved) / norm.square(), 0.0).float()
    norm = torch.where(live > 0, norm, 1.0).float().clamp(min=_TINY)
    for piece in [] if is_surely_dead(live) else cut:
        g, d = effective_gradient(G, W, piece, maximize, l2), state.last_direction(piece)
        new_m, new_B = m.read(piece), B.read(piece)
        update(new_m, new_B, g, d, live, weight=weight, norm=norm, curvature=curvature)
        m.write(piece, new_m)
        B.write(piece, new_B)
    bound = most[0].clamp(min=_TINY) if belief else torch.full_like(floor, sigma)
    floor.copy_(torch.where(live > 0, bound, floor))
    offset.copy_(torch.where(live > 0, eps / weight if belief else 0.0, offset))

    if decay == "l2" or not weight_decay:
        return live, None
    if decay == "decoupled":
        return live, torch.full_like(floor, weight_decay)
    total = torch.zeros(1, dtype=torch.float64, device=floor.device)
    for piece in cut:
        total += state.denominator(piece).double().sum()
    total, _ = yield Gather(total)
    return live, (weight_decay * elements / total[0]).float()


def descend(W: Stored, state: State, live: Tensor, decay: Tensor | None, lr: float | Tensor, size: int) -> None:
    """The second half of a step: W, and d where it is stored. ``decay`` is lambda_t."""
    for piece in [] if is_surely_dead(live) else pieces(W.tensor.numel(), size):
        theta, d = W.read(piece), state.direction(piece)
        if decay is not None:
            d.addcmul_(theta.float(), decay)
        W.write(piece, theta.sub_(d * (live * lr)))
        if state.d is not None:
            state.d.write(piece, torch.where(live > 0, d, state.d.read(piece)))


def is_surely_dead(live: Tensor) -> bool:
    """Whether there is nothing to do, as far as the host knows without waiting for a device."""
    return readable(live) and not live
