"""All runs of this experiment, most important first. Repeat it after an interruption: runs that are in the file are skipped.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 python experiments/small_llama/sweep.py [--plan]

(The two variables only spare page faults.) Every run uses one thread; as many go side by side as there are cores. The learning
rate of a later stage is what an earlier one found: all of ``options`` is at AdamW's best.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from get_text import CACHE, load_meta
from train import Run, train

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
ADAMW_GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SHARES = (0.63, 0.8, 1.0, 1.25, 1.6)  # of AdamW's best learning rate
RANK = 32  # a quarter of the model's width

Rows = list[dict[str, Any]]
Stage = Callable[[Run, Rows], Iterator[list[Run]]]


def apollo(base: Run, lr: float, **options: Any) -> Run:
    return replace(base, optimizer="apollo", lr=lr, options={"rank": RANK, **options})


def mini(base: Run, lr: float, **options: Any) -> Run:
    return replace(base, optimizer="apollo-mini", lr=lr, options=options)


def scaled(lr: float, share: float) -> float:
    return float(f"{lr * share:.4g}")


def best_lr(like: Run, rows: Rows) -> float:
    """The learning rate of the lowest final loss among seed-0 rows that differ from ``like`` in nothing else."""
    found = [
        (row["final"], row["config"]["lr"])
        for row in rows
        if row["final"] is not None and row["config"] == {**asdict(like), "lr": row["config"]["lr"], "seed": SEEDS[0]}
    ]
    return min(found)[1] if found else like.lr


def widen(like: Run, shares: tuple[float, float], rows: Rows, times: int = 3) -> Iterator[list[Run]]:
    """Further points beyond the end of a grid, while the best one lies there."""
    for _ in range(times):
        tried = sorted({r["config"]["lr"] for r in rows if r["config"] == {**asdict(like), "lr": r["config"]["lr"]}})
        best = best_lr(like, rows)
        if len(tried) < 2 or tried[0] < best < tried[-1]:
            return
        yield [replace(like, lr=scaled(best, shares[0] if best == tried[0] else shares[1]))]


def adamw_lr(base: Run, rows: Rows) -> Iterator[list[Run]]:
    """A grid by factors of 2 on one seed, then of sqrt(2) around the best, then the best on all seeds."""
    yield [replace(base, lr=lr) for lr in ADAMW_GRID]
    yield from widen(base, (0.5, 2.0), rows)
    best = best_lr(base, rows)
    yield [replace(base, lr=scaled(best, share)) for share in (0.5**0.5, 2**0.5)]
    yield [replace(base, lr=best_lr(base, rows), seed=seed) for seed in SEEDS]


def apollo_lr(base: Run, rows: Rows) -> Iterator[list[Run]]:
    """Does AdamW's best carry over? APOLLO around it on one seed; AdamW's and its own best on all seeds."""
    lr = best_lr(base, rows)
    yield [apollo(base, scaled(lr, share)) for share in SHARES]
    yield from widen(apollo(base, lr), (0.8, 1.25), rows)
    own = best_lr(apollo(base, lr), rows)
    yield [replace(apollo(base, at), seed=seed) for at in dict.fromkeys((lr, own)) for seed in SEEDS]


def options(base: Run, rows: Rows) -> Iterator[list[Run]]:
    """One thing changed at a time, at AdamW's best learning rate."""
    lr = best_lr(base, rows)
    arms = [
        apollo(base, lr, projection=projection, denominator=denominator)
        for denominator in ("projected", "exact")
        for projection in ("gaussian", "rademacher", "sketch")
        if (projection, denominator) != ("gaussian", "projected")  # the defaults: made by the stage before
    ]
    arms += [mini(base, lr), mini(base, lr, denominator="exact")]
    arms += [
        apollo(base, lr, rank=4, projection="sketch", granularity="channel"),
        apollo(base, lr, rank=4, projection="sketch", granularity="tensor"),
        apollo(base, lr, rank=16, projection="sketch"),
        apollo(base, lr, limiter=None),
        replace(apollo(base, lr), reset_limiter=True),
        apollo(base, lr, dense="apollo"),
    ]
    yield [replace(arm, seed=seed) for arm in arms for seed in SEEDS]


def more(base: Run, rows: Rows) -> Iterator[list[Run]]:
    """What the stages above leave open: refreshes that come more often, and other arms' own learning rates."""
    lr = best_lr(base, rows)
    often = apollo(base, lr, refresh=50)
    yield [replace(arm, seed=seed) for arm in (often, replace(often, reset_limiter=True)) for seed in SEEDS]
    yield [mini(base, scaled(lr, share)) for share in (0.63, 1.6)]
    yield [apollo(base, scaled(lr, share), limiter=None) for share in (0.63, 1.6)]


def int8(base: Run, rows: Rows) -> Iterator[list[Run]]:
    """What int8 weights cost, against bf16 weights that are rounded stochastically; both compute in bf16."""
    lr = best_lr(base, rows)
    arms = [
        make(base, lr, dtype="bfloat16", **storage)
        for storage in ({}, {"group_size": 32}, {"group_size": "row"})
        for make in (apollo, mini)
    ]
    arms += [apollo(base, lr, dtype="bfloat16", group_size=32, rounding="nearest")]
    for seed in SEEDS:
        yield [replace(arm, seed=seed) for arm in arms]


STAGES: dict[str, Stage] = {
    "adamw-lr": adamw_lr,
    "apollo-lr": apollo_lr,
    "options": options,
    "more": more,
    "int8": int8,
}


def key(config: dict[str, Any], text: str) -> str:
    return json.dumps([config, text], sort_keys=True)


def provenance(jobs: int) -> dict[str, Any]:
    """Taken once, at the start: that is the code which the workers import."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/experiments/small_llama/*.py")
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line] or [": unknown"]
    return {
        "commit": git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "machine": {"cpu": cpu[0].split(":", 1)[1].strip(), "cores": os.cpu_count(), "runs_side_by_side": jobs},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "runs.jsonl")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--cache", type=Path, default=CACHE, help="where get_text.py put the text")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    parser.add_argument("--steps", type=int, default=Run.steps)
    parser.add_argument("--plan", action="store_true", help="count what is left to do (as far as it is known) and stop")
    told = parser.parse_args()
    cache, base = told.cache.expanduser(), Run(steps=told.steps)
    text = load_meta(cache)["train.bin"]["sha256"][:16]
    rows: Rows = [json.loads(line) for line in told.out.read_text().splitlines()] if told.out.exists() else []
    done = {key(row["config"], row["text"]) for row in rows}
    rows = [row for row in rows if row["text"] == text]
    origin = provenance(told.jobs)

    told.out.parent.mkdir(parents=True, exist_ok=True)
    # Fresh processes, and only for runs: torch's threads do not survive a fork.
    with ProcessPoolExecutor(told.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in told.stages:
            for batch in STAGES[name](base, rows):
                left = {key(asdict(run), text): run for run in batch}
                left = {k: run for k, run in left.items() if k not in done}
                print(f"{name}: {len(batch)} runs, {len(left)} to do", flush=True)
                if told.plan:
                    continue
                for future in as_completed([pool.submit(train, run, cache) for run in left.values()]):
                    row = {**future.result(), **origin}
                    with told.out.open("a") as out:
                        out.write(json.dumps(row) + "\n")
                    rows.append(row)
                    done.add(key(row["config"], row["text"]))
                    config = {k: v for k, v in row["config"].items() if v != getattr(base, k)}
                    print(f"{row['final']} in {row['seconds']} s: {config}", flush=True)


if __name__ == "__main__":
    main()
