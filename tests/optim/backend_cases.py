"""What the tests of backends share. Triton runs in its interpreter, which must be asked for before triton is imported."""

import os
from typing import Any

import pytest
import torch
from torch import nn

from insitu import APOLLO

MARKS = [
    # Inductor, when it is first imported, defines what torch itself calls deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:rank=:UserWarning"),  # small matrices
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = ["triton"] if INTERPRETED else ["blocked", "native", "fused", "compiled"]


def stepped(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, **options: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Three tensors of one shape (so that some go together) after three steps, the second with one gradient of zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3)]
    optimizer = APOLLO(params, **{"lr": 1e-2, "backend": backend, "refresh": 2, **options})
    for i in range(3):
        for p in params:
            p.grad = (torch.randn(shape, generator=generator) * (1.0, 2.0, 1e-4)[i]).to(dtype)
        if i == 1:
            params[1].grad = torch.zeros_like(params[1])
        optimizer.step()
    return torch.stack([p.detach() for p in params]), optimizer.state[params[2]]
