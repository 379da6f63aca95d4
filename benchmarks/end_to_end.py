"""Training end to end: tokens a second and peak memory, by optimizer, forward and backward included.

    python benchmarks/end_to_end.py --out benchmarks/results/end_to_end.json

On two idle cores about ten minutes. LLaMA-9M (hidden 128, 4 layers, 32,000 words, as in ``experiments``; random weights) and
SmolLM2-135M, full-parameter, on random tokens: neither speed nor memory depends on the text. Every arm is a process of its own,
for its peak memory; the arms step in turns, so that what else the machine does meets all of them.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

import insitu
from environment import environment
from insitu.optim.quantized import Int8Weight

BASELINE = "adamw"
RANKS = {"llama-9m": 32, "smollm2": 144}  # a quarter of the hidden size, as in the paper
BATCHES = {"llama-9m": 8, "smollm2": 1}
WARMUP = 2  # steps before timing: the first makes the state


def adamw(model: nn.Module, _: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def apollo(model: nn.Module, name: str) -> torch.optim.Optimizer:
    return insitu.APOLLO(insitu.param_groups(model), lr=1e-4, rank=RANKS[name], dense="apollo")


def apollo_mini(model: nn.Module, _: str) -> torch.optim.Optimizer:
    return insitu.APOLLOMini(insitu.param_groups(model), lr=1e-4, dense="apollo")


def apollo_mini_released(model: nn.Module, name: str) -> torch.optim.Optimizer:
    optimizer = apollo_mini(model, name)
    insitu.GradientRelease(optimizer)
    return optimizer


def q_apollo(model: nn.Module, name: str) -> torch.optim.Optimizer:
    insitu.quantize(model)
    return apollo(model, name)


def q_apollo_mini_released(model: nn.Module, name: str) -> torch.optim.Optimizer:
    insitu.quantize(model)
    return apollo_mini_released(model, name)


ARMS: dict[str, Callable[[nn.Module, str], torch.optim.Optimizer]] = {
    BASELINE: adamw,
    "apollo": apollo,
    "apollo-mini": apollo_mini,
    "apollo-mini released": apollo_mini_released,
    "q-apollo": q_apollo,
    "q-apollo-mini released": q_apollo_mini_released,
}


def make_model(name: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "smollm2":
        from insitu.live.source import resolve

        return AutoModelForCausalLM.from_pretrained(resolve("smollm2", yes=True), dtype=dtype).train()
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=128, intermediate_size=344, num_attention_heads=4, num_hidden_layers=4,
        max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def stored_bytes(p: torch.Tensor) -> int:
    """Of an int8 weight, numbers and scales: it calls itself float."""
    return p.int_data.nbytes + p.scale.nbytes if isinstance(p, Int8Weight) else p.nbytes


def memory(of: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(of))


def work(line: Connection, arm: str, name: str, dtype: torch.dtype, context: int, threads: int) -> None:
    """What the process of an arm does: a step whenever it is asked, and at the end its memory."""
    torch.set_num_threads(threads)
    model = make_model(name, dtype)
    optimizer = ARMS[arm](model, name)
    vocabulary = model.config.vocab_size
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = memory("VmRSS")
    line.send(None)
    while (step := line.recv()) is not None:
        batch = torch.randint(vocabulary, (BATCHES[name], context), generator=torch.Generator().manual_seed(step))
        start = time.perf_counter()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        line.send(time.perf_counter() - start)
    states = (
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    )
    line.send(
        {
            "state_bytes": sum(value.nbytes for value in states),
            "weight_bytes": sum(stored_bytes(p) for p in model.parameters()),
            "before_training_bytes": before,
            "peak_bytes": memory("VmHWM"),
        }
    )


def measure(name: str, dtype: torch.dtype, rounds: int, context: int, threads: int) -> dict[str, Any]:
    """All arms of one model, in turns."""
    start = get_context("spawn")
    lines: dict[str, Connection] = {}
    processes = []
    for arm in ARMS:
        ours, theirs = start.Pipe()
        process = start.Process(target=work, args=(theirs, arm, name, dtype, context, threads), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        lines[arm] = ours
    for line in lines.values():
        line.recv()  # its model is there
    seconds: dict[str, list[float]] = {arm: [] for arm in lines}
    for step in range(WARMUP + rounds):
        order = list(lines)
        for arm in order[step % len(order) :] + order[: step % len(order)]:
            lines[arm].send(step)
            took = lines[arm].recv()
            if step >= WARMUP:
                seconds[arm].append(took)
    result: dict[str, Any] = {}
    for arm, line in lines.items():
        line.send(None)
        result[arm] = summary(seconds[arm], seconds[BASELINE], BATCHES[name] * context) | line.recv()
    for process in processes:
        process.join()
    return result


def summary(took: list[float], baseline: list[float], tokens: int) -> dict[str, Any]:
    """Ratios are of the two steps of one turn."""
    ratios = [other / mine for mine, other in zip(took, baseline, strict=True)]
    return {
        "n": len(took),
        "tokens_per_second": tokens / median(took),
        "seconds": took,
        "seconds_quartiles": quantiles(took, n=4),
        "speed_over_adamw": median(ratios),
        "speed_over_adamw_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each arm")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    result: dict[str, Any] = {
        "environment": environment(),
        "threads": given.threads,
        "context": given.context,
        "batch": BATCHES,
        "rank": RANKS,
        "warmup_steps": WARMUP,
        "dense": "apollo",
    }
    for name in given.models:
        for dtype in given.dtypes:
            arms = measure(name, getattr(torch, dtype), given.rounds, given.context, given.threads)
            result.setdefault(name, {})[dtype] = arms
            for arm, found in arms.items():
                print(f"{name} {dtype:9} {arm:21}", found if isinstance(found, str) else line_of(found), flush=True)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


def line_of(found: dict[str, Any]) -> str:
    return (
        f"{found['tokens_per_second']:7.0f} tokens/s, {found['speed_over_adamw']:.2f} x AdamW, "
        f"peak {found['peak_bytes'] / 1e6:.0f} MB, state {found['state_bytes'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
