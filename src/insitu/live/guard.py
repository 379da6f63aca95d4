"""The verdict on an update: canaries that never take part in training, scored teacher-forced on the weights themselves.

At the job's start the model's own replies to the canary prompts are frozen with their full-vocabulary log-probabilities;
after every write the mean KL(start || now) per token is compared with a limit. A good job was measured at 0.1 to 0.5 nats, ten
times its rate at 3.9, a rate of 1e3 at 8.8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.data.batch import collate
from insitu.data.chat import Example
from insitu.data.loss import kl_to_reference, reference_logprobs

MAX_GAP_AT_START = 0.3  # nats per token by which they may differ when a learner attaches
MAX_GAP = 0.1  # nats per token by which server and learner may come to disagree more in the course of a job


@dataclass(frozen=True, slots=True)
class Verdict:
    """``ok`` or the reason why not, with the figure it rests on."""

    ok: bool
    kl: float
    reason: str | None = None


class Guard:
    """Judges every write of one job against the model at the job's start."""

    def __init__(self, model: Any, canaries: Sequence[Example], pad_token_id: int, max_kl: float) -> None:
        self._model = model
        # Two halves that take turns: serving stands still while an update is judged.
        halves = [canaries[0::2], canaries[1::2]] if len(canaries) > 1 else [canaries]
        self._batches = [collate(half, pad_token_id, device=model.device) for half in halves]
        self._references = [reference_logprobs(model, batch) for batch in self._batches]
        self._max_kl = max_kl
        self._turn = 0

    @torch.no_grad()
    def judge(self, *, whole: bool = False) -> Verdict:
        """Run inside the pause, on the weights just written: one half of the canaries, the other next time; or ``whole``."""
        chosen = range(len(self._batches)) if whole else [self._turn % len(self._batches)]
        self._turn += 1
        kls = [float(kl_to_reference(self._model, self._batches[i], self._references[i])) for i in chosen]
        kl = sum(kls) / len(kls)
        if not math.isfinite(kl):
            return Verdict(False, kl, "the updated weights give no finite log-probabilities")
        if kl > self._max_kl:
            return Verdict(
                False,
                kl,
                f"the update changed unrelated replies by {kl:.2f} nats per token; the limit is {self._max_kl}",
            )
        return Verdict(True, kl)


def gap(served: Sequence[float], computed: Sequence[float]) -> float:
    """Mean difference, whatever its sign, between the server's log-probabilities and the learner's for the same tokens; inf if
    one is NaN. Other kernels in bf16 make 0.08 nats of the same weights, the same kernels none."""
    differences = [abs(a - b) for a, b in zip(served, computed, strict=True)]
    mean = sum(differences) / len(differences)
    return mean if math.isfinite(mean) else math.inf
