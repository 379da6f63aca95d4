"""ApolloQN's state: resume, copies, the two halves of a step."""

import copy
import io
from typing import Any

import pytest
import torch
from quasi_newton_cases import ALL, make, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import insitu
from insitu import ApolloQNW


def model(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 11)).to(dtype)


def train(m: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(m(tokens).float(), tokens.flip(0)).backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    "storage",
    [{}, {"rounding": "compensated"}, {"moments": "bfloat16"}, {"rounding": "nearest", "maximize": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ALL, ids=str)
def test_resume_is_bit_exact(options: dict[str, Any], dtype: torch.dtype, storage: dict[str, Any]) -> None:
    whole, first, second = model(dtype), model(dtype), model(dtype, seed=9)
    train(whole, make(whole.parameters(), **options, **storage), range(6))
    optimizer = make(first.parameters(), **options, **storage)
    train(first, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    resumed = make(second.parameters(), **options, **storage, seed=123)  # the seeds come from the checkpoint
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(2, 6))
    assert same(second, whole)
    assert not same(second, first), "nothing was trained after the resume"


@pytest.mark.parametrize("options", ALL, ids=str)
def test_torchs_checkpointing_materialises_saves_and_restores_the_state(options: dict[str, Any]) -> None:
    m, resumed = model(torch.bfloat16), model(torch.bfloat16)
    optimizer, resumed_optimizer = make(m.parameters(), **options), make(resumed.parameters(), **options)
    start = copy.deepcopy(m)
    get_optimizer_state_dict(m, optimizer)  # steps once on zero gradients
    assert same(m, start)
    train(m, optimizer, range(3))
    saved = copy.deepcopy((m.state_dict(), get_optimizer_state_dict(m, optimizer)))
    train(m, optimizer, range(3, 5))
    resumed.load_state_dict(saved[0])
    set_optimizer_state_dict(resumed, resumed_optimizer, saved[1])
    train(resumed, resumed_optimizer, range(3, 5))
    assert same(m, resumed)


def test_a_copied_optimizer_steps_alike_and_does_not_warn_again() -> None:
    m = model(torch.bfloat16)
    optimizer = make(m.parameters(), decay="decoupled", weight_decay=0.1)
    train(m, optimizer, range(2))
    other, other_optimizer = copy.deepcopy((m, optimizer))
    other_optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    train(m, optimizer, range(2, 5))
    train(other, other_optimizer, range(2, 5))
    assert same(m, other)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_the_first_half_changes_no_weight_and_two_halves_are_the_step(options: dict[str, Any]) -> None:
    whole, halves = model(torch.bfloat16), model(torch.bfloat16)
    one, two = make(whole.parameters(), **options), make(halves.parameters(), **options)
    for step in range(4):
        train(whole, one, range(step, step + 1))
        tokens = torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(step))
        two.zero_grad()
        nn.functional.cross_entropy(halves(tokens).float(), tokens.flip(0)).backward()
        before = [p.detach().clone() for p in halves.parameters()]
        write = two.prepare()
        assert all(torch.equal(a, b) for a, b in zip(before, halves.parameters(), strict=True))
        write()
    assert same(whole, halves)
    assert not all(torch.equal(a, b) for a, b in zip(before, halves.parameters(), strict=True))


def test_the_closure_runs_with_gradients_and_its_loss_comes_back() -> None:
    p = nn.Parameter(weights(4))
    optimizer = make([p])
    before = p.detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(float(before.square().sum()))
    assert not torch.equal(p, before)


def test_groups_of_a_model_with_roles_are_taken() -> None:
    m = model(torch.float32)
    optimizer = make(insitu.param_groups(m, weight_decay=0.1), ApolloQNW)
    train(m, optimizer, range(2))
    assert {tuple(sorted(s)) for s in map(optimizer.state.get, m.parameters()) if "direction" in s} == {
        ("direction", "exp_avg", "floor", "hessian", "numel", "offset", "seed", "skipped", "step")
    }
    assert "direction" not in optimizer.state[m[1].bias], "no decay there, so no third state"
