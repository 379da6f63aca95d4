"""Learner, server or both die anywhere in an update: nobody is answered from weights that are not what the label says.

The harness itself is tested by breaking promises: with one of them broken it must find something wrong.
"""

import random
from pathlib import Path

import fault_plans
import pytest
import torch
from fault_trials import Trials, summary
from tiny import make_tiny

TRIALS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


@pytest.mark.timeout(600)
def test_every_reply_is_what_the_version_it_names_says_whoever_dies_and_wherever(model: Path, tmp_path: Path) -> None:
    trials = Trials(tmp_path, model, seed=1)
    try:
        rows = [trials.trial(number) for number in range(TRIALS)]
        assert trials.check_all() == []
    finally:
        trials.close()
    found = summary(rows)
    print(found)  # noqa: T201 - for whoever runs it with -s
    assert found["wrong"] == []
    assert found["kills"]["fired"] >= 0.9 * found["kills"]["planned"]
    assert found["replies"] >= 4 * TRIALS
    assert found["spanning"] >= TRIALS / 4  # replies that an update met on the way
    assert found["ties"] == 0


@pytest.mark.parametrize(
    ("mutant", "told"),
    [
        ("no-write-mark", "served"),  # a reply of torn weights that calls itself version 0
        ("no-repair", "the weights in memory are not version 0"),
        ("stale-cache", "says"),  # keys and values of the old weights under the new label
    ],
)
def test_a_broken_promise_is_found_out(model: Path, tmp_path: Path, mutant: str, told: str) -> None:
    torn = fault_plans.Kill("learner", "write", random.Random(mutant).randint(4, 12), ("learner",))
    plan = fault_plans.Plan(mutant, "teach", () if mutant == "stale-cache" else (torn,))
    trials = Trials(tmp_path, model, mutant=mutant, patience=8)
    try:
        wrong: list[str] = []
        for number in range(3):  # a torn reply is a matter of luck; the first that is found is enough
            wrong += trials.trial(number, plan)["wrong"]
            if any(told in problem for problem in wrong):
                return
    finally:
        trials.close()
    pytest.fail(f"{mutant} was not found out: {wrong}")


def test_the_same_seed_gives_the_same_plan() -> None:
    drawn = [fault_plans.draw(3, number, 20) for number in range(80)]
    assert drawn == [fault_plans.draw(3, number, 20) for number in range(80)]
    assert drawn != [fault_plans.draw(4, number, 20) for number in range(80)]
    assert {plan.name for plan in drawn} == set(fault_plans.names())
