"""Which source each sequence of an optimizer step comes from: by the bandit, a whole step at a time, or by fixed weights.

Both are told how many sequences each source has left (None: no limit) and answer with one source for each sequence of the step.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

from insitu.data.bandit import Bandit
from insitu.data.messages import DataError

_log = logging.getLogger(__name__)

# The choice for step t uses the losses of steps up to t - DELAY. The last batch of step t - 1 is not trained on when a
# DataLoader draws the first of step t, so a shorter delay would make the choice depend on how far ahead is drawn.
DELAY = 2
_REMEMBERED = 16  # losses; a checkpoint needs those of the last DELAY steps before it


class BanditChoice:
    """Holds one source after the other, as :class:`Bandit` chooses, and gives it the mean loss of each hold once it is known.

    Attributes:
        choices: (first step, source, length in steps) of every hold.
        rewards: (last step, source, reward) of every hold but each source's first.
    """

    def __init__(self, bandit: Bandit, warmup: Sequence[bool], warmup_steps: int, names: Sequence[str]) -> None:
        self.bandit, self.warmup, self.warmup_steps, self.names = bandit, list(warmup), warmup_steps, list(names)
        self.choices: list[tuple[int, int, int]] = []
        self.rewards: list[tuple[int, int, float]] = []
        self._taken = 0  # the last step whose loss was taken in
        self._sum = 0.0  # of the losses taken in of the hold that is not over
        self._unrewarded = 0  # index in choices of that hold
        self._losses: dict[int, float] = {}

    def observe(self, step: int, loss: float) -> None:
        """Take note of the mean training loss of a step; every step's, in order, the same number on all ranks."""
        if not math.isfinite(loss) or loss < 0:
            raise ValueError(
                f"the training loss of step {step} is {loss}, from which the bandit cannot learn; expected a finite number, "
                "0 or more: lower the learning rate, or clip gradients"
            )
        self._losses[step] = loss
        self._losses.pop(step - _REMEMBERED, None)

    def sources(self, step: int, count: int, left: Sequence[int | None]) -> list[int]:
        """The source of each of the ``count`` sequences of ``step``: the same for all."""
        self._take_in(step - DELAY)
        first, source, hold = self.choices[-1] if self.choices else (0, 0, 1)
        if step >= first + hold:
            allowed = [rest is None or rest >= count for rest in left]
            if step <= self.warmup_steps:
                allowed = [free and warm for free, warm in zip(allowed, self.warmup, strict=True)]
            _check_any(allowed, step)
            source, hold = self.bandit.choose(allowed)
            rest = left[source]
            hold = hold if rest is None else min(hold, rest // count)
            self.choices.append((step, source, hold))
            _log.info("step %d: %s for %d steps", step, self.names[source], hold)
        return [source] * count

    def _take_in(self, until: int) -> None:
        for step in range(self._taken + 1, until + 1):
            if step not in self._losses:
                raise RuntimeError(
                    f"step {until + DELAY} is drawn, but the loss of step {step} was not observed; call observe(step, loss) "
                    "after every optimizer step, and let the DataLoader draw at most one step ahead"
                )
            first, source, hold = self.choices[self._unrewarded]
            self._sum += self._losses[step]
            self._taken = step
            if step == first + hold - 1:
                reward = self.bandit.learn(source, self._sum / hold)
                if reward is not None:
                    self.rewards.append((step, source, reward))
                    _log.info("step %d: %s earned %.4f", step, self.names[source], reward)
                self._sum, self._unrewarded = 0.0, self._unrewarded + 1

    def snapshot(self) -> dict[str, Any]:
        """The state but the logs, of which it has the lengths: they only grow, and copying them at each step would not end."""
        return {
            "bandit": self.bandit.state_dict(),
            "taken": self._taken,
            "sum": self._sum,
            "unrewarded": self._unrewarded,
            "choices": len(self.choices),
            "rewards": len(self.rewards),
        }

    def completed(self, snapshot: dict[str, Any], step: int) -> dict[str, Any]:
        """A snapshot made before the draws of ``step + 1``, as it must be kept after ``step``: with the logs, and the losses
        that the next choices will take in."""
        missing = [s for s in range(snapshot["taken"] + 1, step + 1) if s not in self._losses]
        if missing:
            raise RuntimeError(f"the loss of step {missing[0]} was not observed; observe it before the state is taken")
        return {
            **snapshot,
            "choices": [list(entry) for entry in self.choices[: snapshot["choices"]]],
            "rewards": [list(entry) for entry in self.rewards[: snapshot["rewards"]]],
            "losses": [[s, self._losses[s]] for s in range(snapshot["taken"] + 1, step + 1)],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.bandit.load_state_dict(state["bandit"])
        self._taken, self._sum, self._unrewarded = state["taken"], state["sum"], state["unrewarded"]
        self.choices = [(first, source, hold) for first, source, hold in state["choices"]]
        self.rewards = [(last, source, reward) for last, source, reward in state["rewards"]]
        self._losses = dict(state["losses"])


class WeightedChoice:
    """Sequences in proportion to the weights, as evenly as whole sequences allow, without chance: each draw gives every allowed
    source credit for its share, and takes the one with most. No source is ever more than one sequence off its share."""

    def __init__(self, weights: Sequence[float], warmup: Sequence[bool], warmup_steps: int) -> None:
        self.weights, self.warmup, self.warmup_steps = list(weights), list(warmup), warmup_steps
        self.credit = [0.0] * len(weights)
        self.choices: list[tuple[int, int, int]] = []
        self.rewards: list[tuple[int, int, float]] = []

    def observe(self, step: int, loss: float) -> None:
        """Fixed weights learn nothing."""

    def sources(self, step: int, count: int, left: Sequence[int | None]) -> list[int]:
        drawn = [0] * len(left)
        return [self._next(step, left, drawn) for _ in range(count)]

    def _next(self, step: int, left: Sequence[int | None], drawn: list[int]) -> int:
        allowed = [
            weight > 0 and (rest is None or rest > taken) and (step > self.warmup_steps or warm)
            for weight, rest, taken, warm in zip(self.weights, left, drawn, self.warmup, strict=True)
        ]
        _check_any(allowed, step)
        total = sum(weight for weight, free in zip(self.weights, allowed, strict=True) if free)
        for k, free in enumerate(allowed):
            if free:
                self.credit[k] += self.weights[k] / total
        source = max((k for k, free in enumerate(allowed) if free), key=lambda k: (self.credit[k], -k))
        self.credit[source] -= 1
        drawn[source] += 1
        return source

    def snapshot(self) -> dict[str, Any]:
        return {"credit": [*self.credit]}

    def completed(self, snapshot: dict[str, Any], step: int) -> dict[str, Any]:
        return snapshot

    def load(self, state: dict[str, Any]) -> None:
        self.credit = [*state["credit"]]


def _check_any(allowed: Sequence[bool], step: int) -> None:
    if not any(allowed):
        raise DataError(
            f"no source is left for step {step}: each has reached its max_epochs; train fewer steps, raise max_epochs, or "
            "add text"
        )
