"""Ma's Apollo: the formulas against an independent float64 oracle, and two states against three."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_quasi_newton import QuasiNewton
from quasi_newton_cases import (
    ALL,
    DECAY,
    DECAYS,
    RATE,
    REBOUNDS,
    TOLERANCE,
    assert_agree,
    make,
    run,
    run_oracle,
    some,
    weights,
)
from torch import nn

from insitu import ApolloQN, ApolloQNW
from insitu.optim import quasi_newton

# --- the formulas


@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "climb"])
@pytest.mark.parametrize("warmup", [0, 3, 500])
@pytest.mark.parametrize("options", [*ALL, *({"rebound": rebound} for rebound in REBOUNDS)], ids=str)
def test_every_combination_is_the_oracles(options: dict[str, Any], warmup: int, maximize: bool) -> None:
    start, gradients = weights(5, 7), some(5, 7)
    options = {**options, "warmup": warmup, "maximize": maximize, "init_lr": 1e-3}
    got, state = run(start, gradients, **options)
    oracle = run_oracle(start, gradients, **options)
    assert_agree(start, got, oracle)
    assert oracle.B is not None
    B = state["hessian"].double().numpy().reshape(-1)
    np.testing.assert_allclose(B, oracle.B, rtol=0, atol=TOLERANCE * np.abs(oracle.B).max())
    assert state["floor"].item() == pytest.approx(oracle.floor, rel=1e-5)
    assert 0.05 < (np.abs(B) > 0.3 * oracle.floor).mean() < 0.99, "one side of the maximum had no say"


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.5},
        {"beta": 0.0},
        {"eps": 1.0},
        {"sigma": 0.02},
        {"rebound": "belief"},
        {"rebound": "belief", "eps": 0.1},
        {"warmup": 5},
        {"init_lr": 5e-3},
        {"lr": 0.02},
        {"maximize": True},
        *ALL,
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_every_option_has_the_oracles_effect(options: dict[str, Any], backend: str) -> None:
    start, gradients = weights(9), some(9)
    got, _ = run(start, gradients, backend=backend, **options)
    assert_agree(start, got, run_oracle(start, gradients, **options))
    plain, _ = run(start, gradients, rebound=options.get("rebound", "constant") if len(options) > 1 else "constant")
    moved = (plain - start).norm()
    assert (got - plain).norm() > 100 * TOLERANCE * moved, "the option had no effect: this test would pass without it"


@given(
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    rebound=st.sampled_from(REBOUNDS),
    decay=st.sampled_from(DECAYS),
    strength=st.sampled_from([0.0, 1.0]),
    beta=st.sampled_from([0.0, 0.6, 0.9]),
    size=st.sampled_from([1, 3, 1 << 16]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_shape_in_pieces_of_any_size(
    shape: tuple[int, ...], rebound: str, decay: str, strength: float, beta: float, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator)
    # Sparse gradients, and some that are all zero.
    gradients = [g * torch.randint(0, 2, shape, generator=generator) for g in some(*shape, num=5, seed=seed % 1000)]
    options: dict[str, Any] = {
        "rebound": rebound,
        "decay": decay,
        "beta": beta,
        "weight_decay": strength * DECAY[decay],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quasi_newton, "_BLOCK", size)
        got, state = run(start, gradients, **options)
    oracle = run_oracle(start, gradients, **options)
    # Of few elements B - z d^2 / |d|^4 can be a small difference of large numbers.
    assert_agree(start, got, oracle, 20 * TOLERANCE)
    assert state["hessian"].shape == state["exp_avg"].shape == shape
    assert int(state["step"]) == len(oracle.history)


@pytest.mark.parametrize("rebound", REBOUNDS)
def test_the_curvature_of_a_parabola_is_found_in_one_step_and_its_minimum_in_the_next(rebound: str) -> None:
    # With lr = 1 and no average the step is Newton's: the first one probes.
    start, h = torch.tensor(3.0), 0.5
    p = nn.Parameter(start.clone())
    optimizer = make([p], lr=1.0, warmup=0, beta=0.0, eps=1e-7, sigma=0.1, rebound=rebound)
    for _ in range(3):
        optimizer.zero_grad()
        (h / 2 * p.square()).backward()
        optimizer.step()
    assert abs(float(optimizer.state[p]["hessian"])) == pytest.approx(h, rel=1e-4)
    if rebound == "constant":
        assert abs(p.item()) < 1e-4


# --- two states


@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "climb"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("rebound", REBOUNDS)
def test_two_states_are_to_the_bit_the_three_that_store_the_direction(
    rebound: str, weight_decay: float, maximize: bool
) -> None:
    # A direction that is in the state is used; what is recalled without it must be the same in float32, bit for bit.
    start, gradients = weights(31, 17), some(31, 17, num=20)
    trajectories = []
    for stored in (False, True):
        p = nn.Parameter(start.clone())
        optimizer = make([p], rebound=rebound, weight_decay=weight_decay, maximize=maximize)
        path = []
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
            if stored:
                m, B, floor, offset = (optimizer.state[p][k] for k in ("exp_avg", "hessian", "floor", "offset"))
                direction = optimizer.state[p].setdefault("direction", m / (B.abs().clamp(min=floor) + offset))
                torch.testing.assert_close(direction, m / (B.abs().clamp(min=floor) + offset), rtol=0, atol=0)
            path.append(p.detach().clone())
        trajectories.append(torch.stack(path))
    assert torch.equal(*trajectories)
    oracle = run_oracle(start, gradients, rebound=rebound, weight_decay=weight_decay, maximize=maximize)
    assert_agree(start, trajectories[0][-1], oracle)


@pytest.mark.parametrize(
    "changes",
    [
        {"sigma": 0.03},
        {"eps": 1e-2},
        {"rebound": "belief"},
        {"rebound": "belief", "eps": 1e-2},
        {"rebound": "constant"},
        {"lr": 0.03},
        {"beta": 0.9, "maximize": True},
        {"weight_decay": 0.03},
    ],
    ids=str,
)
@pytest.mark.parametrize("rebound", REBOUNDS)
def test_what_is_recalled_is_what_was_done_whatever_options_have_changed(rebound: str, changes: dict[str, Any]) -> None:
    start, gradients = weights(6, 5), some(6, 5)
    got, state = run(start, gradients, {4: changes}, rebound=rebound)
    assert "direction" not in state
    assert_agree(start, got, run_oracle(start, gradients, {4: changes}, rebound=rebound))


@pytest.mark.parametrize("decay", ["decoupled", "stable"])
@pytest.mark.parametrize("rebound", REBOUNDS)
def test_a_decay_of_the_direction_is_switched_on_and_off_without_losing_it(rebound: str, decay: str) -> None:
    start, gradients = weights(6, 5), some(6, 5, num=10)
    changes: dict[int, dict[str, Any]] = {
        3: {"weight_decay": DECAY[decay]},
        6: {"weight_decay": 0.0},
        8: {"decay": "l2"},
    }
    got, state = run(start, gradients, changes, decay=decay, rebound=rebound)
    assert "direction" in state
    assert_agree(start, got, run_oracle(start, gradients, changes, decay=decay, rebound=rebound))
    _, state = run(start, gradients[:3], changes, decay=decay, rebound=rebound)
    assert "direction" not in state, "nothing to store yet"


def test_weights_that_others_write_do_not_reach_the_direction() -> None:
    # A rollback between two steps: the last direction is still the one that was taken.
    start, gradients = weights(6, 5), some(6, 5, num=5)
    for options in ({}, {"decay": "decoupled", "weight_decay": 0.3}):
        p = nn.Parameter(start.clone())
        optimizer = make([p], **options)
        oracle = QuasiNewton(start.double().numpy(), **{**RATE, **options})
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
            oracle.step(gradient.double().numpy())
            with torch.no_grad():
                p.copy_(start)
            oracle.theta = start.double().numpy()
        assert oracle.B is not None
        B = optimizer.state[p]["hessian"].double().numpy().reshape(-1)
        np.testing.assert_allclose(B, oracle.B, rtol=0, atol=TOLERANCE * np.abs(oracle.B).max())


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_bytes_of_the_state_are_the_documented_ones(moments: str) -> None:
    each, elements = (4 if moments == "float32" else 2), 24 * 40

    def per_element(cls: type[ApolloQN] = ApolloQN, **options: Any) -> float:
        p = nn.Parameter(weights(24, 40).bfloat16())
        optimizer = make([p], cls, moments=moments, **options)
        p.grad = some(24, 40)[0].bfloat16()
        optimizer.step()
        state = optimizer.state[p]
        assert all(isinstance(value, torch.Tensor | int) for value in state.values())
        return sum(x.nbytes for x in state.values() if isinstance(x, torch.Tensor) and x.ndim) / elements

    for rebound in REBOUNDS:
        assert per_element(rebound=rebound) == 2 * each
        assert per_element(rebound=rebound, weight_decay=0.1) == 2 * each
        for decay in ("decoupled", "stable"):
            assert per_element(rebound=rebound, decay=decay) == 2 * each
            assert per_element(rebound=rebound, decay=decay, weight_decay=0.1) == 3 * each
    assert per_element(ApolloQNW, weight_decay=0.1) == 3 * each
    assert per_element(rounding="compensated") == 2 * each + 2
