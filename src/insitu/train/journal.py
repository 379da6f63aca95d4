"""The loss of every optimizer step, one JSON object a line, exact: ``{"step": 7, "loss": 5.25, "learning_rate": 0.001}``.

Trainer's own log has means over ``logging_steps``. A resumed run drops the rows behind its checkpoint and writes them again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

NAME = "losses.jsonl"


class Journal:
    """The file of a run, on the process that writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def rewind(self, step: int) -> None:
        """Keep the rows up to ``step`` and go on behind them."""
        self.close()
        kept = [row for row in read(self.path) if row["step"] <= step]
        beside = self.path.with_name(self.path.name + ".new")
        with beside.open("wb") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        self._file = self.path.open("ab")

    def append(self, step: int, loss: float, learning_rate: float) -> None:
        assert self._file is not None
        row = {"step": step, "loss": loss, "learning_rate": learning_rate}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """To disk, before a checkpoint that stands for these rows is."""
        assert self._file is not None
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


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
