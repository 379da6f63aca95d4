"""What the tests of ApolloQN share: options, gradients, and a run beside the oracle."""

import itertools
import warnings
from typing import Any

import numpy as np
import torch
from oracle_quasi_newton import QuasiNewton
from torch import nn

from insitu import ApolloQN

# The same formulas in float32 and float64: relative to how far the weights moved, a few last places of the weights aside.
TOLERANCE = 5e-5

RATE = {"lr": 0.01, "warmup": 3, "init_lr": 1e-4}
REBOUNDS, DECAYS = ("constant", "belief"), ("l2", "decoupled", "stable")
# Strong enough to be seen, weak enough to leave the gradient a say: "stable" is divided by a mean near sigma.
DECAY = {"l2": 0.02, "decoupled": 0.3, "stable": 0.02}
ALL: list[dict[str, Any]] = [
    {"rebound": r, "decay": d, "weight_decay": DECAY[d]} for r, d in itertools.product(REBOUNDS, DECAYS)
]


def make(params: Any, cls: type[ApolloQN] = ApolloQN, **options: Any) -> ApolloQN:
    """An optimizer whose warm-up is short on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="warmup=")
        return cls(params, **{**RATE, **options})


def some(*shape: int, num: int = 8, seed: int = 2) -> list[torch.Tensor]:
    """Gradients that share a direction and jump in size, so that some curvatures are above the bound and some below."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [(base + torch.randn(shape, generator=generator)) * (0.2 if i % 3 == 2 else 0.01) for i in range(num)]


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def run(
    start: torch.Tensor,
    gradients: list[torch.Tensor],
    changes: dict[int, dict[str, Any]] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The weights and the state after some steps; ``changes`` of options before a step."""
    p = nn.Parameter(start.clone())
    optimizer = make([p], **options)
    for i, gradient in enumerate(gradients):
        optimizer.param_groups[0].update((changes or {}).get(i, {}))
        p.grad = gradient.to(p.dtype)
        optimizer.step()
    return p.detach(), optimizer.state[p]


def run_oracle(
    start: torch.Tensor,
    gradients: list[torch.Tensor],
    changes: dict[int, dict[str, Any]] | None = None,
    **options: Any,
) -> QuasiNewton:
    oracle = QuasiNewton(start.double().numpy(), **{**RATE, **options})
    for i, gradient in enumerate(gradients):
        oracle.change(**(changes or {}).get(i, {}))
        oracle.step(gradient.double().numpy())
    return oracle


def assert_agree(start: torch.Tensor, got: torch.Tensor, oracle: QuasiNewton, tolerance: float = TOLERANCE) -> None:
    assert got.isfinite().all()
    moved = np.abs(oracle.theta - start.double().numpy()).max(initial=0.0)
    ulps = 2e-7 * np.abs(oracle.theta).max(initial=0.0)
    np.testing.assert_allclose(got.double().numpy(), oracle.theta, rtol=0, atol=tolerance * moved + ulps)
