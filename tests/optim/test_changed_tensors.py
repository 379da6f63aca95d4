"""A parameter that is another one than before: refused by name, in a step and in a checkpoint, and nothing is lost by it."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import insitu

MAKERS: dict[str, Callable[..., Any]] = {
    "apollo": lambda params, **options: insitu.APOLLO(params, rank=2, **options),
    "mini": lambda params, **options: insitu.APOLLOMini(params, dense="apollo", **options),
    "dense sgd": lambda params, **options: insitu.APOLLO(params, rank=2, dense="sgd", **options),
    "quasi-newton": lambda params, **options: insitu.ApolloQN(params, **options),
    "quasi-newton, decay": lambda params, **options: insitu.ApolloQNW(params, weight_decay=0.1, **options),
}
KINDS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def named(p: nn.Parameter, role: str = "dense") -> list[dict[str, Any]]:
    return [{"params": [p], "param_names": ["layers.3.weight"], "role": role}]


def step(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> None:
    p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape).to(p.dtype)
    optimizer.step()


def become(p: nn.Parameter, other: torch.Tensor) -> None:
    p.grad = None
    p.data = other


@KINDS
@pytest.mark.parametrize("shape", [(8, 24), (24, 9), (24, 8, 1), (192,)], ids=str)
def test_another_shape_is_refused_by_name(make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(24, 8))
    optimizer = make(named(p))
    step(optimizer, p)
    become(p, torch.ones(shape))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    message = f"layers.3.weight has the shape {shape}, but (24, 8) when .* make a new optimizer"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        step(optimizer, p)
    assert torch.equal(p, torch.ones(shape))
    assert str(optimizer.state_dict()["state"]) == str(before)


@KINDS
def test_another_shape_is_refused_with_another_rank_too(make: Callable[..., Any]) -> None:
    p = nn.Parameter(torch.ones(24, 8))
    optimizer = make(named(p))
    step(optimizer, p)
    become(p, torch.ones(24, 6))
    if "rank" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["rank"] = 3
    with pytest.raises(ValueError, match=r"has the shape \(24, 6\), but \(24, 8\)"):
        step(optimizer, p)


@KINDS
@pytest.mark.parametrize(("first", "then"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_type_is_refused_by_name_and_taken_when_it_is_meant(
    make: Callable[..., Any], first: str, then: str
) -> None:
    p = nn.Parameter(torch.ones(24, 8, dtype=getattr(torch, first)))
    optimizer = make(named(p))
    step(optimizer, p)
    before = copy.deepcopy(dict(optimizer.state[p]))
    become(p, p.detach().to(getattr(torch, then)))
    with pytest.raises(ValueError, match=f"layers.3.weight is torch.{then}, but torch.{first} when .*load_state_dict"):
        step(optimizer, p)
    assert {name: str(value) for name, value in optimizer.state[p].items()} == {k: str(v) for k, v in before.items()}
    optimizer.load_state_dict(optimizer.state_dict())  # the way out that the message names
    kept = p.detach().clone()
    step(optimizer, p)
    assert optimizer.state[p]["step"] == 2, "the state went on"
    assert not torch.equal(p, kept)


def test_a_model_that_is_converted_before_its_first_step_is_taken() -> None:
    model = nn.Linear(8, 24)
    optimizer = insitu.APOLLO(model.parameters(), rank=2)
    model.bfloat16()
    for p in model.parameters():
        step(optimizer, p)
    assert all(optimizer.state[p]["step"] > 0 for p in model.parameters())


def test_a_changed_rank_alone_starts_afresh_as_before() -> None:
    p = nn.Parameter(torch.ones(24, 8))
    optimizer = insitu.APOLLO(named(p, "matrix"), rank=2)
    step(optimizer, p)
    optimizer.param_groups[0]["rank"] = 4
    step(optimizer, p)
    assert optimizer.state[p]["exp_avg"].shape == (24, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["rank"] = 3  # changed after the last step, then saved
    resumed = insitu.APOLLO(named(p, "matrix"), rank=2)
    resumed.load_state_dict(saved)
    step(resumed, p)
    assert resumed.state[p]["exp_avg"].shape == (24, 3)


# The same number of elements, the same channels, the same everything but the order of the sides.
@KINDS
@pytest.mark.parametrize("shape", [(8, 24), (24, 9), (16, 12), (192,), (7,)], ids=str)
def test_a_checkpoint_of_another_shape_is_refused_and_nothing_has_changed(
    make: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    p, q = nn.Parameter(torch.ones(24, 8)), nn.Parameter(torch.ones(shape))
    saved, optimizer = make(named(p)), make(named(q) if q.ndim > 1 else named(q, "adamw"), lr=0.5)
    step(saved, p)
    if not any("exp_avg" in state for state in saved.state.values()) and q.numel() == p.numel():
        return  # without moments nothing belongs to a shape
    step(optimizer, q)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"loaded state of layers\.3\.weight is of a tensor of 192 elements .*shape"):
        optimizer.load_state_dict(saved.state_dict())
    assert str(optimizer.state_dict()) == str(before)


@KINDS
def test_a_checkpoint_of_torchs_adamw_is_refused(make: Callable[..., Any]) -> None:
    p = nn.Parameter(torch.ones(24, 8))
    other = torch.optim.AdamW([p])
    step(other, p)
    with pytest.raises(ValueError, match=r"loaded group of layers\.3\.weight has no .*expected a state_dict of"):
        make(named(p)).load_state_dict(other.state_dict())
    saved = make(named(p)).state_dict()
    saved["state"] = other.state_dict()["state"]
    with pytest.raises(ValueError, match=re.escape("has the entries exp_avg, exp_avg_sq, step: expected")):
        make(named(p)).load_state_dict(saved)


def test_apollo_and_apollo_qn_do_not_take_each_others_checkpoints() -> None:
    p = nn.Parameter(torch.ones(24, 8))
    one, other = insitu.APOLLO(named(p), rank=2), insitu.ApolloQN(named(p))
    step(one, p)
    step(other, p)
    with pytest.raises(ValueError, match=r"has no beta, .*expected a state_dict of ApolloQN"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"has no alpha, .*expected a state_dict of APOLLO;"):
        one.load_state_dict(other.state_dict())


def test_a_checkpoint_of_another_type_of_the_same_tensor_goes_on() -> None:
    p, q = nn.Parameter(torch.ones(24, 8)), nn.Parameter(torch.ones(24, 8, dtype=torch.bfloat16))
    saved, optimizer = insitu.APOLLO(named(p), rank=2), insitu.APOLLO(named(q), rank=2)
    step(saved, p)
    optimizer.load_state_dict(saved.state_dict())
    step(optimizer, q)
    assert optimizer.state[q]["step"] == 2
