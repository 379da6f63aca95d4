"""ApolloQN beside another implementation as a black box, where somebody has installed it."""

import warnings
from typing import Any

import pytest
from quasi_newton_cases import DECAY, DECAYS, REBOUNDS, run, some, weights
from torch import nn


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
