"""The sample monitor: it lets the model write as it trains, and stops a run whose model has collapsed though its loss falls.

Every ``every`` steps, and at each checkpoint, the model goes on from fixed prompts with a fixed seed; the text is scored
(:func:`insitu.diagnostics.collapse.score`) and logged (:mod:`insitu.train.samples`). ``patience`` scores under ``threshold``
in a row stop the run. The newest checkpoint whose own samples were at or over the threshold is kept out of reach of Trainer's
rotation, as ``good-STEP`` (:mod:`insitu.train.kept`).

The count of low scores is read back from the log at a resume, so a killed run stops at the same step as one that was not.

Works on one process, under DDP, and on FSDP2 (every rank generates; the score of rank 0 decides, so all stop together). FSDP1
and DeepSpeed are refused: their modules cannot generate without being gathered first.
"""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from insitu.diagnostics.collapse import THRESHOLD, WINDOW, score
from insitu.train import kept, samples
from insitu.train.sampling import encode_prompts, sample

log = logging.getLogger("insitu.train")

_PARTS = ("bigrams", "trigrams", "words", "characters")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """When and how samples are taken, and what becomes of a run whose samples are bad."""

    every: int = field(default=100, metadata={"help": "Steps between two samples; 0 turns the monitor off."})
    tokens: int = field(default=WINDOW, metadata={"help": "Tokens written after each prompt."})
    prompts: list[str] = field(
        default_factory=lambda: ["The", "I was", "In the"],
        metadata={"help": "What the model goes on from; the score is the mean over them."},
    )
    threshold: float = field(default=THRESHOLD, metadata={"help": "A score of 0 to 100; real text has 60 and more."})
    patience: int = field(default=5, metadata={"help": "So many scores under the threshold in a row are a collapse."})
    action: Literal["stop", "warn"] = field(
        default="stop", metadata={"help": "What a collapse does: stop the run, or only say so."}
    )
    temperature: float = field(
        default=0.8,
        metadata={"help": "Of the sampling. Greedy text of a small model repeats itself also where the model is well."},
    )
    seed: int = field(default=0, metadata={"help": "Of the sampling; the run's own randomness is not touched."})

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("tokens", 1), ("patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"monitor.{name}={value!r}; expected an integer, {least} or more")
        for name, low, high in (("threshold", 0, 100), ("temperature", 0, math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                raise ValueError(f"monitor.{name}={value!r}; expected a number over {low}, below {high}")
        if self.action not in ("stop", "warn"):
            raise ValueError(
                f"monitor.action={self.action!r}; expected 'stop' or 'warn'. A run is not rolled back by itself: train on "
                "from the good-STEP that a stop names, with a lower learning rate or other data"
            )
        if (
            not isinstance(self.prompts, list | tuple)
            or not self.prompts
            or not all(isinstance(p, str) for p in self.prompts)
        ):
            raise ValueError(f"monitor.prompts={self.prompts!r}; expected a list of at least one text")


class SampleMonitor(TrainerCallback):  # type: ignore[misc]
    """Trainer callback; see the module. ``stopped`` is the reason for which it stopped the run, or None."""

    def __init__(self, config: MonitorConfig, tokenizer: Any) -> None:
        if not config.every:
            raise ValueError("monitor.every=0 turns the monitor off: leave the callback out")
        self.config = config
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._prompts = encode_prompts(tokenizer, config.prompts)
        self._step = self._low = 0  # of the last sample; the same on all ranks
        self._rows: list[dict[str, Any]] = []
        self._saved: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Refuse what cannot work before the first step, and take up the log where the run takes up."""
        _refuse_wrapped(args)
        self._refuse_too_long(model)
        self.stopped, self._saved, self._rows = None, None, []
        if state.is_world_process_zero:
            directory = Path(args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self._rows = samples.rewind(directory / samples.NAME, state.global_step)
            kept.part_from(directory, state.global_step)
        low = self._rows[-1]["low"] if self._rows else 0
        self._step, self._low = state.global_step, int(_of_rank_0(low, model.device))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._keep()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if state.global_step % self.config.every == 0:
            self._judge(args, state, control, model)

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """A checkpoint is good by the samples of its own weights."""
        self._judge(args, state, control, model)
        if self._low == 0 and state.is_world_process_zero:
            # Linked only at the next step: other callbacks may still write into it.
            self._saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._keep()
        if not state.is_world_process_zero or not self._rows:
            return
        directory = Path(args.output_dir)
        try:
            samples.plot(self._rows, self.config.threshold, directory / samples.PLOT)
        except ImportError:
            log.info(
                "no plot of the scores: it needs matplotlib (pip install 'insitu[plots]'); they are in %s", samples.NAME
            )

    def _judge(self, args: Any, state: Any, control: Any, model: Any) -> None:
        """Sample, score, log and count, unless this step has been."""
        if state.global_step == self._step:
            return
        texts = [
            self._tokenizer.decode(ids, skip_special_tokens=True)
            for ids in sample(model, self._prompts, self.config.tokens, self.config.temperature, self.config.seed)
        ]
        scores = [score(text) for text in texts]
        total = _of_rank_0(sum(one.total for one in scores) / len(scores), model.device)
        self._step, self._low = state.global_step, self._low + 1 if total < self.config.threshold else 0
        if state.is_world_process_zero:
            row = {
                "step": self._step,
                "score": total,
                **{part: sum(getattr(one, part) for one in scores) / len(scores) for part in _PARTS},
                "low": self._low,
                "loss": next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
                "samples": [
                    {"prompt": prompt, "text": text, "score": one.total, "note": one.note}
                    for prompt, text, one in zip(self.config.prompts, texts, scores, strict=True)
                ],
            }
            self._rows.append(row)
            samples.append(Path(args.output_dir) / samples.NAME, row)
            log.info("step %d: samples score %.0f of 100; %r", self._step, total, texts[0][:100])
        if self._low >= self.config.patience:
            self._collapsed(args, state, control)

    def _collapsed(self, args: Any, state: Any, control: Any) -> None:
        good = kept.last_good(Path(args.output_dir))
        said = (
            f"step {state.global_step}: the model has collapsed into repetition: its last {self._low} samples score "
            f"under {self.config.threshold:g} (they are in {Path(args.output_dir) / samples.NAME}); "
            + (f"the last good checkpoint is {good}" if good else "no checkpoint was good")
        )
        if state.is_world_process_zero:
            log.warning("%s", said)
        if self.config.action == "stop":
            self.stopped = said
            control.should_training_stop = True

    def _keep(self) -> None:
        if self._saved is not None:
            if self._saved.is_dir():
                kept.keep(self._saved)
            else:
                log.warning("%s is good and not there any more: it is not kept", self._saved)
            self._saved = None

    def _refuse_too_long(self, model: Any) -> None:
        context = getattr(model.config, "max_position_embeddings", None)
        longest = max(map(len, self._prompts))
        if context is not None and longest + self.config.tokens > context:
            raise ValueError(
                f"monitor.tokens={self.config.tokens} after a prompt of {longest} tokens: the model has {context} positions; "
                f"give at most {context - longest}"
            )


def _refuse_wrapped(args: Any) -> None:
    fsdp1 = args.fsdp and int(args.fsdp_config.get("version", 2)) == 1
    if args.deepspeed or fsdp1:
        which = "DeepSpeed" if args.deepspeed else "FSDP1"
        raise ValueError(
            f"monitor.every: sampling does not work under {which}, whose weights are gathered for training only; shard with "
            "FSDP2, or turn the monitor off with monitor.every=0"
        )


def _of_rank_0(value: float, device: torch.device) -> float:
    """The same number on all ranks: replicas may differ in a last bit, and a decision must not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    agreed = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.broadcast(agreed, 0)
    return float(agreed)
