"""Which source next: UCB1 on observed loss reduction (Auer, Cesa-Bianchi and Fischer 2002, "Finite-time analysis of the
multiarmed bandit problem"), played in holds of several optimizer steps.

Symbols: k a source, L_k the mean training loss over its last hold, rho the reward, n_k the rewards of source k that are known
or under way, N = sum of n_k, C the exploration.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any


def loss_reduction(previous: float, current: float) -> float:
    """The reward of a hold: rho = (L' - L) / max(L', L), in [-1, 1], where L is the mean loss over the hold's steps and L' that
    over the same source's hold before.

    A source is compared with itself only, and relatively, so it does not matter at which level its loss lies: rho(c L', c L) =
    rho(L', L). Whole holds are compared and not the ends of one: what the model relearns at the start of each hold and forgets
    after it, which is much for text of a rigid format, is in L' and in L alike and earns nothing. rho(L', L) = -rho(L, L'),
    so a source whose losses only fluctuate earns 0 on average however much they do; (L' - L) / L' would not give that.

    Raises:
        ValueError: a loss that is negative or not finite.
    """
    for loss in (previous, current):
        if not math.isfinite(loss) or loss < 0:
            raise ValueError(f"a loss of {loss} gives no reward; expected a finite number, 0 or more")
    largest = max(previous, current)
    return (previous - current) / largest if largest else 0.0


def upper_bounds(
    totals: Sequence[float], known: Sequence[int], counts: Sequence[int], exploration: float
) -> list[float]:
    """UCB1's upper confidence bound of each source: mean reward + C sqrt(ln N / n_k), infinite where n_k = 0.

    Args:
        totals: sum of the known rewards of each source.
        known: how many these are. Fewer than n_k while a reward is under way; a mean of none is 0.
        counts: n_k.
        exploration: C in the rewards' own unit.
    """
    if not any(counts):
        return [math.inf] * len(counts)
    log_N = math.log(sum(counts))
    return [
        total / max(m, 1) + exploration * math.sqrt(log_N / n) if n else math.inf
        for total, m, n in zip(totals, known, counts, strict=True)
    ]


def hold_weights(favourite: int, floors: Sequence[float], allowed: Sequence[bool]) -> list[float]:
    """The weights that a hold's source is drawn with: max(1 for the favourite, 0 for others; floor), 0 where not allowed."""
    return [
        max(float(k == favourite), floor) if free else 0.0
        for k, (floor, free) in enumerate(zip(floors, allowed, strict=True))
    ]


def draw(weights: Sequence[float], uniform: float) -> int:
    """The index in which ``uniform`` (0 <= u < 1) falls when the weights are laid end to end and scaled to 1."""
    target, reached = uniform * sum(weights), 0.0
    for index, weight in enumerate(weights):
        reached += weight
        if target < reached:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)  # rounding at the very end


def dice(seed: int, *counters: int | str) -> float:
    """A number in [0, 1) that is a pure function of its arguments, on every machine and for every library version."""
    digest = hashlib.blake2b(repr((seed, counters)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


class Bandit:
    """Chooses a source and how long to hold it.

    A hold is one play. Its source is drawn with the weights w_k = max(1 if k has the largest upper bound else 0, floor_k)
    among the sources that may be chosen, its length uniformly from ``hold``. So a source with a floor is drawn with a
    probability of at least floor_k / (1 + sum of floors), whatever its reward. The first hold of a source has nothing to be
    compared with and no reward; therefore each source is the favourite until it was held twice.

    C is in units of the root mean square of all rewards so far: relative loss reductions shrink from tenths to thousandths
    over a training, and a C in absolute units would mean no exploration at first or nothing else at the end.

    Everything random is a function of (seed, number of the hold).

    Args:
        floors: floor_k of each source, 0 to 1.
        exploration: C.
        hold: the fewest and the most steps of a hold.
        seed: of the dice.
    """

    def __init__(self, floors: Sequence[float], *, exploration: float, hold: Sequence[int], seed: int) -> None:
        self.floors, self.exploration, self.seed = list(floors), exploration, seed
        self.shortest, self.longest = hold
        self.holds = [0] * len(floors)
        self.totals = [0.0] * len(floors)
        self.known = [0] * len(floors)
        self.squares = 0.0
        self.levels: list[float | None] = [None] * len(floors)

    @property
    def counts(self) -> list[int]:
        """n_k: the holds that have, or will have, a reward."""
        return [max(holds - 1, 0) for holds in self.holds]

    @property
    def scale(self) -> float:
        """Root mean square of all known rewards, 0 while there are none."""
        return math.sqrt(self.squares / max(sum(self.known), 1))

    def favourite(self, allowed: Sequence[bool]) -> int:
        """The allowed source with the largest upper bound; of equals the one held least, then the first."""
        bounds = upper_bounds(self.totals, self.known, self.counts, self.exploration * self.scale)
        order = [(bounds[k], -self.holds[k], -k) for k in range(len(bounds)) if allowed[k]]
        return -max(order)[2]

    def choose(self, allowed: Sequence[bool]) -> tuple[int, int]:
        """The source of the next hold and its length in steps. At least one source must be allowed."""
        number = sum(self.holds)
        weights = hold_weights(self.favourite(allowed), self.floors, allowed)
        source = draw(weights, dice(self.seed, "source", number))
        hold = self.shortest + int(dice(self.seed, "hold", number) * (self.longest - self.shortest + 1))
        self.holds[source] += 1
        return source, hold

    def learn(self, source: int, loss: float) -> float | None:
        """Take in the mean loss of a hold that is over; returns its reward, None for a source's first."""
        previous, self.levels[source] = self.levels[source], loss
        if previous is None:
            return None
        reward = loss_reduction(previous, loss)
        self.credit(source, reward)
        return reward

    def credit(self, source: int, reward: float) -> None:
        """Add one reward to a source's."""
        if not math.isfinite(reward):
            raise ValueError(f"a reward of {reward} for source {source}; expected a finite number")
        self.totals[source] += reward
        self.squares += reward * reward
        self.known[source] += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; JSON keeps them exactly."""
        return {
            "holds": [*self.holds],
            "totals": [*self.totals],
            "known": [*self.known],
            "squares": self.squares,
            "levels": [*self.levels],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.holds, self.totals = [*state["holds"]], [*state["totals"]]
        self.known, self.squares = [*state["known"]], state["squares"]
        self.levels = [*state["levels"]]
