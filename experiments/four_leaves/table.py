"""The tables and the plot of the README, from results/runs.jsonl.

python experiments/four_leaves/table.py            # prints the tables
python experiments/four_leaves/table.py --write    # puts them into README.md, between the marks
python experiments/four_leaves/table.py --plot experiments/four_leaves/scores.svg    # needs insitu[plots]
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
from marks import between, commit  # noqa: E402

THRESHOLD = 30
MARKS = ("<!-- tables: made by table.py -->", "<!-- end of tables -->")


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several seeds, the lowest and highest."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| run | seeds | steps | final loss | validation loss | lowest score | stopped | bytes of state |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        validation = [row["validation_loss"] for row in mine if row["validation_loss"] is not None]
        stopped = [row["steps"] for row in mine if row["steps"] < row["asked"]]
        cells = [
            name,
            str(len(mine)),
            spread([row["steps"] for row in mine], 0),
            spread([row["final_loss"] for row in mine], 3),
            spread(validation, 3) if validation else "",
            spread([row["lowest_score"] for row in mine], 0),
            f"{len(stopped)} of {len(mine)}" + (f", at {', '.join(map(str, stopped))}" if stopped else ""),
            spread([row["state_bytes"] for row in mine], 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def setting(rows: list[dict[str, Any]]) -> str:
    """Where the rows come from."""
    found = [row["environment"] for row in rows]
    told = [
        *dict.fromkeys(f"commit {commit(one['commit'])}" for one in found),
        *dict.fromkeys(f"{name} {version}" for one in found for name, version in one["versions"].items()),
        *dict.fromkeys(f"{one['hardware']['cores']} cores of {one['hardware']['cpu']}" for one in found),
    ]
    return f"{len(rows)} runs on one or two threads, most beside another: {', '.join(told)}."


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Scores over the steps of v1, v2 and the forced collapse; of the last, the loss too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in (("v1", "tab:red"), ("v2", "tab:blue")):
        for row in (row for row in rows if row["name"] == name):
            steps, scores, _ = zip(*row["scores"], strict=True)
            left.plot(steps, scores, color=colour, alpha=0.7, label=name if row["seed"] == 0 else None)
    left.set(title="the two recipes", xlabel="step", ylabel="score of the samples", ylim=(0, 102))
    loss = right.twinx()
    for row in (row for row in rows if row["name"] == "forced collapse"):
        steps, scores, losses = zip(*row["scores"], strict=True)
        right.plot(steps, scores, color="tab:blue", alpha=0.7)
        loss.plot(steps, losses, color="tab:gray", alpha=0.7)
    right.set(title="one sentence, repeated", xlabel="step", ylim=(0, 102))
    loss.set_ylabel("training loss, gray (nats per token)")
    for axes in (left, right):
        axes.axhline(THRESHOLD, color="black", linestyle=":")
    left.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "runs.jsonl")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an .svg or .png")
    told = parser.parse_args()
    rows = [json.loads(line) for line in told.rows.read_text().splitlines()]
    stages = dict.fromkeys(row["stage"] for row in rows)
    text = "\n\n".join(f"### {stage}\n\n{table([row for row in rows if row['stage'] == stage])}" for stage in stages)
    text += f"\n\n{setting(rows)}"
    if told.write:
        readme = HERE / "README.md"
        readme.write_text(between(readme.read_text(), MARKS, text, readme))
    else:
        print(text)
    if told.plot:
        plot(rows, told.plot)


if __name__ == "__main__":
    main()
