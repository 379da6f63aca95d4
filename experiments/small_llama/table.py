"""The tables of README.md, and the plot, from results/runs.jsonl.

python experiments/small_llama/table.py            # prints the tables
python experiments/small_llama/table.py --write    # puts them into README.md, between the marks
python experiments/small_llama/table.py --plot experiments/small_llama/runs.svg    # needs insitu[plots]
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
from marks import between  # noqa: E402

DEFAULTS = {"projection": "gaussian", "denominator": "projected"}  # not told in an arm's name
MARKS = ("<!-- tables: made by table.py -->", "<!-- end of tables -->")

Row = dict[str, Any]
Arm = str  # a name: everything of a run but learning rate and seed


def arm_of(row: Row) -> Arm:
    config = row["config"]
    if config["optimizer"] == "adamw":
        return "AdamW"
    words = {"apollo": "APOLLO", "apollo-mini": "APOLLO-Mini"}[config["optimizer"]]
    told = {k: v for k, v in config["options"].items() if v != DEFAULTS.get(k, ...)}
    parts = [f"rank {told.pop('rank')}"] if "rank" in told else []
    parts += [f"{name} {'off' if value is None else value}" for name, value in told.items()]
    parts += ["limiter forgets at a refresh"] if config["reset_limiter"] else []
    return ", ".join([words, *parts])


class Results:
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.by_arm: dict[Arm, dict[float, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
        for row in rows:
            self.by_arm[arm_of(row)][row["config"]["lr"]][row["config"]["seed"]] = row
        adamw = self.by_arm["AdamW"]
        finals = {lr: rows[0]["final"] for lr, rows in adamw.items() if 0 in rows and rows[0]["final"] is not None}
        self.lr = min(finals, key=lambda lr: finals[lr])  # AdamW's best on seed 0
        self.baseline = adamw[self.lr]

    def gap(self, row: Row) -> float:
        """Final loss less that of AdamW, of the same seed: the same weights at the start, the same text."""
        return row["final"] - self.baseline[row["config"]["seed"]]["final"]


def optimum(points: dict[float, float]) -> float | None:
    """The lowest point of the parabola through the best and its neighbours, in log lr; None at an end of the grid."""
    lrs = sorted(points)
    i = lrs.index(min(points, key=lambda lr: points[lr]))
    if not 0 < i < len(lrs) - 1:
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(lr), points[lr]) for lr in lrs[i - 1 : i + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return math.exp((x0 + x1) / 2 - left / (2 * curvature)) if curvature > 0 else None


def seed_0(results: Results, arm: Arm) -> dict[float, float]:
    rows = {lr: seeds[0] for lr, seeds in results.by_arm[arm].items() if 0 in seeds}
    return {lr: row["final"] for lr, row in sorted(rows.items()) if row["final"] is not None}


def lr_table(results: Results) -> Iterator[str]:
    yield "| arm | learning rate | of AdamW's best | final loss (seed 0) | over its own best |"
    yield "|---|---|---|---|---|"
    notes = []
    for arm in results.by_arm:
        points = seed_0(results, arm)
        if len(points) < 3:
            continue
        least = min(points.values())
        for lr, final in points.items():
            yield f"| {arm} | {lr:.3g} | {lr / results.lr:.2f} | {final:.4f} | {final - least:.4f} |"
        if best := optimum(points):
            notes.append(f"{arm}: {best:.2e} ({best / results.lr:.2f} of AdamW's best point)")
    yield ""
    yield "Lowest point of a parabola through the best rate and its neighbours: " + "; ".join(notes) + "."


def spread(values: list[float], form: str) -> str:
    told = f"{mean(values):{form}}"
    return f"{told} ± {stdev(values):.4f}" if len(values) > 1 else told


def options_table(results: Results, elsewhere: bool) -> Iterator[str]:
    """All arms at AdamW's best learning rate; or, ``elsewhere``, what has several seeds at another one."""
    yield "| arm | learning rate | seeds | final loss | less AdamW's, same seed | from, to | matrices' state | all state |"
    yield "|---|---|---|---|---|---|---|---|"
    for arm, at in results.by_arm.items():
        for lr, seeds in sorted(at.items()):
            rows = [row for _, row in sorted(seeds.items()) if row["final"] is not None]
            if (lr != results.lr) != elsewhere or not rows or (elsewhere and len(seeds) < 2):
                continue
            finals = [row["final"] for row in rows]
            gaps = [results.gap(row) for row in rows if row["config"]["seed"] in results.baseline]
            count = f"{len(rows)}" + (f" of {len(seeds)}, the rest diverged" if len(rows) < len(seeds) else "")
            size = rows[0]["state_bytes"]
            difference = ("0", "") if arm == "AdamW" and not elsewhere else (spread(gaps, "+.4f"), _range(gaps))
            yield (
                f"| {arm} | {lr:.3g} | {count} | {spread(finals, '.4f')} | {difference[0]} | {difference[1]} | "
                f"{size['matrices'] / 1e6:.2f} MB | {size['all'] / 1e6:.2f} MB |"
            )


