"""Does each of the four leaves keep a small language model from collapse, and what does each precision cost?

    insitu train get-data andrea16 --out DATA
    python experiments/four_leaves/sweep.py --data DATA                        # everything, in the order of the stages
    python experiments/four_leaves/sweep.py --data DATA --stages recipes --seeds 1

Every run is `insitu train pretrain` on recipes/andrea-tiny.yaml with a few values changed (VARIANTS), in a process and a
directory of its own. One JSON line a run in results/runs.jsonl; what is there is not repeated, and an interrupted run goes on
from its last checkpoint. table.py makes the tables and the plot from it.
"""

import argparse
import copy
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from environment import environment  # noqa: E402

RECIPE = ROOT / "recipes" / "andrea-tiny.yaml"
TAIL = 100  # steps whose mean loss is the final loss

# The lesson's 2,000 of 200,000 steps: a hundredth of the run.
_V2 = {
    "optimizer": {"name": "adamw", "schedule": "ramped-cosine"},
    "training": {"weight_decay": 0.01, "max_grad_norm": 1.0, "warmup_steps": 0.01},
}
_SENTENCE = "The clock in the hall struck nine, and nobody was awake. "


def _change(base: dict[str, Any], *changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with nested values replaced."""
    made = copy.deepcopy(base)
    for change in changes:
        for key, value in change.items():
            inner = made.get(key)
            made[key] = (
                _change(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else copy.deepcopy(value)
            )
    return made


def _training(**values: Any) -> dict[str, Any]:
    return {"training": values}


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "recipes": {
        # Adam: no warmup (a ramp of one step is none), no clipping, no decay. Only watched, so that its scores go on.
        "v1": _change(
            _V2, _training(weight_decay=0.0, max_grad_norm=0.0, warmup_steps=1), {"monitor": {"action": "warn"}}
        ),
        "v2": _V2,
    },
    "leaves": {
        "v2 without decay": _change(_V2, _training(weight_decay=0.0), {"monitor": {"action": "warn"}}),
        "v2 without warmup": _change(_V2, _training(warmup_steps=1), {"monitor": {"action": "warn"}}),
        "v2 without clipping": _change(_V2, _training(max_grad_norm=0.0), {"monitor": {"action": "warn"}}),
    },
    # From the weights of v2: one sentence, again and again, at ten times the rate.
    "collapse": {"forced collapse": _change(_V2, {"monitor": {"every": 2}}, _training(logging_steps=2))},
    "precision": {
        **{
            f"compute {kind}": _change(_V2, {"precision": {"compute": kind}})
            for kind in ("fp32", "bf16", "fp16", "fp8")
        },
        **{f"moments {kind}": _change(_V2, {"precision": {"moments": kind}}) for kind in ("bf16", "fp16", "fp8")},
    },
}


def configuration(stage: str, name: str, seed: int, told: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The whole configuration of one run."""
    steps = {"precision": told.precision_steps, "collapse": 500}.get(stage, told.steps)
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["training"].pop("lr_scheduler_type", None)  # optimizer.schedule makes it
    made = _change(
        recipe,
        {"data": {"directory": str(told.data)}},
        {"monitor": {"action": "stop", "patience": 5}},
        VARIANTS[stage][name],
        _training(
            output_dir=str(directory / "out"), max_steps=steps, seed=seed, save_strategy="steps",
            save_steps=2 if stage == "collapse" else max(1, steps // 6),
            save_total_limit=1, report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            **({"learning_rate": told.lr} if told.lr else {}),
        ),
    )  # fmt: skip
    if stage == "collapse":
        text = directory / "sentence.txt"
        text.write_text(_SENTENCE * 2000)
        made["model"] = {"name": str(run_directory(told, "v2", seed) / "out")}
        made["data"] = {
            "sources": [{"name": "sentence", "path": str(text)}], "mixture": "weighted", "validation": 0.0,
            "sequence_length": made["data"]["sequence_length"],
        }  # fmt: skip
        made["training"]["learning_rate"] = 10 * made["training"]["learning_rate"]
        for key in [key for key in made["training"] if key.startswith("eval_")]:
            del made["training"][key]
    return made


def run_directory(told: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(told.work / f"{name.replace(' ', '-')}-{seed}")


def key(config: dict[str, Any]) -> str:
    """What a run is, wherever it lies."""
    plain = _change(config, _training(output_dir=""), {"data": {"directory": ""}})
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))


def measure(out: Path) -> dict[str, Any]:
    """What the run has left behind."""
    losses = [row["loss"] for row in rows_of(out / "losses.jsonl")]
    samples = list(rows_of(out / "samples.jsonl"))
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    told = [
        value
        for entry in history[-40:]
        for name, value in entry.items()
        if name.startswith("eval_") and name.endswith("_loss")
    ]
    state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    tensors = [t for values in state.values() for n, t in values.items() if isinstance(t, torch.Tensor) and n != "step"]
    return {
        "steps": len(losses),
        "final_loss": statistics.fmean(losses[-TAIL:]),
        "first_loss": losses[0],
        "validation_loss": statistics.fmean(told) if told else None,
        "scores": [[row["step"], round(row["score"], 2), row["loss"]] for row in samples],
        "lowest_score": min(row["score"] for row in samples),
        "most_low_in_a_row": max(row["low"] for row in samples),
        "last_sample": samples[-1]["samples"][0]["text"][:300],
        "good": sorted(path.name for path in out.glob("good-*")),
        "state_bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


def train(config: dict[str, Any], directory: Path) -> float:
    """Run it, or the rest of it; seconds."""
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "insitu.cli", "train", "pretrain", "-c", str(directory / "config.yaml")]
    if any((directory / "out").glob("checkpoint-*")):
        command.append("--resume")
    begun = time.monotonic()
    with (directory / "log.txt").open("ab") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    samples = (
        list(rows_of(directory / "out" / "samples.jsonl")) if (directory / "out" / "samples.jsonl").exists() else []
    )
    stopped = (
        config["monitor"].get("action") != "warn"
        and bool(samples)
        and samples[-1]["low"] >= config["monitor"]["patience"]
    )
    if done.returncode and not stopped:  # a run that the monitor has stopped may say so by its exit code
        sys.exit(f"{' '.join(command)} ended with {done.returncode}; see {directory / 'log.txt'}")
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("INSITU_DATA"), help="$INSITU_DATA by default")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "insitu" / "four_leaves")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "runs.jsonl")
    parser.add_argument("--stages", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--precision-steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, help="in place of the recipe's, for all")
    told = parser.parse_args()
    if told.data is None:
        sys.exit("give --data, the directory that `insitu train get-data andrea16` wrote, or set INSITU_DATA")
    told.out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in rows_of(told.out)} if told.out.exists() else set()
    origin = environment()
    for stage in told.stages:
        for seed in range(told.seeds):
            for name in VARIANTS[stage]:
                directory = run_directory(told, name, seed)
                directory.mkdir(parents=True, exist_ok=True)
                config = configuration(stage, name, seed, told, directory)
                if key(config) in done:
                    continue
                seconds = train(config, directory)
                found = measure(directory / "out")
                row = {"key": key(config), "stage": stage, "name": name, "seed": seed, "asked": config["training"]["max_steps"],
                       "seconds": round(seconds, 1), **found, "environment": origin}  # fmt: skip
                with told.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    os.fsync(out.fileno())
                print(
                    f"{name}, seed {seed}: {found['steps']} steps, loss {found['final_loss']:.3f}, "
                    f"lowest score {found['lowest_score']:.0f}, {found['state_bytes']} bytes of state",
                    flush=True,
                )


if __name__ == "__main__":
    main()
