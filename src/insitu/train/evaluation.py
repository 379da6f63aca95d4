"""Benchmarks of a trained model, by EleutherAI's lm-evaluation-harness where it is installed."""

from collections.abc import Sequence
from typing import Any


def evaluate(model: Any, tokenizer: Any, tasks: Sequence[str], *, batch_size: int = 8, limit: int | None = None) -> Any:
    """Figures of each of lm-eval's ``tasks``, by name, as its ``results`` has them.

    Call :func:`require` before training, so that nobody trains first and learns then that it is not there.

    Raises:
        ValueError: lm-eval is not installed, or has no such task.
    """
    require(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    told = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=list(tasks), limit=limit
    )
    return told["results"]


def require(tasks: Sequence[str]) -> None:
    """ValueError unless lm-eval is installed and has all of ``tasks``."""
    if not tasks:
        return
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"sft.evaluate={list(tasks)}: lm-eval is not installed (pip install lm-eval)") from error
    if unknown := sorted(set(tasks) - set(TaskManager().all_tasks)):
        raise ValueError(f"sft.evaluate: lm-eval has no task {unknown[0]!r}; lm-eval ls tasks lists them")
