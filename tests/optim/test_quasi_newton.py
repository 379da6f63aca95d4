"""Ma's Apollo: the formulas against an independent float64 oracle, two states against three, warm-up, storage, shards."""

import copy
import io
import itertools
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_quasi_newton import QuasiNewton
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import insitu
from insitu import ApolloQN, ApolloQNW
from insitu.optim import quasi_newton
from insitu.optim.seeds import mix

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


# --- the warm-up


def steps_of_size_one(optimizer: ApolloQN, params: list[nn.Parameter], num: int) -> list[list[float]]:
    """How far each parameter moves at each step where the direction is 1: the learning rates."""
    rates: list[list[float]] = []
    for _ in range(num):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.full_like(p, 0.01)  # sigma, and a curvature of 0: no gradient ever differs from another
        optimizer.step()
        rates.append([float(b - p.detach()) for b, p in zip(before, params, strict=True)])
        for p in params:
            optimizer.state[p]["hessian"].zero_()
            with torch.no_grad():
                p.zero_()
    return rates


def test_the_first_step_moves_by_exactly_init_lr_and_the_last_of_the_warmup_is_one_increment_short() -> None:
    p = nn.Parameter(torch.zeros(()))
    rates = [rate for (rate,) in steps_of_size_one(make([p], lr=0.01, warmup=4, init_lr=1e-5), [p], 7)]
    assert rates[0] == np.float32(1e-5), "exactly"
    expected = [1e-5 + (0.01 - 1e-5) * k / 4 for k in (0, 1, 2, 3, 4, 4, 4)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert rates[4] == rates[6] == np.float32(0.01), "exactly"


def test_without_warmup_the_first_step_is_lr_and_the_default_is_the_papers() -> None:
    p, q = (nn.Parameter(torch.zeros(())) for _ in range(2))
    assert steps_of_size_one(make([p], lr=0.01, warmup=0), [p], 1) == [[np.float32(0.01)]]
    group = ApolloQN([q]).param_groups[0]
    assert [group[k] for k in ("lr", "warmup", "init_lr", "eps", "sigma", "beta")] == [0.01, 500, 1e-5, 1e-4, 0.01, 0.9]


def test_each_group_warms_up_to_its_own_rate_in_its_own_time() -> None:
    a, b, c = (nn.Parameter(torch.zeros(())) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.03}, {"params": [c], "warmup": 2, "init_lr": 1e-3}]
    rates = steps_of_size_one(make(groups, lr=0.01, warmup=4, init_lr=1e-5), [a, b, c], 6)
    ramp = [0, 0.25, 0.5, 0.75, 1, 1]
    np.testing.assert_allclose([r[0] for r in rates], [1e-5 + (0.01 - 1e-5) * k for k in ramp], rtol=1e-6)
    np.testing.assert_allclose([r[1] for r in rates], [1e-5 + (0.03 - 1e-5) * k for k in ramp], rtol=1e-6)
    np.testing.assert_allclose([r[2] for r in rates], [1e-3, 5.5e-3, 0.01, 0.01, 0.01, 0.01], rtol=1e-6)


def test_a_scheduler_is_followed_during_the_warmup_and_lr_zero_keeps_the_weights_still() -> None:
    p = nn.Parameter(torch.zeros(()))
    optimizer = make([p], lr=0.01, warmup=4, init_lr=1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: [1.0, 0.5, 2.0, 1.0, 3.0, 1e-4, 0.0][epoch])
    rates = []
    for _ in range(6):
        rates += steps_of_size_one(optimizer, [p], 1)[0]
        scheduler.step()
    expected = [1e-5 + (lr - 1e-5) * k for lr, k in ((0.01, 0), (0.005, 0.25), (0.02, 0.5), (0.01, 0.75), (0.03, 1))]
    np.testing.assert_allclose(rates, [*expected, 1e-6], rtol=1e-6)
    q = nn.Parameter(torch.zeros(()))
    assert steps_of_size_one(make([q], lr=0.0, warmup=4), [q], 5) == [[0.0]] * 5
    assert steps_of_size_one(make([q], lr=torch.tensor(0.0), warmup=4), [q], 5) == [[0.0]] * 5


