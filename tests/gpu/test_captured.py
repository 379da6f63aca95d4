"""Forward, backward and step in one CUDA graph: replays have the bits of plain steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from insitu import APOLLO, param_groups

STEPS = 8


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(50, 64), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 50)]
    return nn.Sequential(*layers).to("cuda", dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), x.argmax(1).flip(0))


@pytest.mark.filterwarnings("ignore:rank=:UserWarning")
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rank": 1, "granularity": "tensor"}, {"projection": "sketch"}], ids=str)
def test_replays_are_steps_to_the_bit(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    batches = torch.randn(STEPS, 32, 50, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    lr = torch.tensor(1e-2, device="cuda")
    numbers = {"lr": lr, "rank": 8, "refresh": 3, "weight_decay": 0.1, "backend": backend, **options}
    models = [model_of(dtype), model_of(dtype)]
    plain, optimizer = (
        APOLLO(param_groups(m), **numbers, capturable=capturable)
        for m, capturable in zip(models, (False, True), strict=True)
    )

    def step(model: nn.Module, its: APOLLO, x: Tensor) -> None:
        its.zero_grad(set_to_none=True)
        loss_of(model, x).backward()
        its.step()

    for x in batches:
        step(models[0], plain, x)

    static = batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in batches[:2]:
            static.copy_(x)
            step(models[1], optimizer, static)
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_of(models[1], static).backward()
        optimizer.step()
    for x in batches[2:]:
        static.copy_(x)
        optimizer.advance()
        graph.replay()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
        mine, theirs = optimizer.state[q], plain.state[p]
        assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in theirs)
