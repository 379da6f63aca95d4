"""Optimizer memory of the papers' LLaMAs and SmolLM2, from meta tensors; `--table` prints what the docs show of it.

Nothing is measured here and no model is loaded: that the figures are those of real optimizers is what
tests/diagnostics/test_memory.py shows.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from environment import environment
from insitu.diagnostics.memory import OPTIMIZERS, memory
from insitu.diagnostics.skeleton import skeleton

RESULTS = Path(__file__).parent / "results" / "memory.json"
MODELS = ("smollm2", "llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b")
# The ranks of the papers: a quarter of the hidden size, and 256 for 7B.
RANKS = {"smollm2": 144, "llama-60m": 128, "llama-130m": 192, "llama-350m": 256, "llama-1b": 512, "llama-7b": 256}
PROJECTED = [name for name in OPTIMIZERS if "apollo" in name and name != "apollo-qn"]


def rows(model: str) -> list[dict[str, Any]]:
    """Every optimizer, and those of the APOLLO family with embeddings and head projected too."""
    module = skeleton(model)
    cases: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in OPTIMIZERS]
    cases += [(name, {"dense": "apollo"}) for name in PROJECTED]
    cases += [("apollo", {"dense": "apollo", "moments": "bfloat16"})]
    found = []
    for name, options in cases:
        whole = memory(module, name, rank=RANKS[model], **options).as_json()
        released = memory(module, name, rank=RANKS[model], release=True, **options)
        found.append({**whole, **options, "gradients_released": released.gradients, "peak_released": released.peak})
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown: state in GB, a row for each optimizer and a column for each model."""
    models = report["models"]
    lines = ["| state, GB | " + " | ".join(f"{name}, rank {entry['rank']}" for name, entry in models.items()) + " |"]
    lines.append("|---" * (len(models) + 1) + "|")
    for i, first in enumerate(models["smollm2"]["optimizers"]):
        if first["optimizer"].startswith("q-"):
            continue  # int8 weights, but the state of the same optimizer without
        options = (f'`{key}="{first[key]}"`' for key in ("dense", "moments") if key in first)
        label = ", ".join((f"`{first['optimizer']}`", *options))
        figures = (f"{entry['optimizers'][i]['state_bytes'] / 1e9:.3f}" for entry in models.values())
        lines.append(f"| {label} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--table", action="store_true", help="print the stored figures as Markdown, and compute nothing"
    )
    if parser.parse_args().table:
        print(table(json.loads(RESULTS.read_text())))
    else:
        warnings.simplefilter("ignore", UserWarning)  # of ranks that are large for a side: they are the papers'
        models = {
            name: {"rank": RANKS[name], "dtype": str(torch.bfloat16), "optimizers": rows(name)} for name in MODELS
        }
        RESULTS.write_text(json.dumps({"environment": environment(), "models": models}, indent=1) + "\n")
