"""The curves of a run, drawn when it ends: loss and learning rate over the steps, and which source the bandit held when."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from insitu.train.journal import NAME, read

log = logging.getLogger("insitu.train")

PLOT = "training.svg"


def draw(output_dir: Path, dataset: Any) -> Path | None:
    """Write ``training.svg`` into ``output_dir``; without matplotlib it is said once, and where the numbers are."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no plot: it needs matplotlib (pip install 'insitu[plots]'); the losses are in %s", output_dir / NAME)
        return None
    rows = read(output_dir / NAME)
    choices = getattr(dataset, "choices", [])
    figure = Figure(figsize=(8, 7 if choices else 4), layout="constrained")
    axes = figure.subplots(2 if choices else 1, 1, sharex=True, squeeze=False)[:, 0]
    steps = [row["step"] for row in rows]
    axes[0].plot(steps, [row["loss"] for row in rows], color="tab:blue", linewidth=0.8)
    axes[0].set(ylabel="training loss (nats per token)", xlabel="" if choices else "step")
    right = axes[0].twinx()
    right.plot(steps, [row["learning_rate"] for row in rows], color="tab:gray", linestyle=":")
    right.set_ylabel("learning rate")
    if choices:
        names = dataset.names
        for first, source, length in choices:
            axes[1].barh(source, length, left=first - 0.5, height=0.8, color=f"C{source % 10}")
        axes[1].set_yticks(range(len(names)), names)
        axes[1].invert_yaxis()
        axes[1].set(xlabel="step", xlim=(0.5, max(steps, default=1) + 0.5), title="source held by the bandit")
    figure.savefig(output_dir / PLOT)
    return output_dir / PLOT
