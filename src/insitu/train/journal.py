"""The loss of every optimizer step, one JSON object a line, exact: ``{"step": 7, "loss": 5.25, "learning_rate": 0.001}``.

Trainer's own log has means over ``logging_steps``. A resumed run drops the rows behind its checkpoint and writes them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from insitu.data.durable import write_text

NAME = "losses.jsonl"


def rewind(path: Path, step: int) -> None:
    """Keep the rows up to ``step``, behind which a run goes on."""
    kept = [row for row in read(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def append(path: Path, step: int, loss: float, learning_rate: float) -> None:
    """Add the row of a step; it is on disk once the file is synced, which is before a checkpoint stands for it."""
    row = {"step": step, "loss": loss, "learning_rate": learning_rate}
    with path.open("ab") as file:
        file.write(json.dumps(row).encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows, none if there is no file; a last line that a kill cut off is left out.

    Raises:
        ValueError: a whole line that is not such a row.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), "loss": row["loss"], "learning_rate": row["learning_rate"]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is no row of step, loss and learning_rate ({error}); move the file away"
            ) from error
    return rows
