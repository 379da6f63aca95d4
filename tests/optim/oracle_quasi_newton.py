"""Ma's Apollo in float64 NumPy, written from the formulas (arXiv 2009.13586) and not from our code.

The average gradient is a sum over all gradients so far, the direction is stored, and everything is one flat vector.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class QuasiNewton:
    """One tensor; every field may be changed between steps."""

    theta: Array
    lr: float = 0.01
    beta: float = 0.9
    eps: float = 1e-4
    rebound: str = "constant"
    sigma: float = 0.01
    warmup: int = 500
    init_lr: float = 1e-5
    weight_decay: float = 0.0
    decay: str = "l2"
    maximize: bool = False
    history: list[Array] = field(default_factory=list)
    B: Array | None = None
    d: Array | None = None
    floor: float = 0.0

    def average(self, num: int) -> Array:
        """The mean of the first ``num`` gradients with weights beta^age: no recursion, no correction."""
        ages = np.arange(num)[::-1]
        weights = self.beta**ages / (self.beta**ages).sum()
        return sum((w * g for w, g in zip(weights, self.history[:num], strict=True)), np.zeros(self.theta.size))

    def step(self, gradient: Array) -> None:
        if not gradient.any():
            return
        theta = self.theta.reshape(-1)
        g = (-1 if self.maximize else 1) * gradient.reshape(-1)
        if self.decay == "l2":
            g = g + self.weight_decay * theta
        t = len(self.history) + 1
        self.history.append(g)
        before, now = self.average(t - 1), self.average(t)
        B, d = (np.zeros(theta.size) if x is None else x for x in (self.B, self.d))

        eps = self.eps / self.sigma if self.rebound == "constant" else self.eps
        alpha = (d @ (now - before) + d @ np.diag(B) @ d) / (np.linalg.norm(d, 4) + eps) ** 4
        self.B = B - alpha * d**2

        if self.rebound == "constant":
            self.floor, added = self.sigma, 0.0
        else:
            self.floor, added = (
                float(np.linalg.norm(g - before, np.inf)),
                self.eps * (1 - self.beta**t) / (1 - self.beta),
            )
        D = np.maximum(np.abs(self.B), self.floor) + added
        self.d = now / D
        if self.decay == "decoupled":
            self.d = self.d + self.weight_decay * theta
        elif self.decay == "stable":
            self.d = self.d + self.weight_decay / D.mean() * theta
        self.theta = (theta - self.rate(t) * self.d).reshape(self.theta.shape)

    def rate(self, t: int) -> float:
        if t > self.warmup:
            return self.lr
        done = (t - 1) / self.warmup
        return (1 - done) * self.init_lr + done * self.lr

    def change(self, **options: Any) -> None:
        for name, value in options.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
