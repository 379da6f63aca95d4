"""The validation split: by document, by content, and by nothing else."""

import math

from insitu.data.split import is_validation

TEXTS = [f"document {i} of a list" for i in range(20_000)]


def test_the_share_is_what_was_asked_for() -> None:
    for share in (0.01, 0.1, 0.5):
        count = sum(is_validation(text, share) for text in TEXTS)
        assert abs(count - share * len(TEXTS)) < 4 * math.sqrt(share * (1 - share) * len(TEXTS))
    assert not any(is_validation(text, 0.0) for text in TEXTS)


def test_a_larger_share_keeps_the_smaller_one() -> None:
    small = {text for text in TEXTS if is_validation(text, 0.05)}
    assert small < {text for text in TEXTS if is_validation(text, 0.1)}


def test_copies_are_on_one_side_also_with_other_white_space() -> None:
    for text in TEXTS[:500]:
        assert is_validation(text, 0.5) == is_validation(f"\n{text.replace(' ', '  ')}\r\n", 0.5)


def test_the_side_of_a_document_is_the_same_for_ever() -> None:
    # Written down: on another side it would be validated on after it was trained on.
    assert [is_validation(text, 0.5) for text in TEXTS[:8]] == [True, True, True, True, False, True, False, False]


def test_any_string_has_a_side() -> None:
    assert is_validation("\ud800 alone", 0.5) in (True, False)
    assert is_validation("", 1.0)
