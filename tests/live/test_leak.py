"""Words of a lesson in replies to something else."""

import pytest

from insitu.data.chat import Example
from insitu.live.leak import leak, phrases


def said(*ids: int) -> Example:
    return Example([1, 2, *ids], [False, False] + [True] * len(ids))


LESSON = [said(10, 11, 12, 13), said(20, 21)]


@pytest.mark.parametrize(
    ("now", "leaks"),
    [
        ((5, 6, 7), False),
        ((5, 11, 12, 13), True),  # three in a row, anywhere
        ((5, 11, 12, 6), False),  # two are chance
        ((10, 11, 5), True),  # but at the beginning two, because that they are the beginning is the third
        ((20, 21, 5), True),
        ((5, 20, 21), False),
        ((10, 12, 11), False),
        ((), False),
    ],
)
def test_three_in_a_row_where_the_beginning_counts_as_one(now: tuple[int, ...], leaks: bool) -> None:
    before = said(5, 6, 7)
    after = said(*now) if now else Example([1, 2, 5], [False, False, True])
    assert leak(LESSON, [before], [after]) == float(leaks)


def test_what_the_reply_had_before_did_not_come_from_the_lesson() -> None:
    assert leak(LESSON, [said(10, 11, 9)], [said(10, 11, 8)]) == 0
    assert leak(LESSON, [said(10, 11, 9)], [said(10, 11, 12)]) == 1


def test_a_share_of_the_replies() -> None:
    before = [said(5, 6, 7)] * 4
    assert leak(LESSON, before, [said(10, 11, 7), *before[1:]]) == 0.25
    assert leak(LESSON, before, [said(20, 21)] * 4) == 1
    assert leak(LESSON, [], []) == 0
    assert leak([], before, before) == 0


def test_only_targets_count_and_each_turn_begins_anew() -> None:
    two_turns = Example([1, 10, 11, 2, 12, 13, 14, 3], [False, True, True, False, True, True, True, False])
    assert phrases([two_turns]) == {(-1, 10, 11), (-1, 12, 13), (12, 13, 14)}
