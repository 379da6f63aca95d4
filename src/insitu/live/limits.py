"""How much an update may change what it was not asked to change. Light: the command line reads this without loading torch."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardLimits:
    """Two limits for each figure of :mod:`insitu.live.verdict`: over ``warn_*`` the version is committed with a warning, over
    ``max_*`` it is refused and undone. A warn limit that is not below its max never warns.

    Where the defaults come from (SmolLM2-135M, docs/guide/trust.md): a lesson at the default settings ends at a canary KL of
    0.04 to 0.22 and passes 0.19 on the way (APOLLO-Mini: 0.19 and 1.5); with ten times the learning rate, 7 of 12 unrelated
    answers still right, at 0.38 and 1.26; without anchors, where a format or manner leaks into nearly every reply, at 0.45 to
    0.85; without anchors and with ten times the rate at 3.9; with a rate of 1e3 at 8.8.
    """

    # The mean over all canaries. The gate has the max_ limit only: what a job passes on its way comes back.
    warn_canary_kl: float = 0.25
    max_canary_kl: float = 1.5
    # The worst canary alone: one of nine can be ruined and move the mean by a ninth. Good lessons: 0.07 to 0.79.
    warn_worst_kl: float = 1.0
    max_worst_kl: float = 4.0
    # How much less likely the old replies are. Good lessons: -0.03 to 0.16; leaking ones: 0.19 to 0.51.
    warn_canary_loss: float = 0.3
    max_canary_loss: float = 1.5
    # Against the frozen origin. Good lessons add up slowly; at 0.75 the replies are as far off as after one that leaks
    # everywhere, and near 3.9 there is no model left.
    warn_drift_kl: float = 0.75
    max_drift_kl: float = 3.0
    warn_drift_loss: float = 0.75
    max_drift_loss: float = 3.0
    # Nats of mean next-token entropy, up or down. It is 2.2 on the canaries that ship; good lessons change it by 0.00 to 0.29.
    warn_entropy_change: float = 0.4
    max_entropy_change: float = 1.5
    # Of the mean score in [0, 1]: two of eight canaries that begin to loop warn, half of them refuse.
    warn_repetition_rise: float = 0.2
    max_repetition_rise: float = 0.45
    # Two engines differ on the same bf16 weights because their kernels add in another order; vLLM's gap moved by 0.002.
    warn_gap_rise: float = 0.05
    max_gap_rise: float = 0.1
    # The share of canaries whose replies took over three tokens of the lesson. Of the twenty lessons in
    # benchmarks/guard_jobs.json it was 0 or 1 of 8 for nineteen, and 4 for the one that left 8 of 12 unrelated answers right.
    # It warns only: a manner may be meant for every reply.
    warn_leak: float = 0.2
    max_leak: float = 1.0

    # The geometric mean probability of the lesson's own tokens, exp(-loss): 0.99 is a loss of 0.01, a fifth of where a job
    # stops by default. It warns only: with anchors even 0.0035 left unrelated replies as they were (60 steps), but a reply
    # learned by heart comes back where it was not asked for.
    warn_burn_in: float = 0.99
    max_burn_in: float = 1.0

    def __post_init__(self) -> None:
        check_limits(self)


def check_limits(limits: GuardLimits) -> None:
    """ValueError naming the first limit that is no finite number of 0 or more."""
    for field in fields(GuardLimits):
        value = getattr(limits, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{field.name}={value!r}; expected a finite number, 0 or more")
