"""What an update did to replies it was not asked to change, in figures: canaries scored teacher-forced on the weights.

Two references for the same frozen continuations: what the model said of them at the job's start, and what it said when they
were frozen (version 0, as a rule), so that the drift over many small updates is seen although each of them is small. With p
the reference and q the weights now, over the N tokens of all continuations:

    canary_kl, drift_kl      mean KL(p || q), p at the job's start and at the origin
    canary_loss, drift_loss  mean -log q of the continuation's tokens, less the same under p
    entropy                  mean entropy of q

The limits, and what becomes of a figure over one, are in insitu.live.limits and insitu.live.verdict.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from insitu.data.batch import collate
from insitu.data.loss import target_distributions
from insitu.live.canaries import Frozen, half
from insitu.live.limits import GuardLimits
from insitu.live.verdict import Verdict, judge

MAX_GAP_AT_START = 0.3  # nats per token by which they may differ when a learner attaches
_PART = 8  # canaries scored at once, at most: serving stands still for one part


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of the canaries as a batch of N tokens in all, ``lengths`` of each; ``start`` and ``origin`` are float16 [N, V]."""

    canaries: Sequence[Frozen]
    batch: dict[str, Tensor]
    lengths: list[int]
    start: Tensor
    origin: Tensor
    start_entropy: Tensor


class Guard:
    """Measures every write of one job against the model at the job's start: make it before the first write."""

    def __init__(self, model: Any, canaries: Sequence[Frozen], pad_token_id: int, limits: GuardLimits) -> None:
        self._model = model
        self._limits = limits
        # At least two parts that take turns: serving stands still while a write is judged.
        count = min(len(canaries), max(2, math.ceil(len(canaries) / _PART)))
        self._parts = [self._part(canaries[i::count], pad_token_id) for i in range(count)]
        self._turn = 0

    def gate(self) -> Verdict:
        """Run inside the pause, on the weights just written: one part of the canaries, the next one next time."""
        part = self._parts[self._turn % len(self._parts)]
        self._turn += 1
        now, _ = target_distributions(self._model, part.batch)
        verdict = judge({"canary_kl": float(_kl(part.start, now).mean())}, self._limits)
        # A warning would be of a weight on its way; the audit warns of where it came to rest.
        return verdict if verdict.refused else Verdict("pass", figures=verdict.figures)

    def figures(self) -> dict[str, Any]:
        """Over all canaries. ``since`` names the versions at which they were frozen, ``canaries`` has a row for each."""
        sums: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        for part in self._parts:
            found = self._measure(part)
            for name, values in found.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + values.double().sum().cpu()
            kls, drifts = (torch.split(found[name], part.lengths) for name in ("canary_kl", "drift_kl"))
            rows += [
                {"name": c.name, "since": c.version, "kl": float(kl.mean()), "drift_kl": float(drift.mean())}
                for c, kl, drift in zip(part.canaries, kls, drifts, strict=True)
            ]
        tokens = sum(sum(part.lengths) for part in self._parts)
        means = {name: float(total) / tokens for name, total in sums.items()}
        worst = max(rows, key=lambda row: math.inf if math.isnan(row["kl"]) else row["kl"])
        return {
            **means,
            "entropy_change": abs(means["entropy"] - means["entropy_before"]),
            "worst_kl": worst["kl"],
            "worst_canary": worst["name"],
            "since": ", ".join(str(version) for version in sorted({row["since"] for row in rows})),
            "canaries": sorted(rows, key=lambda row: _order(row["name"])),
        }

    def _part(self, canaries: Sequence[Frozen], pad_token_id: int) -> _Part:
        batch = collate([c.example for c in canaries], pad_token_id, device=self._model.device)
        start, _ = target_distributions(self._model, batch)
        origin = torch.cat([c.logprobs for c in canaries]).to(start.device)
        if origin.shape != start.shape:
            raise ValueError(f"frozen canaries have shape {list(origin.shape)}, the model gives {list(start.shape)}")
        lengths = [sum(c.example.loss_mask) for c in canaries]
        return _Part(canaries, batch, lengths, half(start), origin, _entropy(start))

    def _measure(self, part: _Part) -> dict[str, Tensor]:
        """Each figure for each token, [N]."""
        now, targets = target_distributions(self._model, part.batch)

        def loss(logprobs: Tensor) -> Tensor:
            return -logprobs.gather(-1, targets[:, None])[:, 0].float()

        return {
            "canary_kl": _kl(part.start, now),
            "canary_loss": loss(now) - loss(part.start),
            "drift_kl": _kl(part.origin, now),
            "drift_loss": loss(now) - loss(part.origin),
            "entropy": _entropy(now),
            "entropy_before": part.start_entropy,
        }


def _kl(reference: Tensor, logprobs: Tensor) -> Tensor:
    """KL(reference || now) of each token, in nats, [N]. Rounded to float16 log-probabilities no longer sum to one;
    renormalised, the divergence is never negative but for rounding."""
    exact = F.log_softmax(reference.float(), dim=-1)
    return F.kl_div(logprobs, exact, reduction="none", log_target=True).sum(dim=-1)


def _entropy(logprobs: Tensor) -> Tensor:
    """Nats, [N]."""
    return -(logprobs.exp() * logprobs.clamp(min=-1e30)).sum(dim=-1)  # 0 * -inf would be NaN


def _order(name: str) -> tuple[str, int]:
    kind, _, number = name.rpartition("-")
    return kind, int(number) if number.isdigit() else 0


def gap(served: Sequence[float], computed: Sequence[float]) -> float:
    """Mean difference, whatever its sign, between the server's log-probabilities and the learner's for the same tokens; inf if
    one is NaN. Other kernels in bf16 make 0.08 nats of the same weights, the same kernels none."""
    differences = [abs(a - b) for a, b in zip(served, computed, strict=True)]
    mean = sum(differences) / len(differences)
    return mean if math.isfinite(mean) else math.inf
