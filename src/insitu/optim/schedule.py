"""Learning-rate schedules with a linear warmup, as torch schedulers: closed forms, so a resume is exact.

Every one is a factor on each group's own ``lr``. In what follows t counts updates from 1, w is ``warmup``, T ``total``:

| schedule              | t <= w | after                                                                      |
|-----------------------|--------|----------------------------------------------------------------------------|
| warmup_cosine         | t / w  | floor + (1 - floor) (1 + cos(pi (t - w) / (T - w))) / 2, and floor after T |
| warmup_linear         | t / w  | floor + (1 - floor) (T - t) / (T - w), and floor after T                   |
| warmup_inverse_sqrt   | t / w  | sqrt(w / t)                                                                |
| warmup_milestone      | t / w  | gamma^k, k milestones being reached: m <= t - 1                            |

``ramped_cosine`` is a product instead: the cosine begins with the first update, and min(1, t / w) holds it down at first.

The first update is at lr / w and not at 0. Call ``step()`` after each optimizer step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi, sqrt

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


# Objects and not closures, of numbers alone: torch saves what is in them with the scheduler's state, and a checkpoint must load
# with ``weights_only=True``.
@dataclass
class _Warmup:
    warmup: int

    def __call__(self, done: int) -> float:
        return (done + 1) / self.warmup if done < self.warmup else self.after(done + 1)

    def after(self, t: int) -> float:
        raise NotImplementedError


@dataclass
class _Decay(_Warmup):
    total: int
    floor: float
    cosine: bool

    def after(self, t: int) -> float:
        left = 1 - min(1.0, (t - self.warmup) / (self.total - self.warmup))
        if self.cosine:
            left = (1 + cos(pi * (1 - left))) / 2
        return self.floor + (1 - self.floor) * left


@dataclass
class _RampedCosine:
    warmup: int
    total: int
    floor: float

    def __call__(self, done: int) -> float:
        cosine = (1 + cos(pi * min(1.0, done / self.total))) / 2
        return min(1.0, (done + 1) / self.warmup) * (self.floor + (1 - self.floor) * cosine)


@dataclass
class _InverseSqrt(_Warmup):
    def after(self, t: int) -> float:
        return sqrt(self.warmup / t)


@dataclass
class _Milestones(_Warmup):
    milestones: list[int]
    gamma: float

    def after(self, t: int) -> float:
        return self.gamma ** bisect_right(self.milestones, t - 1)


def warmup_cosine(optimizer: Optimizer, warmup: int, total: int, floor: float = 0.1) -> LambdaLR:
    """Cosine from ``lr`` to ``floor * lr`` at update ``total`` (the APOLLO paper: 10 % warmup, floor 0.1).

    Raises:
        ValueError: ``warmup`` negative or not below ``total``, ``floor`` outside [0, 1].
    """
    return _decay(optimizer, warmup, total, floor, cosine=True)


def warmup_linear(optimizer: Optimizer, warmup: int, total: int, floor: float = 0.0) -> LambdaLR:
    """A line from ``lr`` to ``floor * lr`` at update ``total``.

    Raises:
        ValueError: ``warmup`` negative or not below ``total``, ``floor`` outside [0, 1].
    """
    return _decay(optimizer, warmup, total, floor, cosine=False)


def warmup_inverse_sqrt(optimizer: Optimizer, warmup: int) -> LambdaLR:
    """``lr * sqrt(warmup / t)`` (Vaswani et al. 2017, arXiv 1706.03762, section 5.3), ``lr`` being its peak.

    Raises:
        ValueError: ``warmup`` below 1.
    """
    return LambdaLR(optimizer, _InverseSqrt(_at_least("warmup", warmup, 1)))


def warmup_milestone(optimizer: Optimizer, warmup: int, milestones: Sequence[int], gamma: float = 0.1) -> LambdaLR:
    """``lr`` times ``gamma`` for each milestone, a number of updates, that has been done (Ma 2020, arXiv 2009.13586).

    Raises:
        ValueError: ``warmup`` negative, milestones that do not grow or lie within the warmup, ``gamma`` not in (0, 1].
    """
    _at_least("warmup", warmup, 0)
    steps = list(milestones)
    if steps != sorted(set(steps)) or any(step < max(1, warmup) for step in steps):
        raise ValueError(f"milestones={steps}: expected growing numbers of updates, none below warmup={warmup}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma!r}: expected a number in (0, 1], such as 0.1")
    return LambdaLR(optimizer, _Milestones(warmup, steps, gamma))


def ramped_cosine(optimizer: Optimizer, warmup: int, total: int, floor: float = 0.0) -> LambdaLR:
    """``lr min(1, (s + 1) / warmup) (floor + (1 - floor) (1 + cos(pi s / total)) / 2)``, s = t - 1 updates done: the ANDREA
    lessons' schedule, with a warmup of 2,000 steps in one run of 200,000.

    Transformers' ``cosine`` with as many warmup steps is another: its first update has a rate of 0, and its cosine begins after
    the warmup.

    Raises:
        ValueError: ``warmup`` below 1 or not below ``total``, ``floor`` outside [0, 1].
    """
    _check_decay(_at_least("warmup", warmup, 1), total, floor)
    return LambdaLR(optimizer, _RampedCosine(warmup, total, floor))


def _decay(optimizer: Optimizer, warmup: int, total: int, floor: float, *, cosine: bool) -> LambdaLR:
    _check_decay(_at_least("warmup", warmup, 0), total, floor)
    return LambdaLR(optimizer, _Decay(warmup, total, floor, cosine))


def _check_decay(warmup: int, total: int, floor: float) -> None:
    if not isinstance(total, int) or total <= warmup:
        raise ValueError(f"total={total!r}: expected the number of all updates, more than warmup={warmup}")
    if not (isfinite(floor) and 0 <= floor <= 1):
        raise ValueError(f"floor={floor!r}: expected a factor in [0, 1], such as 0.1 for a tenth of lr")


def _at_least(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected a number of updates, at least {least}")
    return value
