"""Fine-tuning SmolLM2-135M-Instruct on ARC-Easy: held-out accuracy before and after one epoch, on several seeds.

    python benchmarks/sft.py --out benchmarks/results/sft.json --data DIR

DIR (or $INSITU_DATA) holds commonsense/ARC-Easy/{train,test}.json; without either the Hub's allenai/ai2_arc is read. The model
sees a question and writes the answer's text: no letters, no choices in the prompt. It is right when, of an item's answers, the
right one has the highest log-likelihood per character. The rise is paired, item by item, and so is its standard error.

About an hour on two idle cores. What is done is kept in OUT.partial: an interrupted run goes on from there.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from environment import environment
from insitu.data.batch import collate
from insitu.data.chat import encode_messages
from insitu.data.loss import target_logprobs
from insitu.integrations.trainer import trainer_optimizer
from insitu.live import source
from insitu.optim import APOLLO
from insitu.train import precision
from insitu.train.precision import PrecisionConfig
from insitu.train.sft import SftConfig, make_sft

BATCH = 32  # answers scored at once
MAX_LENGTH = 256


class Item(NamedTuple):
    question: str
    answers: list[str]
    right: int

    def messages(self, answer: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answers[answer]}]


def items(data: Path | None, split: str) -> list[Item]:
    """All items of a split."""
    if data is None:
        from datasets import load_dataset

        rows = load_dataset("allenai/ai2_arc", "ARC-Easy", split=split)
        return [
            Item(row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))
            for row in rows
        ]
    rows = json.loads((data / "commonsense" / "ARC-Easy" / f"{split}.json").read_text())
    return [read(row) for row in rows]


def read(row: dict[str, str]) -> Item:
    """From the LLM-Adapters form: an instruction that lists the answers, and the number of the right one."""
    match = re.fullmatch(
        r"Please choose the correct answer to the question: (.*?)\n\n(Answer1: .*)\n\nAnswer format: .*",
        row["instruction"],
        re.S,
    )
    if match is None:
        raise ValueError(f"no item in the LLM-Adapters form: {row['instruction'][:100]!r}")
    answers = [part.strip() for part in re.split(r"\s*Answer\d: ", match[2])[1:]]
    return Item(match[1].strip(), answers, int(row["answer"].removeprefix("answer")) - 1)


def judge(model: Any, tokenizer: Any, asked: Sequence[Item]) -> list[bool]:
    """Which items are answered rightly."""
    model.eval()
    wanted = [(i, j, encode_messages(tokenizer, item.messages(j), max_length=MAX_LENGTH))
              for i, item in enumerate(asked) for j in range(len(item.answers))]  # fmt: skip
    wanted.sort(key=lambda entry: len(entry[2].input_ids))
    scores: dict[tuple[int, int], float] = {}
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        told = target_logprobs(model, collate([example for _, _, example in part], tokenizer.pad_token_id))
        for (i, j, _), logprobs in zip(part, told, strict=True):
            # All but the token that ends the turn: it is no character of the answer.
            scores[i, j] = float(logprobs[:-1].sum()) / len(asked[i].answers[j])
    return [max(range(len(item.answers)), key=lambda j: scores[i, j]) == item.right for i, item in enumerate(asked)]


def tuned(base: Path, file: Path, told: argparse.Namespace, seed: int) -> tuple[Any, list[float]]:
    """The model after the epochs on ``file``, and its losses."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    overrides = precision.apply(PrecisionConfig(compute="bf16"), model, device="cpu")
    data, _, collator = make_sft(
        SftConfig(train=str(file), max_length=MAX_LENGTH), AutoTokenizer.from_pretrained(base), model
    )
    with tempfile.TemporaryDirectory(prefix="insitu-sft-") as directory:
        args = TrainingArguments(
            output_dir=directory, num_train_epochs=told.epochs, per_device_train_batch_size=told.batch_size,
            learning_rate=told.lr, lr_scheduler_type="linear", warmup_steps=0.1, max_grad_norm=1.0, seed=seed,
            train_sampling_strategy="group_by_length" if told.group else "random", logging_steps=10, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, **overrides,
        )  # fmt: skip
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=collator,
            optimizer_cls_and_kwargs=trainer_optimizer(
                args, APOLLO, rank=told.rank, dense="apollo", limiter=None, seed=seed
            ),
        )
        trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """The rise of accuracy and its standard error, over the same items."""
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    rise = statistics.fmean(differences)
    return {"rise": rise, "standard_error": error, "in_errors": rise / error if error else 0.0}


