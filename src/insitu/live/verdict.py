"""From figures to a verdict: each figure has two limits, and the worst figure decides.

Pure and without torch, so that what is refused can be read, and tested, in one place. The verdict is monotone: a figure that
grows, or one more figure, never makes it milder.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from insitu.live.limits import GuardLimits

Level = Literal["pass", "warn", "refuse"]

# Figure -> what it says of the update, in the words of a refusal. The limits are warn_FIGURE and max_FIGURE. The figures
# themselves are measured in insitu.live.guard and insitu.live.transaction; all but repetition_rise, leak and burn_in
# are nats per token.
CHECKS: Mapping[str, str] = {
    "canary_kl": "the update changed unrelated replies by {value:.2f} nats per token",
    "worst_kl": "the update changed the reply to canary {worst_canary} by {value:.2f} nats per token",
    "canary_loss": "the old replies to unrelated prompts became less likely by {value:.2f} nats per token",
    "drift_kl": "unrelated replies have drifted by {value:.2f} nats per token since version {since}",
    "drift_loss": "unrelated replies of version {since} have become less likely by {value:.2f} nats per token",
    "entropy_change": "the mean entropy of the next token changed by {value:.2f} nats, to {entropy:.2f}",
    "repetition_rise": "unrelated replies repeat themselves more: the score rose by {value:.2f}, to {repetition:.2f}",
    "gap_rise": "server and learner came to disagree by {value:.2f} nats per token more on the same text, {gap:.2f} in all",
    "leak": "words of the lesson came into replies that it was not about: a share of {value:.2f} of the canaries",
    "burn_in": "the lesson was learned by heart: its tokens have a mean probability of {value:.3f}; stop earlier (target_loss)",
}
_WAY_OUT = {
    "drift_kl": "; roll back to an older version, or allow more",
    "drift_loss": "; roll back to an older version, or allow more",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """``pass``, ``warn`` (committed, with the reasons shown) or ``refuse`` (undone), and the figures it rests on."""

    level: Level
    reasons: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        return self.level == "refuse"

    @property
    def reason(self) -> str:
        """All reasons in one line, those for the refusal first."""
        return "; ".join(self.reasons)

    def described(self) -> dict[str, Any]:
        """As the report of a version keeps it."""
        return {**asdict(self), "reasons": list(self.reasons)}


def judge(figures: Mapping[str, Any], limits: GuardLimits) -> Verdict:
    """Hold each figure of :data:`CHECKS` that is there against its limits. Whatever is not finite is refused, also a figure
    that has no limit of its own. The sentences also need ``worst_canary``, ``since``, ``entropy``, ``repetition``, ``gap``
    beside the figures that name them."""
    refusals, warnings = [], []
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            refusals.append(f"{name} is {value}: the updated weights give no finite log-probabilities")
        elif name in CHECKS:
            warn, most = getattr(limits, f"warn_{name}"), getattr(limits, f"max_{name}")
            said = CHECKS[name].format(value=value, **figures)
            if value > most:
                refusals.append(f"{said}; the limit is {most:g}{_WAY_OUT.get(name, '')} (--teach.max-{_flag(name)})")
            elif value > warn:
                warnings.append(f"{said}; a warning is given over {warn:g}")
    level: Level = "refuse" if refusals else "warn" if warnings else "pass"
    return Verdict(level, (*refusals, *warnings), dict(figures))


def _flag(name: str) -> str:
    return name.replace("_", "-")
