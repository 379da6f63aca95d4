"""Markdown tables of results/*.jsonl, for the README here.

python experiments/first_minute/table.py experiments/first_minute/results/factors.jsonl
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

SHOWN = ("optimizer", "learning_rate", "anchor_weight", "anchors_per_step", "target_loss", "limiter")


def passed(row: dict[str, Any]) -> bool:
    """The targets of insitu.demo, as far as this sweep measures them."""
    return row["held_out"] >= 6 and row["marker"] <= 1 and row["right"] >= 9 and row["fall"] <= 0.3


def spread(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    shown = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in (min(values), max(values))]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"


def main() -> None:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in Path(sys.argv[1]).read_text().splitlines():
        row = json.loads(line)
        groups[(*(row["config"][name] for name in SHOWN), row["behaviour"])].append(row)
    print(
        "| "
        + " | ".join([*SHOWN, "behaviour", "seeds", "pass", "held out /8", "right /12", "marker /12", "fall", "steps"])
        + " |"
    )
    print("|" + "---|" * (len(SHOWN) + 8))
    for key, rows in groups.items():
        figures = [spread(rows, name) for name in ("held_out", "right", "marker", "fall", "steps")]
        told = [*map(str, key), str(len(rows)), str(sum(map(passed, rows))), *figures]
        print("| " + " | ".join(told) + " |")


if __name__ == "__main__":
    main()
