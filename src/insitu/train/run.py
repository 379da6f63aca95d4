"""A run that is ready: it trains to the end, writes the files to serve, and draws its curves."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from insitu.data.durable import write_text
from insitu.train import checkpoints, final, optimizers, plots
from insitu.train.config import TrainConfig
from insitu.train.engine import TrainingError

log = logging.getLogger("insitu.train")

EVALUATION = "evaluation.json"


@dataclass
class Run:
    """A run of the engine, and the checkpoint that it goes on from. :func:`insitu.train.prepare.prepare` makes it."""

    config: TrainConfig
    trainer: Any
    tokenizer: Any
    resume: Path | None
    step: int  # that the run begins after

    def train(self) -> Path:
        """Train to the end and write the final weights into ``output_dir``; returns ``output_dir``.

        Raises:
            TrainingError: the loss is not finite, or the monitor stopped the run; no final weights are written then.
        """
        args = self.trainer.args
        output_dir = Path(args.output_dir)
        if self.resume is not None and 0 < args.max_steps <= self.step:
            log.info("%s is the end of the run: nothing is left to train", self.resume)
            self.trainer._load_from_checkpoint(str(self.resume))
            if args.should_save:  # a kill may have come before the last checkpoint's rotation
                state = json.loads((self.resume / "trainer_state.json").read_text())
                checkpoints.rotate(output_dir, args.save_total_limit, state["best_model_checkpoint"])
        else:
            if self.resume is not None:
                log.info("going on from %s", self.resume)
            self.trainer.train(resume_from_checkpoint=None if self.resume is None else str(self.resume))
        if self.trainer.is_world_process_zero():
            plots.draw(output_dir, self.trainer.train_dataset)
        _refuse_stopped(self.trainer)
        final.save(self.trainer, output_dir)
        _evaluate(self.config, self.trainer, self.tokenizer, output_dir)
        return output_dir


@dataclass
class PreferenceRun:
    """A run of TRL's DPO trainer, which writes checkpoints in its own way."""

    config: TrainConfig
    model: Any
    tokenizer: Any
    overrides: dict[str, Any]
    callbacks: list[Any]
    trainer: Any = None

    def train(self) -> Path:
        """As :meth:`Run.train`."""
        from insitu.train.preferences import run_dpo

        training = {**self.config.training, **self.overrides}
        self.trainer = run_dpo(
            self.config.sft,
            self.model,
            self.tokenizer,
            training,
            optimizer=lambda args: optimizers.class_and_kwargs(self.config.optimizer, args),
            callbacks=self.callbacks,
            resume_from_checkpoint=training.get("resume_from_checkpoint"),
        )
        output_dir = Path(self.trainer.args.output_dir)
        _refuse_stopped(self.trainer)
        final.save(self.trainer, output_dir)
        _evaluate(self.config, self.trainer, self.tokenizer, output_dir)
        return output_dir


def _refuse_stopped(trainer: Any) -> None:
    for callback in trainer.callback_handler.callbacks:
        if (reason := getattr(callback, "stopped", None)) is not None:
            raise TrainingError(reason)


def _evaluate(config: TrainConfig, trainer: Any, tokenizer: Any, output_dir: Path) -> None:
    if config.sft is None or not config.sft.evaluate or not trainer.is_world_process_zero():
        return
    from insitu.train.evaluation import evaluate

    results = evaluate(trainer.model, tokenizer, config.sft.evaluate)
    write_text(output_dir / EVALUATION, json.dumps(results, indent=2, default=str) + "\n")
    log.info("%s: %s", output_dir / EVALUATION, ", ".join(sorted(results)))
