"""One run: a LLaMA of 1.84 M parameters on real English text, in plain torch. Prints its result as one line of JSON.

    python experiments/small_llama/train.py --optimizer apollo --lr 4e-3 --options '{"rank": 32}' [--seed 0] [--steps 600]

``get_text.py`` first. A run uses one thread, so that its numbers do not depend on how many runs a machine does at a time.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from get_text import CACHE, VOCABULARY, load_meta
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import insitu

HIDDEN, FFN, HEADS, LAYERS = 128, 344, 4, 4
EVALUATE_EVERY = 50
CURVE_SEQUENCES, FINAL_SEQUENCES = 64, 256
SMOOTHING = 0.95  # of the training loss that is stored
# Options of a run that say how weights are stored: "dtype" of the model, by default "float32"; "group_size" of int8 matrices, a
# number or "row", by default not int8.
STORAGE = ("dtype", "group_size")


@dataclass(frozen=True)
class Run:
    """What makes a run the one it is; everything else is fixed above."""

    optimizer: str = "adamw"  # "adamw", "apollo" or "apollo-mini"
    lr: float = 2e-3
    options: dict[str, Any] = field(default_factory=dict)  # of insitu.APOLLO, and those of STORAGE
    reset_limiter: bool = False  # forget the limiter's norm when a new projection starts
    seed: int = 0  # of the weights, the order of the text, and the projections
    steps: int = 600  # three projections at the default refresh of 200
    batch: int = 12
    context: int = 128


def make_model(run: Run) -> nn.Module:
    torch.manual_seed(run.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        max_position_embeddings=run.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, run.options.get("dtype", "float32")))
    if size := run.options.get("group_size"):
        insitu.quantize(model, group_size=None if size == "row" else size)
    return model


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    if run.optimizer == "adamw":
        assert not run.options, "AdamW is the baseline: its only option is lr"
        return torch.optim.AdamW(model.parameters(), lr=run.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    make = {"apollo": insitu.APOLLO, "apollo-mini": insitu.APOLLOMini}[run.optimizer]
    options = {name: value for name, value in run.options.items() if name not in STORAGE}
    return make(insitu.param_groups(model), lr=run.lr, seed=run.seed, **options)


def share_of_lr(step: int, steps: int) -> float:
    """Linear warmup over the first tenth, then a cosine to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Windows:
    """A .bin file as sequences of context + 1 tokens that do not overlap, so no token is a target twice in an epoch."""

    def __init__(self, path: Path, context: int) -> None:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        num = len(tokens) // (context + 1)
        self.rows = tokens[: num * (context + 1)].reshape(num, context + 1)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(self.rows[np.sort(indices)].astype(np.int64))


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, windows: Windows, num: int, batch: int) -> float:
    """Over ``num`` sequences spread evenly through the validation text: the same ones in every run."""
    chosen = np.linspace(0, len(windows) - 1, num).round().astype(np.int64)
    model.eval()
    losses = [mean_loss(model, windows.take(part)).item() for part in np.split(chosen, range(batch, num, batch))]
    model.train()
    sizes = [min(batch, num - i) for i in range(0, num, batch)]
    return float(np.average(losses, weights=sizes))


def forget_limiter_norms(optimizer: torch.optim.Optimizer) -> None:
    """Before a step: where it starts a new projection, the limiter has no earlier update to compare with."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "update_norm" in state and int(state["step"]) % group["refresh"] == 0:
                state["update_norm"].zero_()


def state_bytes(optimizer: torch.optim.Optimizer, projected: set[int]) -> dict[str, int]:
    """Bytes of all state tensors, and of those that belong to the matrices that APOLLO projects."""
    sizes = {
        id(p): sum(v.nbytes for v in state.values() if isinstance(v, Tensor)) for p, state in optimizer.state.items()
    }
    return {"all": sum(sizes.values()), "matrices": sum(size for p, size in sizes.items() if p in projected)}


def train(run: Run, cache: Path = CACHE) -> dict[str, Any]:
    """Everything that a run leaves behind. ``final`` is None if the loss was not finite at some step."""
    torch.set_num_threads(1)
    meta = load_meta(cache)
    text = Windows(cache / "train.bin", run.context)
    held_out = Windows(cache / "valid.bin", run.context)
    if run.steps * run.batch > len(text):
        raise ValueError(f"{run.steps} steps of {run.batch} sequences are more than the {len(text)} of the text")
    order = np.random.default_rng(run.seed).permutation(len(text))
    model = make_model(run)
    optimizer = make_optimizer(run, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_lr, steps=run.steps))

    ema, shown, curve = 0.0, [], []
    seconds: dict[str, list[float]] = {"step": [], "step_cpu": [], "optimizer_cpu": []}
    diverged_at = None
    started = time.monotonic()
    for step in range(run.steps):
        begun, begun_cpu = time.monotonic(), time.process_time()
        ids = text.take(order[step * run.batch : (step + 1) * run.batch])
        loss = mean_loss(model, ids)
        value = loss.item()
        if not math.isfinite(value):
            diverged_at = step
            break
        loss.backward()
        backward_cpu = time.process_time()
        if run.reset_limiter and step:
            forget_limiter_norms(optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        ended_cpu = time.process_time()
        seconds["step"].append(time.monotonic() - begun)
        seconds["step_cpu"].append(ended_cpu - begun_cpu)
        seconds["optimizer_cpu"].append(ended_cpu - backward_cpu)
        ema = SMOOTHING * ema + (1 - SMOOTHING) * value
        if (step + 1) % 10 == 0:
            shown.append([step + 1, round(ema / (1 - SMOOTHING ** (step + 1)), 4)])
        if (step + 1) % EVALUATE_EVERY == 0 and step + 1 < run.steps:
            curve.append([step + 1, round(validation_loss(model, held_out, CURVE_SEQUENCES, run.batch), 4)])
    final = None if diverged_at is not None else validation_loss(model, held_out, FINAL_SEQUENCES, run.batch)
    projected = {id(p) for group in insitu.param_groups(model) if group["role"] == "matrix" for p in group["params"]}
    return {
        "config": asdict(run),
        "final": final and round(final, 5),
        "curve": curve,
        "training": shown,
        "diverged_at": diverged_at,
        "seconds": round(time.monotonic() - started, 1),
        "median_seconds": {name: round(median(values or [0.0]), 4) for name, values in seconds.items()},
        "state_bytes": state_bytes(optimizer, projected),
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_in_matrices": sum(p.numel() for p in model.parameters() if id(p) in projected),
        "text": meta["train.bin"]["sha256"][:16],
        "versions": {name: version(name) for name in ("insitu", "torch", "transformers", "tokenizers", "numpy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=["adamw", "apollo", "apollo-mini"], default=Run.optimizer)
    parser.add_argument("--lr", type=float, default=Run.lr)
    parser.add_argument("--options", type=json.loads, default={}, help=f"of insitu.APOLLO, and {STORAGE}, as JSON")
    parser.add_argument("--reset-limiter", action="store_true")
    for name in ("seed", "steps", "batch", "context"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Run, name))
    parser.add_argument("--cache", type=Path, default=CACHE, help="where get_text.py put the text")
    options = vars(parser.parse_args())
    cache = options.pop("cache").expanduser()
    print(json.dumps(train(Run(**options), cache)))


if __name__ == "__main__":
    main()
