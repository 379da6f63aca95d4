"""Earlier lessons as anchors: a few applied examples take part in a job, held to what the model says of them at its start.

Anchors on built-in prompts keep what the model knew before it was ever taught; these keep what it was taught since.
"""

import random
from collections.abc import Callable, Sequence

from insitu.data.chat import Example
from insitu.live.records import Feedback
from insitu.live.store import Store

_TARGETS = 64  # of each replayed example: its reference is a row of the vocabulary for each


def replays(
    store: Store, encode: Callable[[Feedback], Example], lesson: Sequence[Example], count: int, seed: int
) -> list[Example]:
    """``count`` applied examples drawn from all that are in the served weights (fewer if there are fewer), the same for the
    same seed. None that asks what the lesson asks: a correction of an earlier lesson must not be held back by it."""
    if not count:
        return []
    taught = {_context(example) for example in lesson}
    ids = store.applied_ids()
    random.Random(seed).shuffle(ids)  # noqa: S311 - which examples, and nobody gains by knowing
    found: list[Example] = []
    for id in ids:
        item = store.feedback(id)
        assert item is not None, f"feedback {id} is gone"
        example = encode(item)
        if _context(example) not in taught:
            found.append(_cut(example))
        if len(found) == count:
            break
    return found


def _context(example: Example) -> tuple[int, ...]:
    """What comes before the last run of targets: the conversation that the lesson answers."""
    last = len(example.loss_mask) - 1 - example.loss_mask[::-1].index(True)
    start = last
    while example.loss_mask[start - 1]:
        start -= 1
    return tuple(example.input_ids[:start])


def _cut(example: Example) -> Example:
    """With at most so many targets, the first ones; nothing after them matters to a causal model."""
    targets = [i for i, target in enumerate(example.loss_mask) if target][:_TARGETS]
    return Example(example.input_ids[: targets[-1] + 1], example.loss_mask[: targets[-1] + 1])
