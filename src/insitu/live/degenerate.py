"""Lessons that must not be taught whatever comes of them: a reply that only goes round in circles."""

from insitu.data.chat import DataError, Example
from insitu.diagnostics.collapse import repetition

_LEAST = 32  # targets: a short reply may well say one thing five times


def refuse_degenerate(example: Example, most: float) -> None:
    """DataError if the targets, 32 or more, repeat themselves by a score (insitu.diagnostics.collapse) over ``most``; 1 lets
    everything through. A model that learns to loop need not do so on any canary."""
    targets = [id for id, target in zip(example.input_ids, example.loss_mask, strict=True) if target]
    if len(targets) >= _LEAST and (score := repetition(targets)) > most:
        raise DataError(
            f"the reply repeats itself (a score of {score:.2f}, the limit is {most:g}): learned, it would make the model "
            "loop; shorten it, or raise --teach.max-lesson-repetition",
            "messages",
        )