def test_steps_without_gradient_do_not_warm_up() -> None:
    p = nn.Parameter(torch.zeros(()))
    optimizer = make([p], lr=0.01, warmup=4, init_lr=1e-5)
    p.grad = torch.zeros(())
    for _ in range(3):
        optimizer.step()
    assert steps_of_size_one(optimizer, [p], 1) == [[np.float32(1e-5)]]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_tensor_learning_rate_is_a_learning_rate(warmup: int, shape: tuple[int, ...]) -> None:
    start, gradients = weights(6, 5), some(6, 5)
    number, _ = run(start, gradients, lr=0.01, warmup=warmup)
    tensor, _ = run(start, gradients, lr=torch.full(shape, 0.01), warmup=warmup)
    # Computed in float32 instead of in the host's float64.
    torch.testing.assert_close(tensor, number, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"rebound": "belief", "decay": "stable"}, {"decay": "decoupled"}], ids=str)
def test_nothing_is_read_back_from_a_device(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    # As on a device that would have to be waited for.
    for where in ("insitu.optim.base.readable", "insitu.optim.step.quasi_newton.readable"):
        monkeypatch.setattr(where, lambda tensor: False)
    p = nn.Parameter(weights(8, 6).bfloat16())
    optimizer = make([p], lr=torch.tensor(0.01), weight_decay=0.1, backend="reference", **options)
    p.grad = torch.ones_like(p)
    optimizer.step()

    def refuse(self: torch.Tensor, *_: object) -> None:
        raise AssertionError("a tensor was read back to the host")

    # The check of a learning rate reads it on a CPU only; int() is the count of updates, which CUDA delivers beforehand.
    monkeypatch.setattr(optimizer, "_check", lambda group: None)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.step()


# --- gradients that change nothing


@pytest.mark.parametrize("readable", [True, False], ids=["cpu", "as on a device"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_is_zero_or_not_finite_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, readable: bool, moments: str, options: dict[str, Any], bad: float
) -> None:
    if not readable:
        monkeypatch.setattr("insitu.optim.step.quasi_newton.readable", lambda tensor: False)
    p = nn.Parameter(weights(6, 5).bfloat16())
    optimizer = make([p], moments=moments, nonfinite="skip", **options)
    for gradient in some(6, 5, num=4):
        p.grad = gradient.bfloat16()
        optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    p.grad = torch.zeros_like(p)
    p.grad[2, 3] = bad
    optimizer.step()
    assert torch.equal(p, before)
    after = optimizer.state[p]
    assert int(after["skipped"]) == (bad != 0)
    for name in state.keys() - {"skipped"}:
        assert torch.equal(torch.as_tensor(after[name]), torch.as_tensor(state[name])), name


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_nan_stops_the_step_before_anything_has_changed(options: dict[str, Any]) -> None:
    params = [nn.Parameter(weights(6, 5)) for _ in range(2)]
    optimizer = make(params, **options)
    for p in params:
        p.grad = some(6, 5)[0]
    optimizer.step()
    before = copy.deepcopy([optimizer.state[p] for p in params])
    kept = [p.detach().clone() for p in params]
    params[1].grad = torch.full((6, 5), float("nan"))
    with pytest.raises(ValueError, match=r"gradient of parameter 1 is not finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, params, strict=True))
    for p, state in zip(params, before, strict=True):
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("options", ALL, ids=str)
def test_the_gradient_is_left_as_it_was(options: dict[str, Any]) -> None:
    p = nn.Parameter(weights(6, 5))
    optimizer = make([p], maximize=True, **options)
    for gradient in some(6, 5, num=3):
        p.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(p.grad, gradient)


def test_equal_gradients_leave_belief_without_a_bound_and_still_finite() -> None:
    # g - m = 0 and B = 0: only what is added keeps the denominator from 0.
    start, gradients = weights(4, 3), [torch.full((4, 3), 0.5)] * 4
    got, _ = run(start, gradients, rebound="belief", beta=0.5)
    assert_agree(start, got, run_oracle(start, gradients, rebound="belief", beta=0.5))
    tiny, _ = run(start, gradients, rebound="belief", beta=0.5, eps=1e-60, lr=0.0)
    assert torch.equal(tiny, start)


# --- state, copies and halves


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
        ("direction", "exp_avg", "floor", "hessian", "offset", "seed", "skipped", "step")
    }
    assert "direction" not in optimizer.state[m[1].bias], "no decay there, so no third state"


# --- storage


@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("shape", [(12, 8), (3, 4, 5)], ids=str)
def test_strides_do_not_matter(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    start, gradients = weights(*shape).bfloat16(), some(*shape)
    turned = start.mT.contiguous().mT
    assert not turned.is_contiguous()
    plain, _ = run(start, gradients, **options)
    assert torch.equal(run(turned, gradients, **options)[0], plain)
    assert torch.equal(run(start, [g.mT.contiguous().mT for g in gradients], **options)[0], plain)
    assert torch.equal(run(start, [g.expand(2, *shape)[1] for g in gradients], **options)[0], plain)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_bf16_step_is_the_float32_step_rounded_once(options: dict[str, Any]) -> None:
    start, gradient = weights(64, 48).bfloat16(), some(64, 48)[0].bfloat16()
    now = {"warmup": 0}
    exact, _ = run(start.float(), [gradient.float()], **options, **now)
    low = (exact.view(torch.int32) & -65536).view(torch.float32)
    high = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    rounded, _ = run(start, [gradient], **options, **now)
    assert ((rounded.float() == low) | (rounded.float() == high)).all()
    assert not torch.equal(rounded, exact.bfloat16()), "nearest, not stochastic"
    nearest, _ = run(start, [gradient], rounding="nearest", **options, **now)
    assert torch.equal(nearest, exact.bfloat16())
    assert not torch.equal(rounded, run(start, [gradient], seed=1, **options, **now)[0]), "the seed has no effect"


@pytest.mark.parametrize("options", ALL, ids=str)
def test_small_steps_are_kept_by_stochastic_and_compensated_bf16(options: dict[str, Any]) -> None:
    shape = (150, 100)
    start, gradients = weights(*shape).bfloat16(), [g.bfloat16() for g in some(*shape, num=60)]
    tiny = {**options, "lr": 2e-5 if options["rebound"] == "constant" else 2e-4, "warmup": 0}
    exact, _ = run(start.float(), [g.float() for g in gradients], **tiny)
    step = exact.double() - start.double()
    lost, _ = run(start, gradients, rounding="nearest", **tiny)
    assert (lost.double() - exact.double()).norm() > 0.4 * step.norm()
    kept, state = run(start, gradients, rounding="compensated", **tiny)
    both = kept.double() + state["residual"].double()
    assert (both - exact.double()).norm() < 0.05 * step.norm()
    # Noise of mean zero: along the step it averages out over 15000 elements.
    drawn, _ = run(start, gradients, rounding="stochastic", **tiny)
    along = ((drawn.double() - start.double()) * step).sum() / step.square().sum()
    assert along.item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_bf16_moments_are_close_to_float32_ones(options: dict[str, Any]) -> None:
    start, gradients = weights(40, 24), some(40, 24, num=20)
    exact, _ = run(start, gradients, **options)
    near, state = run(start, gradients, moments="bfloat16", **options)
    assert 0 < (near - exact).norm() < 0.05 * (exact - start).norm()
    names = {"exp_avg", "hessian"} | ({"direction"} if options["decay"] != "l2" else set())
    assert {name for name, value in state.items() if getattr(value, "dtype", None) == torch.bfloat16} == names


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("options", ALL, ids=str)
def test_pieces_draw_the_bits_and_keep_the_residuals_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], rounding: str
) -> None:
    start, gradients = weights(31, 17).bfloat16(), some(31, 17, num=5)
    options = {**options, "rounding": rounding, "moments": "bfloat16"}
    whole, state = run(start, gradients, **options)
    monkeypatch.setattr(quasi_newton, "_BLOCK", 37)
    got, pieces = run(start, gradients, **options)
    # A sum in another order may round another way, in float32's last place: seldom enough to change a carry.
    assert (got == whole).float().mean() > 0.99
    for name in state.keys() & {"exp_avg", "hessian", "direction", "residual"}:
        assert (pieces[name] == state[name]).float().mean() > 0.98, name


def test_bf16_moments_and_directions_draw_different_bits() -> None:
    x = torch.full((4000,), 1.0 + 2.0**-9)  # between two bf16 numbers
    draws = []
    for name in ("exp_avg", "hessian", "direction"):
        p = nn.Parameter(torch.zeros(4000))
        optimizer = make([p], moments="bfloat16", decay="decoupled", weight_decay=0.1)
        p.grad = torch.ones(4000)
        optimizer.step()
        (task,) = [t for t in _tasks(optimizer) if t.parameter is p]
        out = torch.empty(4000, dtype=torch.bfloat16)
        task.moment_precision(name).write(out, x.clone())
        draws.append(out)
    assert all((a != b).float().mean() > 0.2 for a, b in itertools.combinations(draws, 2))


def _tasks(optimizer: ApolloQN) -> list[Any]:
    from insitu.optim.base import _Backends

    group = optimizer.param_groups[0]
    return [optimizer._task(p, p.grad, group, "p", i, _Backends()) for i, p in enumerate(group["params"])]


def test_float64_weights_are_not_rounded_to_float32() -> None:
    start = weights(8, 6).double() + 1e-12
    for options in ALL:
        assert torch.equal(run(start, some(8, 6), lr=0.0, **options)[0], start)
    moved, _ = run(start, some(8, 6), lr=1e-12, warmup=0)  # far below a float32's last place
    assert (moved != start).float().mean() > 0.9


def test_changed_moments_start_afresh_and_keep_the_seed() -> None:
    p = nn.Parameter(weights(4, 3))
    optimizer = make([p])
    for moments in ("float32", "bfloat16"):
        optimizer.param_groups[0].update(moments=moments, seed=7)
        p.grad = some(4, 3)[0]
        optimizer.step()
    state = optimizer.state[p]
    assert state["hessian"].dtype == torch.bfloat16
    assert int(state["step"]) == 1
    assert state["seed"] == mix(7, 0)


# --- what a user gets wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0: expected a finite number >= 0"),
        ({"beta": 1.0}, r"beta=1\.0: expected a number in \[0, 1\)"),
        ({"beta": (0.9, 0.999)}, r"beta=\(0\.9, 0\.999\): expected a number"),
        ({"eps": 0.0}, r"eps=0\.0: expected a finite number > 0"),
        ({"sigma": 0.0}, r"sigma=0\.0: expected a finite number > 0"),
        ({"sigma": float("nan")}, r"sigma=nan"),
        ({"init_lr": -1e-5}, r"init_lr=-1e-05: expected a finite number >= 0"),
        ({"init_lr": None}, r"init_lr=None: expected"),
        ({"warmup": -1}, r"warmup=-1: expected an integer >= 0"),
        ({"warmup": 0.1}, r"warmup=0\.1: expected an integer >= 0"),
        ({"warmup": True}, r"warmup=True"),
        ({"rebound": "believe"}, r"rebound='believe': expected one of 'constant', 'belief'"),
        ({"decay": "L2"}, r"decay='L2': expected one of 'l2', 'decoupled', 'stable'"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"rounding": "up"}, r"rounding='up'"),
        ({"moments": "float16"}, r"moments='float16'"),
        ({"maximize": 1}, r"maximize=1"),
        ({"seed": 0.5}, r"seed=0\.5"),
        ({"backend": "fast"}, r"backend='fast'"),
        ({"nonfinite": "ignore"}, r"nonfinite='ignore'"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_bad_option_is_refused_by_name_value_and_expectation(options: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        ApolloQN([p], **options)
    with pytest.raises(ValueError, match=message):
        ApolloQNW([{"params": [p], **options}])
    optimizer = ApolloQN([p])
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 0.99)}, r"betas=\(0\.9, 0\.99\).*: there is one average: use beta="),
        ({"weight_decay_type": "L2"}, r"weight_decay_type='L2'.*: use decay="),
        ({"warmup_steps": 500}, r"warmup_steps=500.*: use warmup="),
        ({"rank": 4}, r"rank=4.*: .*insitu\.APOLLO"),
        ({"momentum": 0.9}, r"momentum=0\.9: expected one of lr, beta, eps, rebound, sigma, warmup"),
    ],
    ids=["betas", "weight_decay_type", "warmup_steps", "rank", "momentum"],
)
def test_an_unknown_option_is_refused_with_the_way_out(options: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    for cls in (ApolloQN, ApolloQNW):
        with pytest.raises(TypeError, match=message):
            cls([p], **options)
    if "momentum" not in options:  # groups may carry what others put there
        with pytest.raises(ValueError, match=message):
            ApolloQN([{"params": [p], **options}])


def test_a_short_warmup_warns_once_at_the_users_line() -> None:
    p = [nn.Parameter(torch.zeros(3)) for _ in range(5)]
    for cls in (ApolloQN, ApolloQNW):
        for warmup in (0, 1, 99):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cls([{"params": p[:1]}, {"params": p[1:2]}], warmup=warmup)
            (warning,) = caught
            assert f"warmup={warmup}: " in str(warning.message)
            assert "at least 100" in str(warning.message)
            assert Path(warning.filename) == Path(__file__)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = cls(p[:1], warmup=100)
            assert not caught
            optimizer.add_param_group({"params": p[1:2], "warmup": 20})
            optimizer.add_param_group({"params": p[2:3], "warmup": 20})
        (warning,) = caught
        assert "warmup=20" in str(warning.message)
        assert Path(warning.filename) == Path(__file__)


def test_the_w_is_the_same_with_decoupled_decay() -> None:
    start, gradients = weights(6, 5), some(6, 5)
    a, _ = run(start, gradients, cls=ApolloQNW, weight_decay=0.1)
    b, _ = run(start, gradients, decay="decoupled", weight_decay=0.1)
    c, _ = run(start, gradients, weight_decay=0.1)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(c, run(start, gradients, cls=ApolloQNW, weight_decay=0.1, decay="l2")[0])


# --- shards


def _shards(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2,))
    # Uneven shards, one that is empty on the second process, a vector, and a tensor that both hold.
    cases = [((5, 6), Shard(0)), ((6, 5), Shard(1)), ((1, 7), Shard(0)), ((9,), Shard(0)), ((4, 3), Replicate())]
    kinds = list(itertools.product((torch.float32, torch.bfloat16), ALL, cases))
    whole = [nn.Parameter(weights(*shape).to(dtype)) for dtype, _, (shape, _) in kinds]

    def here(tensor: torch.Tensor, placement: Any) -> Any:
        return distribute_tensor(tensor.clone(), mesh, [placement], src_data_rank=None)

    sharded = [
        nn.Parameter(here(p.detach(), placement)) for p, (_, _, (_, placement)) in zip(whole, kinds, strict=True)
    ]
    one, two = (
        make([{"params": [p], **options} for p, (_, options, _) in zip(params, kinds, strict=True)])
        for params in (whole, sharded)
    )
    for step in range(6):
        for p, q, (dtype, _, (shape, placement)) in zip(whole, sharded, kinds, strict=True):
            p.grad = some(*shape)[step].to(dtype)
            q.grad = here(p.grad, placement)
        one.step()
        two.step()
    for p, q, (dtype, options, (_, placement)) in zip(whole, sharded, kinds, strict=True):
        expected, got = here(p.detach(), placement).to_local(), q.detach().to_local()
        if dtype == torch.float32:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert (got != expected).sum() <= 1, (options, placement)  # a sum that was rounded the other way
        for name, value in one.state[p].items():
            if isinstance(value, torch.Tensor):
                found = two.state[q][name]
                if value.ndim:
                    assert found.placements == q.placements
                    found, value = found.to_local(), here(value, placement).to_local()
                torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)
    dist.destroy_process_group()


def test_sharded_tensors_take_the_steps_of_whole_ones(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_shards, (str(tmp_path),), nprocs=2)


# --- another implementation


@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "climb"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rebound", REBOUNDS)
def test_without_warmup_the_steps_are_those_of_pytorch_optimizer(rebound: str, decay: str, maximize: bool) -> None:
    # Its warm-up is one step ahead and knows one learning rate only, so there is none here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = pytest.importorskip("pytorch_optimizer")
    start, gradients = weights(31, 17), some(31, 17, num=50)
    common: dict[str, Any] = {"lr": 0.01, "weight_decay": DECAY[decay], "rebound": rebound, "maximize": maximize}
    got, _ = run(start, gradients, decay=decay, warmup=0, **common)
    p = nn.Parameter(start.clone())
    theirs = other.ApolloDQN([p], weight_decay_type=decay, warmup_steps=0, **common)
    for gradient in gradients:
        p.grad = gradient.clone()
        theirs.step()
    moved = (p.detach() - start).norm()
    assert moved > 0.1
    assert (got - p.detach()).norm() < 2e-6 * moved + 1e-6 * start.norm()
