"""ApolloQN's warm-up, and gradients that change nothing."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from quasi_newton_cases import ALL, assert_agree, make, run, run_oracle, some, weights
from torch import nn

from insitu import ApolloQN

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
