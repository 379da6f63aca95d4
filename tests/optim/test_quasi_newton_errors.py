"""What a user of ApolloQN gets wrong."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from quasi_newton_cases import run, some, weights
from torch import nn

from insitu import ApolloQN, ApolloQNW


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
