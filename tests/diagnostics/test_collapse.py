"""Repetition in token ids: exact examples, and what holds for any sequence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.diagnostics.collapse import longest_loop, repetition, seq_rep_n

IDS = st.lists(st.integers(0, 5), max_size=40)


@pytest.mark.parametrize(
    ("ids", "n", "expected"),
    [
        ("abcd", 1, 0.0),
        ("aabb", 1, 0.5),
        ("aaaa", 1, 0.75),
        ("aaaa", 2, 2 / 3),  # aa aa aa
        ("aaaa", 4, 0.0),  # one 4-gram has nothing to repeat
        ("abcdabcd", 4, 0.2),  # abcd bcda cdab dabc abcd
        ("abcdXabcd", 4, 1 / 6),  # the rounds need not touch
        ("abc", 4, 0.0),
        ("", 1, 0.0),
    ],
)
def test_seq_rep_is_the_share_of_n_grams_seen_before(ids: str, n: int, expected: float) -> None:
    assert seq_rep_n(ids, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ("", 0),
        ("aaa", 0),
        ("aaaa", 4),
        ("xaaaay", 4),
        ("abab", 4),
        ("ababa", 5),  # half a round more
        ("xabaaby", 0),  # a round of aba and two thirds of another: not two whole ones
        ("abcabc", 6),
        ("abcabd", 0),
        ("aabb", 0),  # a doubled token is no loop
        ("abcdefghabcdefgh", 16),
        ("abcdefghiabcdefghi", 0),  # a period of nine
        ("aaaaXbcbcbcbcb", 9),  # the longest of two
    ],
)
def test_the_longest_loop(ids: str, expected: int) -> None:
    assert longest_loop(ids) == expected


def test_the_period_is_bounded_by_the_argument() -> None:
    assert longest_loop("abcabc", 2) == 0
    assert longest_loop("abcdefghiabcdefghi", 9) == 18


@pytest.mark.parametrize("bad", [0, -1])
def test_a_length_below_one_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"n={bad}"):
        seq_rep_n("abc", bad)
    with pytest.raises(ValueError, match=f"max_period={bad}"):
        longest_loop("abc", bad)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ("", 0.0),
        ("aaa", 0.0),
        ("abcdefgh", 0.0),
        ("aaaaaaaa", 1.0),
        ("abcabcab", 1.0),
        ("xyzwabab", 0.5),
        ("abcdefghijkl" * 2, 9 / 21),  # a period of twelve: only the phrases see it
    ],
)
def test_repetition_of_known_texts(ids: str, expected: float) -> None:
    assert repetition(ids) == pytest.approx(expected)


@given(IDS)
def test_repetition_is_a_share(ids: list[int]) -> None:
    assert 0 <= repetition(ids) <= 1
    assert 0 <= longest_loop(ids) <= len(ids)
    assert 0 <= seq_rep_n(ids, 2) < 1


@given(IDS)
def test_only_equality_of_tokens_counts(ids: list[int]) -> None:
    assert repetition([f"token {i * 7 + 1}" for i in ids]) == repetition(ids)


@given(st.lists(st.integers(), unique=True, max_size=60))
def test_where_no_token_comes_twice_nothing_repeats(ids: list[int]) -> None:
    assert repetition(ids) == 0


@given(IDS, st.lists(st.integers(10, 15), min_size=1, max_size=8), st.integers(4, 6))
def test_a_loop_at_the_end_is_found_whatever_came_before(ids: list[int], period: list[int], rounds: int) -> None:
    assert longest_loop(ids + period * rounds) >= len(period) * rounds
    assert repetition(period * rounds) == 1


@given(IDS, st.integers(0, 5))
def test_more_text_never_hides_a_loop(ids: list[int], more: int) -> None:
    assert longest_loop([*ids, more]) >= longest_loop(ids)


@given(IDS, st.integers(1, 5))
def test_longer_phrases_repeat_no_more_often_in_number(ids: list[int], n: int) -> None:
    """A repeated (n+1)-gram contains a repeated n-gram, so there are no more of them."""

    def repeats(n: int) -> float:
        return seq_rep_n(ids, n) * max(0, len(ids) - n + 1)

    assert repeats(n + 1) <= repeats(n) + 1e-9
