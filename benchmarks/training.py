"""`insitu train` beside a bare Trainer: tokens a second, step time and peak memory, by optimizer.

    python benchmarks/training.py --out benchmarks/results/training.json

LLaMA-9M (hidden 128, 4 layers, 32,000 words; random weights) on made-up text. Every arm is a process of its own, for its
peak memory, and trains through Trainer; the arms take turns of a few steps, so that what else the machine does meets all of
them. The bare arm is transformers.Trainer with torch's fused AdamW on tensors that are there already; the others are insitu's
engine as the command makes it: packed text through the bandit, the loss of every step kept, no monitor, no checkpoints.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from environment import environment
from insitu.diagnostics.skeleton import config_of

BARE = "bare Trainer, adamw"
ARMS: dict[str, dict[str, Any]] = {
    BARE: {},
    "insitu train, adamw": {"name": "adamw"},
    "insitu train, apollo": {"name": "apollo", "options": {"rank": 32}},
    "insitu train, apollo-mini": {"name": "apollo-mini"},
}
VOCABULARY = 32000


class Turns(TrainerCallback):  # type: ignore[misc]
    """Train ``steps`` steps whenever the other end says so, and tell how long they took."""

    def __init__(self, connection: Connection, steps: int) -> None:
        self.connection, self.steps = connection, steps
        self.begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            self.connection.recv()
            self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            self.connection.send(time.perf_counter() - self.begun)


def write_text(path: Path) -> None:
    """Documents of made-up words, enough for a tokenizer of that size to be counted in."""
    dice = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(dice.choices(letters, k=dice.randint(3, 9))) for _ in range(40000)]
    with path.open("w") as file:
        for _ in range(4000):
            file.write(json.dumps({"text": " ".join(dice.choices(words, k=300))}) + "\n")


def arguments(told: argparse.Namespace, directory: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(directory), "max_steps": steps, "per_device_train_batch_size": told.batch, "learning_rate": 1e-3,
        "save_strategy": "no", "logging_steps": 50, "disable_tqdm": True, "report_to": "none", "use_cpu": told.cpu, "seed": 0,
    }  # fmt: skip


def bare(told: argparse.Namespace, directory: Path, steps: int) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (steps * told.batch, told.length))
    return Trainer(
        model=LlamaForCausalLM(config_of("llama-9m")),
        args=TrainingArguments(**arguments(told, directory, steps), optim="adamw_torch_fused"),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )


def ours(told: argparse.Namespace, directory: Path, steps: int, optimizer: dict[str, Any]) -> Any:
    from insitu.train.config import resolve
    from insitu.train.prepare import prepare
    from insitu.train.run import Run

    config = resolve(
        {
            "model": {"name": "llama-9m", "options": {"vocab_size": VOCABULARY}},
            "data": {
                "sources": [{"name": "words", "path": str(told.text)}],
                "tokenizer": {"vocab_size": 8000, "max_bytes": 4_000_000},
                "sequence_length": told.length,
            },
            "optimizer": optimizer,
            "monitor": {"every": 0},
            "training": arguments(told, directory, steps),
        }
    )
    run = prepare(config)
    assert isinstance(run, Run)
    return run.trainer


def arm(name: str, told: argparse.Namespace, connection: Connection) -> None:
    torch.set_num_threads(told.threads)
    steps = told.turn * (told.rounds + 1)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        trainer = bare(told, place, steps) if name == BARE else ours(told, place, steps, ARMS[name])
        trainer.add_callback(Turns(connection, told.turn))
        connection.send("ready")
        trainer.train()
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--rounds", type=int, default=30, help="turns of each arm that are timed; one more is before them"
    )
    parser.add_argument("--turn", type=int, default=5, help="steps in a turn")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu", dest="cpu", action="store_false")
    told = parser.parse_args()
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        told.text = Path(directory) / "words.jsonl"
        write_text(told.text)
        lines: dict[str, Connection] = {}
        for name in told.arms:  # one after the other, because making tokens takes all cores
            lines[name], theirs = context.Pipe()
            context.Process(target=arm, args=(name, told, theirs), daemon=True).start()
            assert lines[name].recv() == "ready"
        seconds: dict[str, list[float]] = {name: [] for name in told.arms}
        for number in range(told.rounds + 1):
            for name, line in lines.items():
                line.send("go")
                elapsed = line.recv()
                if number:  # the first turn makes the optimizer's state
                    seconds[name].append(elapsed / told.turn)
        peaks = {name: line.recv() for name, line in lines.items()}
    tokens = told.batch * told.length
    rows = {}
    for name, found in seconds.items():
        low, _, high = quantiles(found, n=4)
        rows[name] = {
            "step_seconds": {"median": median(found), "quartiles": [low, high], "n": len(found)},
            "tokens_per_second": tokens / median(found),
            "peak_bytes": peaks[name],
        }
        if BARE in seconds:
            # Turn by turn: both met the same machine.
            rows[name]["rate_beside_bare"] = median(b / a for a, b in zip(found, seconds[BARE], strict=True))
        print(f"{name:28} {tokens / median(found):9,.0f} tokens/s  {peaks[name] / 1e6:8,.0f} MB")
    settings = {key: value for key, value in vars(told).items() if key not in ("out", "text", "arms")}
    told.out.parent.mkdir(parents=True, exist_ok=True)
    told.out.write_text(json.dumps({"environment": environment(), "settings": settings, "arms": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
