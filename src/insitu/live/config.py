"""What a server and its learner can be told. Light: the command line reads this without loading torch."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from insitu.live.limits import GuardLimits, check_limits

# What `insitu serve` tells the vLLM it starts, and what a vLLM that was started otherwise may be told.
MAX_QUEUE = "INSITU_MAX_QUEUE"
FEEDBACK_PER_MINUTE = "INSITU_FEEDBACK_PER_MINUTE"
DEFAULT_MAX_QUEUE = 10_000
DEFAULT_FEEDBACK_PER_MINUTE = 3_000


def default_state_dir() -> Path:
    """``$INSITU_STATE``, else ``$XDG_STATE_HOME/insitu``, else ``~/.local/state/insitu``."""
    if own := os.environ.get("INSITU_STATE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_STATE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".local" / "state") / "insitu"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachConfig(GuardLimits):
    """How the learner teaches, and the limits of the guard. The defaults come from experiments/first_minute.

    Args:
        optimizer: APOLLO (channel-wise scaling) or APOLLO-Mini (rank 1, tensor-wise).
        learning_rate: AdamW's learning rate: alpha="auto" makes the update as large as AdamW's.
        warmup_steps: Steps of linear warmup, each job anew.
        max_steps: Most optimizer steps of one job.
        target_loss: Stop when the examples' loss, in nats per token, is at most this.
        anchor_weight: Weight of the KL term that holds replies to built-in prompts where they were at the job's start.
        anchors_per_step: Anchors in each step; successive steps take successive ones, so that a long run sees all of them.
        rank: Rank of the projection, capped for each tensor by rank_share.
        rank_share: A tensor whose projected side is m has rank min(rank, m // rank_share).
        limiter: Norm-growth limiter of the paper (1.01); none by default: a job is too short for it to help.
        replay: Earlier applied examples that take part as anchors, so that old lessons are kept.
        max_lesson_repetition: Refuse an example of 32 or more target tokens that repeat themselves by a higher score, 0 to 1.
        warn_canary_kl: Commit with a warning if unrelated replies (canaries) changed by more nats per token in the job.
        max_canary_kl: Undo and refuse the job if they changed by more; also the gate after every single step.
        warn_worst_kl: The same for the canary that changed most.
        max_worst_kl: The same for the canary that changed most.
        warn_canary_loss: Warn if the old replies became less likely by more nats per token.
        max_canary_loss: Refuse if they became less likely by more.
        warn_drift_kl: Warn if unrelated replies are further than this from version 0 (or when a canary was added).
        max_drift_kl: Refuse if they are further than this.
        warn_drift_loss: Warn if the replies of version 0 became less likely by more nats per token.
        max_drift_loss: Refuse if they became less likely by more.
        warn_entropy_change: Warn if the mean entropy of the next token went up or down by more nats.
        max_entropy_change: Refuse if it went up or down by more.
        warn_repetition_rise: Warn if the score, 0 to 1, of how much replies repeat themselves rose by more.
        max_repetition_rise: Refuse if it rose by more.
        warn_gap_rise: Warn if server and learner came to disagree by more nats per token than before the job.
        max_gap_rise: Refuse if they came to disagree by more.
        warn_leak: Warn if words of the lesson came into a larger share, 0 to 1, of the replies to canaries.
        max_leak: Refuse if they came into a larger share; 1 never refuses.
        warn_burn_in: Warn if the lesson's own tokens reach a higher mean probability, exp(-loss): it is burnt in.
        max_burn_in: Refuse if they reach a higher one; 1 never refuses.
        seed: Of the projections and of stochastic rounding.
        keep_versions: So many of the last versions can be served again; older ones are pruned, except pinned ones, when
            that saves room.
        disk_limit_gb: Refuse to learn when the versions would take more; by default all that is free but a reserve.
    """

    optimizer: Literal["apollo", "apollo-mini"] = "apollo"
    learning_rate: float = 5e-5
    warmup_steps: int = 2
    max_steps: int = 24
    target_loss: float = 0.05
    anchor_weight: float = 2.0
    anchors_per_step: int = 6
    rank: int = 256
    rank_share: int = 8
    limiter: float | None = None
    replay: int = 0
    max_lesson_repetition: float = 0.8
    seed: int = 0
    keep_versions: int = 50
    disk_limit_gb: float | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in ("apollo", "apollo-mini"):
            raise ValueError(f"optimizer={self.optimizer!r}; expected 'apollo' or 'apollo-mini'")
        check_limits(self)
        for name in ("learning_rate", "target_loss", "anchor_weight", "max_lesson_repetition"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r}; expected a finite number, 0 or more")
        least = {
            "max_steps": 1,
            "anchors_per_step": 1,
            "rank": 1,
            "rank_share": 1,
            "warmup_steps": 0,
            "seed": 0,
            "keep_versions": 1,
            "replay": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r}; expected an integer, {low} or more")
        if (gb := self.disk_limit_gb) is not None and not (isinstance(gb, int | float) and 0 < gb < math.inf):
            raise ValueError(f"disk_limit_gb={gb!r}; expected a positive number of gigabytes, or None")
        if self.limiter is not None and not (isinstance(self.limiter, int | float) and 1 <= self.limiter < math.inf):
            raise ValueError(f"limiter={self.limiter!r}; expected a number of at least 1, such as 1.01, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What ``insitu serve`` was asked for.

    Args:
        engine: embedded (Transformers, in this process) or vllm, for real load; vLLM must be installed beside insitu.
        attach: Start no server: only a learner, for the server whose control socket this is (STATE/run/engine.sock).
        vllm_args: More options of `vllm serve`, in one string.
        state_dir: Where versions, feedback and keys are kept; ~/.local/state/insitu unless $INSITU_STATE says otherwise.
        host: Address to listen on; anything but loopback lets others reach the server.
        allowed_hosts: Host names, beside the loopback ones, under which clients may reach the server.
        port: Port to listen on; 0 takes a free one.
        yes: Agree to the download of ``smollm2``.
        dtype: Type of the weights, served and trained.
        max_requests: Embedded engine: requests computed at once; more wait their turn.
        cache_tokens: Embedded engine: room for keys and values, in tokens, all requests together.
        threads: Cores for serving; 0 is half of them. The rest learn.
        max_queue: Feedback items that may wait, queued or held; further ones get 429.
        feedback_per_minute: Posts of feedback taken in a minute, on average and at once; further ones get 429.
        teach: How the learner teaches.
    """

    engine: Literal["embedded", "vllm"] = "embedded"
    attach: Path | None = None
    vllm_args: str = ""
    state_dir: Path = field(default_factory=default_state_dir)
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    port: int = 8000
    yes: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_requests: int = 8
    cache_tokens: int = 16384
    threads: int = 0
    max_queue: int = DEFAULT_MAX_QUEUE
    feedback_per_minute: int = DEFAULT_FEEDBACK_PER_MINUTE
    teach: TeachConfig = field(default_factory=TeachConfig)

    def __post_init__(self) -> None:
        for name in ("max_queue", "feedback_per_minute"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; expected an integer, 1 or more")