def int8_table(results: Results) -> Iterator[str]:
    """What narrower weights cost, against bf16 weights of the same optimizer and seed."""
    yield "| arm | seeds | final loss | less bf16's, same seed | from, to | perplexity |"
    yield "|---|---|---|---|---|---|"
    for arm, at in results.by_arm.items():
        base = results.by_arm.get(re.sub(r"dtype bfloat16\b.*", "dtype bfloat16", arm), {}).get(results.lr, {})
        rows = [row for seed, row in sorted(at[results.lr].items()) if seed in base]
        if "dtype bfloat16" not in arm or not rows:
            continue
        gaps = [row["final"] - base[row["config"]["seed"]]["final"] for row in rows]
        itself = rows[0] is base[rows[0]["config"]["seed"]]
        cost = ("0", "", "") if itself else (spread(gaps, "+.4f"), _range(gaps), f"{math.expm1(mean(gaps)):+.2%}")
        yield f"| {arm} | {len(rows)} | {spread([row['final'] for row in rows], '.4f')} | {' | '.join(cost)} |"


def _range(values: list[float]) -> str:
    return f"{min(values):+.4f}, {max(values):+.4f}"


def setting(results: Results) -> str:
    def all_of(values: list[Any]) -> str:
        return ", ".join(dict.fromkeys(str(v) for v in values))

    rows = results.rows
    cpu = [row["median_seconds"]["optimizer_cpu"] * 1e3 for row in rows if row["config"]["optimizer"] == "adamw"]
    ours = [row["median_seconds"]["optimizer_cpu"] * 1e3 for row in rows if row["config"]["optimizer"] != "adamw"]
    step = [row["median_seconds"]["step_cpu"] * 1e3 for row in rows]
    speed = f"A step took {mean(step):.0f} ms of one core's time (median of a run, mean of runs)"
    if cpu and ours:
        speed += f", of which the optimizer {mean(cpu):.0f} ms (AdamW, fused) or {mean(ours):.0f} ms (APOLLO)"
    return (
        f"{len(rows)} runs of {all_of([r['config']['steps'] for r in rows])} steps; {rows[0]['parameters']:,} parameters, "
        f"{rows[0]['parameters_in_matrices']:,} of them in projected matrices. AdamW's best learning rate: {results.lr:.3g}. "
        f"Commit {all_of([r['commit'] for r in rows])}; "
        + all_of([f"{name} {v}" for r in rows for name, v in r["versions"].items()])
        + f"; {all_of([r['machine']['cpu'] for r in rows])}, {all_of([r['machine']['cores'] for r in rows])} cores, "
        f"{all_of([r['machine']['runs_side_by_side'] for r in rows])} runs at a time of one thread each. {speed}."
    )


def tables(results: Results) -> str:
    parts = ["### Learning rates", *lr_table(results), "", f"### Options, at {results.lr:.3g}"]
    parts += ["", *options_table(results, elsewhere=False), "", "### Several seeds at other learning rates", ""]
    parts += [*options_table(results, elsewhere=True), "", "### Int8 weights, against bf16 ones", ""]
    parts += [*int8_table(results), "", setting(results)]
    parts.insert(1, "")
    return "\n".join(parts)


def plot(results: Results, path: Path) -> None:
    """Left: final loss by learning rate. Right: each arm less AdamW, a dot a seed."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update(
        {
            "font.size": 9,
            "svg.hashsalt": "insitu",
            "svg.fonttype": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    from matplotlib import pyplot as plt

    arms = [arm for arm, at in results.by_arm.items() if arm != "AdamW" and len(at[results.lr]) > 1]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.27 * len(arms) + 1.6), width_ratios=[2, 3], layout="constrained"
    )
    styles = iter([("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#56b4e9", "v")])
    for arm in results.by_arm:
        points = seed_0(results, arm)
        if len(points) < 3:
            continue
        colour, marker = next(styles, ("black", "x"))
        left.plot(list(points), list(points.values()), color=colour, marker=marker, markersize=4, label=arm)
    ticks = sorted(seed_0(results, "AdamW"))
    left.set_xscale("log")
    left.set_xticks(ticks, [f"{lr * 1e3:.3g}e-3" for lr in ticks], rotation=45)
    left.minorticks_off()
    left.set(xlabel="learning rate", ylabel="final validation loss, nats a token (seed 0)")
    left.axvline(results.lr, color="0.8", linewidth=1, zorder=0)
    lowest = left.get_ylim()[0]
    left.set_ylim(lowest, min(left.get_ylim()[1], lowest + 0.6))  # the optima, not what diverges
    left.legend(frameon=False, fontsize=8)

    for y, arm in enumerate(reversed(arms)):
        gaps = [results.gap(row) for row in results.by_arm[arm][results.lr].values() if row["final"] is not None]
        right.plot(gaps, [y] * len(gaps), "o", color="#0072b2", markersize=4, alpha=0.6, markeredgewidth=0)
        right.plot([mean(gaps)], [y], "|", color="black", markersize=9)
    right.axvline(0, color="0.6", linewidth=1)
    right.set_yticks(range(len(arms)), list(reversed(arms)))
    right.set(xlabel=f"final loss less AdamW's, same seed, lr {results.lr:.3g}\n(left is better)")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", default=HERE / "results" / "runs.jsonl")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an .svg or .png")
    told = parser.parse_args()
    results = Results([json.loads(line) for line in told.runs.read_text().splitlines()])
    text = tables(results)
    if told.write:
        readme = HERE / "README.md"
        readme.write_text(between(readme.read_text(), MARKS, text, readme))
    else:
        print(text)
    if told.plot:
        plot(results, told.plot)


if __name__ == "__main__":
    main()
