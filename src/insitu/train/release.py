"""Gradient release under Trainer: attached when the model is wrapped and before the first backward."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from insitu.optim import GradientRelease


class Release(TrainerCallback):  # type: ignore[misc]
    """Updates in backward for the trainer's optimizer; only the last backward of a step's accumulation updates."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._release: GradientRelease | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        ddp = trainer.model_wrapped if isinstance(trainer.model_wrapped, DistributedDataParallel) else None
        self._release = GradientRelease(
            trainer.optimizer.optimizer, last=lambda: bool(trainer.accelerator.sync_gradients), ddp=ddp
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self._release is not None
        self._release.remove()
