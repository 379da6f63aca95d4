"""The log of a run's samples, one JSON object a line, and its plot.

    {"step": 300, "score": 71.5, "bigrams": 30.1, "trigrams": 32.0, "words": 5.6, "characters": 3.8, "low": 0, "loss": 3.2,
     "samples": [{"prompt": "The", "text": " ...", "score": 71.5, "note": ""}]}

``score`` and its parts are means over the prompts (:func:`insitu.diagnostics.collapse.score`), ``low`` the number of scores
under the threshold in a row, ``loss`` the training loss last logged before (null before the first).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "samples.jsonl"
PLOT = "samples.svg"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, none if there is no file. A last line without its end was cut off by a kill and is left out.

    Raises:
        ValueError: a whole line that is no JSON object with a step and a score.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [_row(line, f"{path}:{number}") for number, line in enumerate(whole.split(b"\n"), 1) if line]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row, durably: what the monitor counts must not be behind a checkpoint that is written after it."""
    with path.open("ab") as out:
        out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Forget the rows after ``step``, from which a run starts again, and a torn last line; returns the rows that stay."""
    rows = [row for row in read(path) if row["step"] <= step]
    if path.exists():
        beside = path.with_name(path.name + ".new")
        beside.unlink(missing_ok=True)
        beside.touch()
        for row in rows:
            append(beside, row)
        beside.replace(path)
    return rows


def plot(rows: Sequence[Mapping[str, Any]], threshold: float, out: Path) -> None:
    """Scores and training loss over the steps, as .svg or .png. ImportError without matplotlib (``insitu[plots]``)."""
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 4), layout="constrained")
    left = figure.subplots()
    left.plot(steps, [row["score"] for row in rows], color="tab:blue", label="score of the samples")
    left.axhline(threshold, color="tab:blue", linestyle=":", label=f"threshold, {threshold:g}")
    left.set(xlabel="step", ylabel="score", ylim=(0, 100))
    losses = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    if losses:
        right = left.twinx()
        right.plot(*zip(*losses, strict=True), color="tab:gray", label="training loss")
        right.set_ylabel("loss (nats per token)")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(out)


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); move the file away to start a new log") from None
    if not isinstance(row, dict) or not {"step", "score", "low"} <= row.keys():
        raise ValueError(f"{where}: expected an object with step, score and low; move the file away to start a new log")
    return row
