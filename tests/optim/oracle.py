"""APOLLO in float64 NumPy, written from the paper (arXiv 2412.05270, Algorithm 1 and equation 4) and not from our code.

Always on the matrix turned so that m <= n, as the paper has it, with loops over channels; only the random projections are taken
from the package, as dense matrices.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Apollo:
    """One matrix. ``P`` maps a refresh index to the (r, m) projection."""

    W: Array
    projections: dict[int, Array]
    lr: float = 1e-2
    alpha: float | None = None
    refresh: int = 200
    tensorwise: bool = False
    exact: bool = False
    gamma: float | None = 1.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0
    maximize: bool = False
    freeze: bool = True  # a gradient that is all zero changes nothing; not so for one matrix of a stack
    t: int = 0
    last: float = 0.0
    M: Array | None = None
    V: Array | None = None
    norms: list[float] = field(default_factory=list)
    cancellation: float = 1.0  # the largest of |P| |G_j| / |R_j|: so much of float32's precision a sum may lose

    def step(self, gradient: Array) -> None:
        turned = self.W.shape[0] >= self.W.shape[1]
        G = gradient.T if turned else gradient
        if self.freeze and not G.any():
            return
        P = self.projections[self.t // self.refresh]
        self.t += 1
        m, r = G.shape[0], P.shape[0]
        R = np.einsum("rm,mn->rn", P, G)
        sizes, left = np.linalg.norm(P) * np.linalg.norm(G, axis=0), np.linalg.norm(R, axis=0)
        self.cancellation = max([self.cancellation, *sizes[left > 0] / left[left > 0]])
        if self.M is None or self.V is None:
            self.M, self.V = np.zeros_like(R), np.zeros_like(R)
        self.M = self.beta1 * self.M + (1 - self.beta1) * R
        self.V = self.beta2 * self.V + (1 - self.beta2) * R * R
        direction = (self.M / (1 - self.beta1**self.t)) / (np.sqrt(self.V / (1 - self.beta2**self.t)) + self.eps)
        below = G if self.exact else R
        U = np.zeros_like(G)
        alpha = np.sqrt(m / r) if self.alpha is None else self.alpha
        whole = np.linalg.norm(direction) / np.linalg.norm(below) if below.any() else 0.0
        for j in range(G.shape[1]):
            if np.linalg.norm(G[:, j]) == 0 or np.linalg.norm(R[:, j]) == 0:
                s = whole if self.tensorwise else 0.0
            else:
                s = whole if self.tensorwise else np.linalg.norm(direction[:, j]) / np.linalg.norm(below[:, j])
            U[:, j] = alpha * s * G[:, j]
        norm = float(np.linalg.norm(U))
        if self.gamma is not None and self.last > 0 and norm > self.gamma * self.last:
            U *= self.gamma * self.last / norm
            norm = self.gamma * self.last
        if norm > 0:
            self.last = norm
        self.norms.append(norm)
        U = U.T if turned else U
        self.W = (1 - self.lr * self.decay) * self.W + (self.lr if self.maximize else -self.lr) * U


def singular(gradient: Array, rank: int) -> Array:
    """The paper's SVD projection: the first singular vectors of the smaller side, by an eigendecomposition. The largest entry
    of each is positive."""
    G = gradient.T if gradient.shape[0] >= gradient.shape[1] else gradient
    _, vectors = np.linalg.eigh(G @ G.T)
    rows = [vectors[:, -1 - i] for i in range(min(rank, len(G)))]
    return np.stack([row * np.sign(row[np.argmax(np.abs(row))]) for row in rows])


def adamw(W: Array, gradients: list[Array], lr: float, decay: float = 0.0) -> Array:
    """Loshchilov and Hutter 2019, Algorithm 2, with torch's defaults."""
    M, V = np.zeros_like(W), np.zeros_like(W)
    for t, G in enumerate(gradients, 1):
        M, V = 0.9 * M + 0.1 * G, 0.999 * V + 0.001 * G * G
        W = W - lr * decay * W - lr * (M / (1 - 0.9**t)) / (np.sqrt(V / (1 - 0.999**t)) + 1e-8)
    return W
