"""A teaching run: a few optimizer steps on a few examples, held by anchors, with the lesson learned and not burnt in.

Every step has two halves, so that serving stops only for the second: :meth:`TeachingRun.prepare` runs forward and backward
and only reads the weights; :meth:`TeachingRun.write` changes them in place. The loss of a step is

    L = mean NLL of the examples' targets + anchor_weight * mean KL(model at the job's start || model) on the anchors
                                          + anchor_weight * the same on the replayed examples, if there are any

and the run is done when the first term is below ``target_loss`` (:class:`insitu.live.config.TeachConfig`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from insitu.data.batch import collate
from insitu.data.chat import Example
from insitu.data.loss import example_loss, kl_to_reference, reference_logprobs
from insitu.live.config import TeachConfig
from insitu.optim import APOLLO, APOLLOMini, param_groups
from insitu.optim.projection import matrix_shape

_MICRO_BATCH = 8  # examples in one forward, at most
_MICRO_BATCH_TOKENS = 4096  # and tokens, padding counted, unless a single example is longer


@dataclass(frozen=True, slots=True)
class Prepared:
    """What forward and backward found. ``loss`` in nats per target token, the KL terms likewise, ``grad_norm`` over all."""

    loss: float
    anchor_kl: float
    grad_norm: float
    replay_kl: float = 0.0

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.anchor_kl, self.grad_norm, self.replay_kl)))


class TeachingRun:
    """The steps of one job. Every trainable parameter of ``model`` is trained; ``close`` gives the memory back."""

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        anchors: Sequence[Example],
        config: TeachConfig,
        pad_token_id: int,
        replays: Sequence[Example] = (),
    ) -> None:
        self.model = model
        self.config = config
        self._targets = sum(sum(e.loss_mask) for e in examples)
        self._batches = [
            (
                collate(part, pad_token_id, device=model.device),
                part[0].freeze_context,
                sum(sum(e.loss_mask) for e in part),
            )
            for group in (False, True)
            for part in _split([e for e in examples if e.freeze_context is group])
        ]
        # Before the first step: what the model said then is what it is held to.
        self._anchors = self._held(_chunks(anchors, config.anchors_per_step), pad_token_id)
        self._replays = self._held(_split(replays), pad_token_id)
        self._optimizer = make_optimizer(model, config)
        self._step = 0
        self._second_half: Callable[[], None] = _nothing

    def prepare(self) -> Prepared:
        """Forward and backward on the weights as they are, and the optimizer's moments. Reads the weights only."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for batch, freeze_context, targets in self._batches:
            share = targets / self._targets
            part = example_loss(self.model, batch, freeze_context) * share
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        anchor_kl, replay_kl = self._hold(self._anchors), self._hold(self._replays)
        self._step += 1
        share = min(1.0, self._step / (self.config.warmup_steps + 1))
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * share
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        prepared = Prepared(loss, anchor_kl, float(torch.nn.utils.get_total_norm(gradients)), replay_kl)
        self._second_half = self._optimizer.prepare() if prepared.finite else _nothing
        return prepared

    def _held(self, parts: Iterable[Sequence[Example]], pad_token_id: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Each part as a batch, and what the model says of its targets now."""
        if not self.config.anchor_weight:
            return []
        batches = [collate(part, pad_token_id, device=self.model.device) for part in parts]
        return [(batch, reference_logprobs(self.model, batch)) for batch in batches]

    def _hold(self, held: Sequence[tuple[dict[str, Tensor], Tensor]]) -> float:
        """Add the gradient that draws the model back to what it said of one of the parts, in turns; the KL before that."""
        if not held:
            return 0.0
        batch, reference = held[self._step % len(held)]
        divergence = kl_to_reference(self.model, batch, reference)
        (self.config.anchor_weight * divergence).backward()  # type: ignore[no-untyped-call]
        return divergence.item()

    def write(self) -> None:
        """Change the weights in place, as :meth:`prepare` has worked it out."""
        self._second_half()
        self._second_half = _nothing
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state held now."""
        return sum(
            value.numel() * value.element_size()
            for state in self._optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()


def _nothing() -> None:
    """What there is to write before anything was prepared."""


def make_optimizer(model: Any, config: TeachConfig) -> APOLLO:
    """The configured optimizer over every trainable tensor, embeddings and head projected too (``dense="apollo"``)."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "dense": "apollo",
        "limiter": config.limiter,
        "seed": config.seed,
        "backend": "auto" if on_cpu else "reference",  # nothing is compiled while requests wait
    }
    if config.optimizer == "apollo-mini":
        return APOLLOMini(param_groups(model), **options)
    return APOLLO(list(_capped(param_groups(model), config)), **options)


def _capped(groups: Sequence[dict[str, Any]], config: TeachConfig) -> Iterator[dict[str, Any]]:
    """Split the projected groups by their projected side m, each with rank min(rank, m // rank_share)."""
    for group in groups:
        if group["role"] == "adamw":
            yield group
            continue
        by_side: dict[int, list[int]] = {}
        for i, parameter in enumerate(group["params"]):
            _, *sides = matrix_shape(parameter.shape, conv=bool(group.get("conv")))
            by_side.setdefault(min(sides), []).append(i)
        for side, members in by_side.items():
            yield {
                **group,
                "params": [group["params"][i] for i in members],
                "param_names": [group["param_names"][i] for i in members],
                "rank": max(1, min(config.rank, side // config.rank_share)),
            }


def _split(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Micro-batches of examples of similar length, so that little is padding, and none larger than memory is sure to hold."""
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    start = 0
    for stop in range(1, len(ordered) + 1):
        longest = len(ordered[min(stop, len(ordered) - 1)].input_ids)
        full = stop - start == _MICRO_BATCH or (stop - start + 1) * longest > _MICRO_BATCH_TOKENS
        if full or stop == len(ordered):
            yield ordered[start:stop]
            start = stop


def _chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    return (examples[start : start + size] for start in range(0, len(examples), size))
