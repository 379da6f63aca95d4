"""ApolloQN in low precision: rounding, moments, strides, pieces."""

import itertools
from typing import Any

import pytest
import torch
from quasi_newton_cases import ALL, make, run, some, weights
from torch import nn

from insitu.optim import quasi_newton
from insitu.optim.seeds import mix


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
        (turn,) = [optimizer._turn(place) for place in optimizer.places() if place.parameter is p]
        out = torch.empty(4000, dtype=torch.bfloat16)
        turn.task.moment_precision(name, turn.done).write(out, x.clone())
        draws.append(out)
    assert all((a != b).float().mean() > 0.2 for a, b in itertools.combinations(draws, 2))


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