def keep(path: Path, state: dict[str, Any]) -> None:
    beside = path.with_name(path.name + ".new")
    with beside.open("w") as out:
        out.write(json.dumps(state))
        out.flush()
        os.fsync(out.fileno())
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, default=os.environ.get("INSITU_DATA"), help="$INSITU_DATA by default")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--rank", type=int, default=72)
    parser.add_argument("--group", action="store_true", help="batches of like length")
    parser.add_argument("--train-items", type=int, help="only so many, drawn once")
    parser.add_argument("--test-items", type=int, help="only so many, drawn once")
    told = parser.parse_args()
    data = Path(told.data).expanduser() if told.data else None
    drawn = random.Random(0)
    train, test = items(data, "train"), items(data, "test")
    train = drawn.sample(train, told.train_items) if told.train_items else train
    test = drawn.sample(test, told.test_items) if told.test_items else test
    base = source.resolve(told.model, yes=True)
    tokenizer = AutoTokenizer.from_pretrained(base)

    options = {name: value for name, value in vars(told).items() if name not in ("out", "data", "seeds")}
    told.out.parent.mkdir(parents=True, exist_ok=True)
    partial = told.out.with_suffix(".partial")
    state: dict[str, Any] = {"options": options, "environment": environment(), "baseline": None, "runs": []}
    if partial.exists():
        state = json.loads(partial.read_text())
        if state["options"] != options:
            sys.exit(f"{partial} is of other options, {state['options']}; give these, or move it away")
    if state["baseline"] is None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            state["baseline"] = judge(model, tokenizer, test)
        keep(partial, state)
    print(f"before: {statistics.fmean(state['baseline']):.4f} of {len(test)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="insitu-sft-") as directory:
        file = Path(directory) / "train.jsonl"
        file.write_text("".join(json.dumps({"messages": item.messages(item.right)}) + "\n" for item in train))
        for seed in range(len(state["runs"]), told.seeds):
            begun = time.monotonic()
            model, losses = tuned(base, file, told, seed)
            trained = time.monotonic() - begun
            with torch.autocast("cpu", torch.bfloat16):
                right = judge(model, tokenizer, test)
            run = {"seed": seed, "accuracy": statistics.fmean(right), **paired(state["baseline"], right),
                   "losses": losses, "train_seconds": round(trained, 1), "right": right}  # fmt: skip
            state["runs"].append(run)
            keep(partial, state)
            print(
                f"seed {seed}: {run['accuracy']:.4f}, a rise of {run['rise']:.4f} +- {run['standard_error']:.4f} "
                f"({run['in_errors']:.1f} standard errors); loss {losses[0]:.3f} to {losses[-1]:.3f}",
                flush=True,
            )
    summary = {
        "items": {"train": len(train), "test": len(test), "chance": statistics.fmean(1 / len(i.answers) for i in test)},
        "baseline": statistics.fmean(state["baseline"]),
        "accuracy": [run["accuracy"] for run in state["runs"]],
        "rise": [{name: run[name] for name in ("rise", "standard_error", "in_errors")} for run in state["runs"]],
    }
    told.out.write_text(json.dumps({"summary": summary, **state}, indent=1) + "\n")
    partial.unlink()
    print(json.dumps(summary, indent=1))
    if any(run["in_errors"] < 2 for run in state["runs"]):
        sys.exit("a rise is under two standard errors")


if __name__ == "__main__":
    main()
