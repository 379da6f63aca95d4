"""Beside apollo-torch as a black box, where somebody has installed it (CC-BY-NC: never a dependency, no line of it here).

It stores its Gaussian projections, so they are read from its state and given to ours. What must differ is kept apart: it
corrects the bias after the limiter (so the limiter is compared with betas of 0, where nothing is corrected), adds eps to the
uncorrected root, and 1e-8 to every norm.
"""

from typing import Any

import pytest
import torch
from torch import nn

from insitu import APOLLO
from insitu.optim.projection import ProjectionCache

apollo_torch = pytest.importorskip("apollo_torch", reason="needs apollo-torch, which is CC-BY-NC and not a dependency")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (10, 10)], ids=str)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize(
    ("betas", "limited"), [((0.9, 0.999), False), ((0.8, 0.9), False), ((0.0, 0.0), True)], ids=str
)
def test_the_same_steps_on_the_same_projections(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], scale_type: str, betas: tuple[float, float], limited: bool
) -> None:
    torch.manual_seed(0)
    theirs, ours = (nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in range(2))
    group = {"params": [theirs], "rank": 3, "scale": 2.0, "update_proj_gap": 4, "proj": "random", "proj_type": "std"}
    their = apollo_torch.APOLLOAdamW(
        [{**group, "scale_type": scale_type}], lr=1e-2, betas=betas, eps=1e-12, disable_nl=not limited
    )
    our = APOLLO(
        [ours],
        lr=1e-2,
        rank=3,
        refresh=4,
        alpha=2.0**0.5,  # their ``scale`` is squared
        granularity=scale_type,
        limiter=1.01 if limited else None,
        betas=betas,
        eps=1e-12,
    )
    drawn: list[torch.Tensor] = []

    def stored(*_: Any) -> torch.Tensor:
        matrix = their.state[theirs]["projector"].ortho_matrix
        drawn.append(matrix if matrix.shape[0] == 3 else matrix.T)
        return drawn[-1]

    monkeypatch.setattr(ProjectionCache, "get", stored)
    start = ours.detach().clone()
    for step in range(10):
        # Norms that grow and fall, so that the limiter has work; betas of 0 make every direction a sign.
        gradient = torch.randn(shape) * (1 + step % 3) * torch.rand(shape[0], 1)
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        their.step()
        our.step()
    assert not torch.equal(drawn[0], drawn[4])
    assert torch.equal(drawn[4], drawn[7])
    moved = (ours - start).abs().max()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * moved.item())
    assert moved > 1e-2
