"""Hugging Face's Trainer, and what it has no hook for: data that goes on where it was, whole checkpoints, sharded state.

The loop, the schedule, accumulation, evaluation, DDP and the reports are Trainer's. Overridden here are the training data's
loader, the log (tokens per second), a step's loss (kept, for the bandit and the journal), and how a checkpoint is written and
read.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from insitu.data.durable import fsync, write_text
from insitu.train import checkpoints, journal

log = logging.getLogger("insitu.train")

_SCHEDULER = "scheduler.json"  # of a sharded run


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says where it stopped and what to do."""


class Engine(Trainer):  # type: ignore[misc]
    """Trainer over a stream or a data set.

    Args:
        record: what of the run is written into each checkpoint (:mod:`insitu.train.checkpoints`).
        moments: called with the optimizer once it is made, to say how it keeps its moments.
        schedule: called with optimizer, warmup and steps, makes the scheduler in the place of ``lr_scheduler_type``.
        options: Trainer's own.
    """

    lr_scheduler: Any

    def __init__(self, *, record: dict[str, Any], moments: Any = None, schedule: Any = None, **options: Any) -> None:
        self._record = record
        self._moments = moments
        self._schedule = schedule
        self._writing = False
        self._step_loss: Tensor | None = None
        self._tokens = self._told_tokens = 0
        self._started = self._told_at = time.monotonic()
        super().__init__(**options)
        self.add_callback(_Steps(self))

    @property
    def sharded(self) -> bool:
        """Whether Transformers sharded the model while it loaded it (FSDP2)."""
        return bool(self.is_distributed_loading_by_transformers)

    # Data

    def get_train_dataloader(self) -> Any:
        """A stream gives each rank its part and each step its own sequences: accelerate must not divide it or draw ahead."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        # A generator of its own: an iterator draws its seed when it is made, and a resumed run makes one more.
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=_collate,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    # Steps

    def create_optimizer(self, model: Any = None) -> Any:
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self._moments is not None:
            self._moments(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None and self._schedule is not None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = self._schedule(optimizer or self.optimizer, warmup, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Tensor:
        self._tokens += inputs["input_ids"].numel() * self.args.world_size
        loss: Tensor = super().training_step(model, inputs, *rest, **options)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return loss

    def mean_loss(self) -> float:
        """The loss of the step that was just done, mean over all ranks; the same number on each."""
        assert self._step_loss is not None
        mean = float(self.accelerator.gather(self._step_loss.reshape(1)).mean())
        self._step_loss = None
        return mean

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.monotonic()
            logs["tokens_per_second"] = round((self._tokens - self._told_tokens) / (now - self._told_at), 1)
            done = self.state.global_step - self._initial_global_step
            logs["eta_seconds"] = round((now - self._started) / done * (self.state.max_steps - self.state.global_step))
            self._told_tokens, self._told_at = self._tokens, now
        super().log(logs, start_time)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        directory = Path(super()._get_output_dir(trial))
        return str(directory / checkpoints.PARTIAL if self._writing else directory)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        partial = output_dir / checkpoints.PARTIAL / name
        if self.args.should_save and partial.exists():
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
            if self.sharded:
                self._save_sharded(partial)
        finally:
            self._writing = False
        pending = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint == str(partial):
                self.state.best_model_checkpoint = str(output_dir / name)
                self.state.save_to_json(str(partial / "trainer_state.json"))
            checkpoints.complete(
                partial, output_dir / name, {**self._record, **self._position(), "pending_loss": pending}
            )
            checkpoints.rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _position(self) -> dict[str, Any]:
        step = self.state.global_step
        data = getattr(self.train_dataset, "state_dict", None)
        return {"step": step, "data": data(step * self._record["sequences_per_step"]) if data is not None else None}

    def _save_sharded(self, directory: Path) -> None:
        """What Trainer does not save of a model that is sharded: optimizer (each rank its shard), scheduler, random state."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer)
        save({"optimizer": state}, checkpoint_id=directory / checkpoints.SHARDED)
        self._save_rng_state(str(directory))
        if self.args.should_save:
            write_text(directory / _SCHEDULER, json.dumps(self.lr_scheduler.state_dict()) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sharded:  # else it was loaded from there when it was made
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        optimizer = self.optimizer.optimizer
        state = {"optimizer": get_optimizer_state_dict(self.model, optimizer)}
        load(state, checkpoint_id=Path(checkpoint) / checkpoints.SHARDED)
        set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state["optimizer"])
        self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / _SCHEDULER).read_text()))

    def restore_log(self, checkpoint: Path) -> None:
        """Go on with the sum since the last log line, so that the next line is that of the run without a break."""
        pending = json.loads((checkpoint / checkpoints.RECORD).read_text())["pending_loss"]
        if len(pending) == self.args.world_size:
            self._tr_loss += pending[self.args.process_index]
            self._total_loss_scalar -= sum(pending) / len(
                pending
            )  # the mean that the end tells is of this call's steps
            history = [entry["step"] for entry in self.state.log_history if "loss" in entry]
            self._globalstep_last_logged = history[-1] if history else 0


class _Steps(TrainerCallback):  # type: ignore[misc]
    """After each step: its loss, to the journal and to the data's mixture."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._journal: Path | None = None  # on the process that writes it
        self._rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        engine = self._engine
        engine._started = engine._told_at = time.monotonic()
        if args.resume_from_checkpoint is not None:
            engine.restore_log(Path(args.resume_from_checkpoint))
        if state.is_world_process_zero:
            self._journal = Path(args.output_dir) / journal.NAME
            journal.rewind(self._journal, state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        self._rate = float(optimizer.param_groups[0]["lr"])  # before the scheduler moves it

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        engine, step = self._engine, state.global_step
        loss = engine.mean_loss()
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {step}: the training loss is {loss}; lower training.learning_rate, or warm up longer, and go on from "
                "the last checkpoint with --resume"
            )
        if self._journal is not None:
            journal.append(self._journal, step, loss, self._rate)
        if (observe := getattr(engine.train_dataset, "observe", None)) is not None:
            observe(step, loss)
        if self._journal is not None and control.should_save:
            fsync(self._journal)


def _collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Sequences of one length, stacked: (B, T) int64."""
    return {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}
