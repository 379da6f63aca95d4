"""Schedules: the printed formulas, each group's own rate, and a resume that goes on."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from insitu import APOLLO
from insitu.optim.schedule import warmup_cosine, warmup_inverse_sqrt, warmup_linear, warmup_milestone

W, T = 5, 20
FORMULAS: dict[str, tuple[Callable[..., LambdaLR], tuple[Any, ...], Callable[[int], float]]] = {
    "cosine": (
        warmup_cosine,
        (W, T),
        lambda t: 0.1 if t > T else 0.1 + 0.9 * (1 + math.cos(math.pi * (t - W) / (T - W))) / 2,
    ),
    "linear": (warmup_linear, (W, T), lambda t: max(0.0, (T - t) / (T - W))),
    "linear to a floor": (warmup_linear, (W, T, 0.25), lambda t: 0.25 + 0.75 * max(0.0, (T - t) / (T - W))),
    "inverse sqrt": (warmup_inverse_sqrt, (W,), lambda t: math.sqrt(W / t)),
    "milestone": (warmup_milestone, (W, [8, 15], 0.5), lambda t: 1.0 if t <= 8 else 0.5 if t <= 15 else 0.25),
}


def optimizer() -> torch.optim.Optimizer:
    a, b = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    return APOLLO([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.5}])


def rates(opt: torch.optim.Optimizer, scheduler: LambdaLR, num: int) -> list[tuple[float, ...]]:
    found = []
    for _ in range(num):
        found.append(tuple(group["lr"] for group in opt.param_groups))
        opt.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", FORMULAS)
def test_the_printed_formula_holds_at_every_update(name: str) -> None:
    make, arguments, after = FORMULAS[name]
    opt = optimizer()
    for t, (a, b) in enumerate(rates(opt, make(opt, *arguments), T + 5), 1):
        expected = t / W if t <= W else after(t)
        assert a == pytest.approx(expected, abs=1e-12), t
        assert b == pytest.approx(expected / 2, abs=1e-12), t


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("stop", [2, 5, 11])
def test_a_resume_goes_on_with_what_was_saved(name: str, stop: int) -> None:
    make, arguments, _ = FORMULAS[name]
    opt = optimizer()
    whole = rates(opt, make(opt, *arguments), T)
    first = optimizer()
    scheduler = make(first, *arguments)
    rates(first, scheduler, stop)
    file = io.BytesIO()
    torch.save([first.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    state, schedule = torch.load(file, weights_only=True)
    second = optimizer()
    resumed = make(second, *arguments)
    second.load_state_dict(state)
    resumed.load_state_dict(schedule)
    assert rates(second, resumed, T - stop) == whole[stop:]


def test_without_warmup_the_first_update_is_at_the_full_rate() -> None:
    for make, arguments in ((warmup_cosine, (0, T)), (warmup_linear, (0, T)), (warmup_milestone, (0, [3]))):
        opt = optimizer()
        first, *_ = rates(opt, make(opt, *arguments), 1)
        assert first[0] == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("make", "arguments", "told"),
    [
        (warmup_cosine, (-1, 10), "warmup=-1"),
        (warmup_cosine, (1.5, 10), "warmup=1.5"),
        (warmup_cosine, (10, 10), "total=10"),
        (warmup_cosine, (1, 10, 1.5), "floor=1.5"),
        (warmup_linear, (1, 10, float("nan")), "floor=nan"),
        (warmup_inverse_sqrt, (0,), "warmup=0"),
        (warmup_milestone, (5, [3]), r"milestones=\[3\]"),
        (warmup_milestone, (0, [7, 7]), r"milestones=\[7, 7\]"),
        (warmup_milestone, (0, [7], 0.0), "gamma=0.0"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(make: Callable[..., LambdaLR], arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(optimizer(), *arguments)
