"""State: tensors and plain numbers, made at the first step, and a resume that nobody can tell from never having stopped."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import insitu
from insitu import APOLLO, APOLLOMini


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 11)).to(dtype)


def optimizer_of(m: nn.Module, **options: Any) -> APOLLO:
    return APOLLO(insitu.param_groups(m), **{"lr": 1e-2, "rank": 4, "refresh": 3, "weight_decay": 0.01, **options})


def train(m: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 11, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(m(tokens).float(), tokens.flip(0)).backward()
        optimizer.step()


def bits(m: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in m.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [2, 3, 4], ids=lambda s: f"stop after {s}")  # a refresh lies between 3 and 4
@pytest.mark.parametrize(
    "options", [{}, {"projection": "sketch", "dense": "apollo"}, {"granularity": "tensor"}], ids=str
)
def test_resume_is_bit_exact(dtype: torch.dtype, stop: int, options: dict[str, Any]) -> None:
    whole = model(dtype)
    train(whole, optimizer_of(whole, **options), range(8))

    first = model(dtype)
    optimizer = optimizer_of(first, **options)
    train(first, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = model(dtype, seed=9)
    second.load_state_dict(saved["model"])
    resumed = optimizer_of(second, **options, seed=123)  # the seeds come from the checkpoint
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(stop, 8))
    assert same(bits(second), bits(whole))
    assert not same(bits(second), bits(first)), "nothing was trained after the resume"


def test_the_same_seed_repeats_and_another_differs() -> None:
    def run(seed: int) -> list[torch.Tensor]:
        m = model(torch.bfloat16)
        train(m, optimizer_of(m, seed=seed), range(4))
        return bits(m)

    assert same(run(0), run(0))
    assert not same(run(0), run(1))


def test_equal_tensors_at_different_positions_get_different_projections() -> None:
    twins = [nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    optimizer = APOLLO(twins, rank=2)
    gradient = torch.randn(8, 6)
    for p in twins:
        p.grad = gradient.clone()
    optimizer.step()
    assert not torch.equal(*(optimizer.state[p]["exp_avg"] for p in twins))


def test_state_holds_tensors_and_numbers_of_the_documented_sizes() -> None:
    m = model(torch.bfloat16)
    optimizer = optimizer_of(m)
    assert len(optimizer.state) == 0
    train(m, optimizer, range(1))
    embedding, tall, head = (m.get_parameter(f"{i}.weight") for i in (0, 1, 3))
    assert optimizer.state[tall]["exp_avg"].shape == (24, 4)
    for p in (embedding, head):  # dense="adamw"
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    for state in optimizer.state.values():
        assert all(isinstance(value, torch.Tensor | int | float) for value in state.values())
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert -(2**63) <= state["seed"] < 2**63
    mini = APOLLOMini(insitu.param_groups(m), dense="apollo")
    train(m, mini, range(1))
    assert [mini.state[p]["exp_avg"].numel() for p in (embedding, tall, head)] == [16, 24, 24]


def test_a_zero_gradient_makes_the_state_and_changes_no_bit() -> None:
    m = model(torch.bfloat16)
    optimizer = optimizer_of(m)
    before = bits(m)
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(bits(m), before)
    assert all("exp_avg" in optimizer.state[p] for p in m.parameters())
    # What torch's checkpointing does to make state must not be felt afterwards.
    fresh = model(torch.bfloat16)
    train(fresh, optimizer_of(fresh), range(3))
    train(m, optimizer, range(3))
    assert same(bits(m), bits(fresh))


def test_a_copied_optimizer_steps_alike() -> None:
    m = model()
    optimizer = optimizer_of(m)
    train(m, optimizer, range(2))
    other, other_optimizer = copy.deepcopy((m, optimizer))
    train(m, optimizer, range(2, 6))
    train(other, other_optimizer, range(2, 6))
    assert same(bits(m), bits(other))


def test_a_tensor_learning_rate_and_changes_between_steps_are_honoured() -> None:
    m, n = model(), model()
    a, b = optimizer_of(m, lr=1e-2), optimizer_of(n, lr=torch.tensor(1e-2))
    train(m, a, range(2))
    train(n, b, range(2))
    assert same(bits(m), bits(n))
    for group in a.param_groups:
        group["lr"] = 0.0
    before = bits(m)
    train(m, a, range(2, 3))
    assert same(bits(m), before)


def test_the_closure_runs_with_gradients_and_its_loss_comes_back() -> None:
    m = model()
    optimizer = optimizer_of(m)
    before = bits(m)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = m(torch.tensor([1, 2])).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert not same(bits(m), before)


def test_parameters_without_gradient_and_frozen_ones_are_left_alone() -> None:
    m = model()
    m[1].weight.requires_grad_(False)
    optimizer = optimizer_of(m)
    kept = m[1].weight.detach().clone()
    train(m, optimizer, range(2))
    assert torch.equal(m[1].weight, kept)
    assert m[1].weight not in optimizer.state


def test_named_tensors_dicts_and_bare_tensors_agree() -> None:
    results = []
    for form in ("bare", "named", "dict"):
        m = nn.Linear(8, 6, bias=False)
        with torch.no_grad():
            m.weight.copy_(torch.arange(48.0).view(6, 8) / 48)
        params: Any = {"bare": m.parameters(), "named": m.named_parameters(), "dict": [{"params": [m.weight]}]}[form]
        optimizer = APOLLO(params, rank=2)
        m.weight.grad = torch.ones_like(m.weight)
        optimizer.step()
        results.append(m.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_rank_above_half_the_side_warns_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        APOLLO([nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(6, 9))], rank=5)
    assert len(caught) == 1
    assert "rank=5" in str(caught[0].message)


@pytest.mark.parametrize("backend", ["reference", "blocked", "native", "fused"])
def test_a_step_in_two_halves_is_the_step_and_the_first_half_changes_no_weight(backend: str) -> None:
    whole, halves = model(torch.bfloat16), model(torch.bfloat16)
    one, two = (optimizer_of(m, backend=backend, dense="apollo") for m in (whole, halves))
    for step in range(5):
        train(whole, one, range(step, step + 1))
        tokens = torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(step))
        two.zero_grad()
        nn.functional.cross_entropy(halves(tokens).float(), tokens.flip(0)).backward()
        before = bits(halves)
        write = two.prepare()
        assert same(bits(halves), before)
        write()
        assert not same(bits(halves), before)
    assert same(bits(whole), bits(halves))
