"""Is there room for the checkpoints of a run: estimated before its first step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from insitu.train.fields import ConfigError


def checkpoint_bytes(model: Any, optimizer: Any) -> tuple[int, int]:
    """Bytes of the weights, and of the optimizer's state after its first step, from the shapes.

    Of this package's optimizers the state is known; of others two moments in each parameter's type are assumed.
    """
    from insitu.diagnostics.memory import of_optimizer
    from insitu.optim.base import TensorWise

    weights = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    if isinstance(optimizer, TensorWise):
        return weights, of_optimizer(model, optimizer, type(optimizer).__name__).state_bytes
    return weights, 2 * sum(p.nbytes for group in optimizer.param_groups for p in group["params"])


def check_room(output_dir: Path, weights: int, state: int, args: Any, max_steps: int, step: int, kept: int) -> None:
    """Refuse a run whose checkpoints and final weights do not fit.

    Args:
        output_dir: exists.
        weights, state: :func:`checkpoint_bytes`.
        args: the TrainingArguments.
        max_steps, step: where the run ends and where it begins.
        kept: checkpoints that are in the directory already.

    Raises:
        ConfigError: with what is needed and what is free.
    """
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    each = weights + state
    count = 0
    if strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else max(1, round(args.save_steps * max_steps))
        count = int((max_steps - step) // every) + 1  # the last step is saved too
    elif strategy != "no":
        count = max(1, int(args.num_train_epochs))
    if args.save_total_limit:
        # A new one is written whole before an old one goes.
        count = min(count, max(1, args.save_total_limit + 1 - kept))
    needed, free = count * each + weights, shutil.disk_usage(output_dir).free
    if needed > free:
        raise ConfigError(
            f"training.output_dir={output_dir} has {_told(free)} free and the run needs {_told(needed)}: {count} checkpoints "
            f"of {_told(each)}, and the final weights; set training.save_total_limit, save less often, or make room"
        )


def _told(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
