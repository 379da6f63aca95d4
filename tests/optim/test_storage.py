"""How parameters and moments are stored: compensated bf16, bf16 moments that decay, and the bytes of each."""

from typing import Any

import pytest
import torch
from torch import nn

from insitu import APOLLO

BACKENDS = ["reference", "blocked", "native", "fused"]


def gradients(*shape: int, num: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator) for _ in range(num)]


def run(start: torch.Tensor, grads: list[torch.Tensor], **options: Any) -> tuple[nn.Parameter, dict[str, Any]]:
    p = nn.Parameter(start.clone())
    optimizer = APOLLO([p], **{"lr": 1e-3, "rank": 3, **options})
    for g in grads:
        p.grad = g.to(p.dtype)
        optimizer.step()
    return p, optimizer.state[p]


def both(p: nn.Parameter, state: dict[str, Any]) -> torch.Tensor:
    return p.detach().double() + state["residual"].double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (500,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compensated_storage_follows_float32_where_bf16_stands_still(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    start, grads = torch.randn(shape).to(dtype), [g.to(dtype) for g in gradients(*shape, num=60)]
    tiny = {"lr": 2e-5, "backend": backend}
    exact, _ = run(start.float(), [g.float() for g in grads], **tiny)
    kept, state = run(start, grads, rounding="compensated", **tiny)
    lost, _ = run(start, grads, rounding="nearest", **tiny)
    moved = (exact.detach() - start.float()).norm()
    # Two numbers of 8 bits hold 16 or more; each of 60 steps rounds once, to 2^-17 of a weight.
    assert (both(kept, state) - exact.detach().double()).norm() < 0.05 * moved
    assert (lost.detach().float() - exact.detach()).norm() > 0.4 * moved
    # The parameter is the nearest number; a residual that was rounded to half a place makes a tie now and then.
    assert (kept.detach() == both(kept, state).to(dtype)).float().mean() > 0.98
    assert state["residual"].dtype == torch.bfloat16
    assert state["residual"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_residual_lives_and_dies_with_the_option_and_is_resumed(backend: str) -> None:
    start, grads = torch.randn(30, 20).bfloat16(), gradients(30, 20, num=8)
    whole, state = run(start, grads, rounding="compensated", backend=backend)
    p = nn.Parameter(start.clone())
    optimizer = APOLLO([p], lr=1e-3, rank=3, rounding="compensated", backend=backend)
    for i, g in enumerate(grads):
        if i == 4:
            other = APOLLO([p], lr=1e-3, rank=3, rounding="compensated", backend=backend)
            other.load_state_dict(optimizer.state_dict())
            optimizer = other
        p.grad = g.bfloat16()
        optimizer.step()
    assert torch.equal(p, whole)
    assert torch.equal(optimizer.state[p]["residual"], state["residual"])
    optimizer.param_groups[0]["rounding"] = "stochastic"
    optimizer.step()
    assert "residual" not in optimizer.state[p]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4000,), (400, 24)], ids=str)
def test_a_bf16_second_moment_decays(backend: str, shape: tuple[int, ...]) -> None:
    # The trap: 0.999 v rounds to v in bf16. A large gradient once, and small ones ever after.
    big, small = torch.ones(shape), torch.full(shape, 1e-3)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = APOLLO([p], lr=0.0, rank=10, granularity="channel", moments="bfloat16", backend=backend)
    for g in [big] + [small] * 700:
        p.grad = g
        optimizer.step()
    V = optimizer.state[p]["exp_avg_sq"]
    assert V.dtype == torch.bfloat16
    exact = APOLLO([q := nn.Parameter(torch.zeros(shape))], lr=0.0, rank=10, granularity="channel", backend=backend)
    for g in [big] + [small] * 700:
        q.grad = g
        exact.step()
    reference = exact.state[q]["exp_avg_sq"]
    assert V.float().mean().item() == pytest.approx(reference.mean().item(), rel=0.02)
    one = torch.tensor(1.0, dtype=torch.bfloat16)
    assert one * 0.999 == one, "nearest rounding would stand still"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (500,)], ids=str)
def test_bf16_moments_are_close_to_float32_ones(backend: str, shape: tuple[int, ...]) -> None:
    start, grads = torch.randn(shape), gradients(*shape, num=20)
    exact, _ = run(start, grads, backend=backend, limiter=None)
    near, state = run(start, grads, backend=backend, limiter=None, moments="bfloat16")
    moved = (exact - start).norm()
    assert 0 < (near - exact).norm() < 0.02 * moved
    assert {state[k].dtype for k in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def test_the_bytes_of_the_state_are_the_documented_ones() -> None:
    m, n, r = 24, 40, 4
    counts = 2 * 8  # step and skipped

    def state_bytes(role: str, **options: Any) -> int:
        p = nn.Parameter(torch.randn(m, n).bfloat16())
        optimizer = APOLLO([{"params": [p], "role": role}], rank=r, **options)
        p.grad = torch.randn(m, n).bfloat16()
        optimizer.step()
        return sum(x.nbytes for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)) - counts

    assert state_bytes("matrix") == 2 * r * n * 4 + 4
    assert state_bytes("matrix", moments="bfloat16") == 2 * r * n * 2 + 4
    assert state_bytes("matrix", projection="svd") == 2 * r * n * 4 + 4 + r * m * 4
    assert state_bytes("matrix", rounding="compensated") == 2 * r * n * 4 + 4 + 2 * m * n
    assert state_bytes("dense") == 2 * m * n * 4
    assert state_bytes("dense", dense="sgd") == 0
    assert state_bytes("dense", dense="apollo") == 2 * r * n * 4 + 4
