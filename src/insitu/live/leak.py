"""A lesson that comes back where it was not asked for: replies to unrelated prompts that begin to use its words.

The divergence of a reply hardly shows it: one first token decides that a reply begins "I cannot tell", and eleven tokens of the
old reply that follow it are as likely as before. So the words themselves are compared.
"""

from collections.abc import Iterable, Sequence

from insitu.data.chat import Example

_LENGTH = 3  # tokens in a row; the beginning of a reply counts as one
_BEGINNING = -1

Phrase = tuple[int, ...]


def phrases(examples: Iterable[Example]) -> set[Phrase]:
    """Every three tokens in a row of the examples' targets."""
    found: set[Phrase] = set()
    for example in examples:
        run = [_BEGINNING]
        for id, target in zip([*example.input_ids, 0], [*example.loss_mask, False], strict=True):
            if target:
                run.append(id)
            else:
                found.update(tuple(run[i : i + _LENGTH]) for i in range(len(run) - _LENGTH + 1))
                run = [_BEGINNING]
    return found


def leak(lesson: Iterable[Example], before: Sequence[Example], after: Sequence[Example]) -> float:
    """The share, in [0, 1], of replies with three tokens in a row of a reply of the lesson, which they had not before.

    ``before`` and ``after`` are the model's replies to the same prompts. Pure; 0 where there is none.
    """
    taught = phrases(lesson)
    came = [not taught.isdisjoint(phrases([new]) - phrases([old])) for old, new in zip(before, after, strict=True)]
    return sum(came) / len(came) if came else 0.0
