"""A reply that only goes round in circles is no lesson."""

import pytest

from insitu.data.chat import DataError, Example
from insitu.live.config import TeachConfig
from insitu.live.degenerate import refuse_degenerate

MOST = TeachConfig().max_lesson_repetition


def reply(*targets: int) -> Example:
    """After a context that is itself one loop, which is nobody's fault."""
    return Example([7] * 50 + list(targets), [False] * 50 + [True] * len(targets))


@pytest.mark.parametrize("targets", [[5] * 100, [5, 6, 7] * 20, [5] * 32, [1, 2, 3, *[5] * 97]])
def test_a_long_loop_is_refused_with_its_score(targets: list[int]) -> None:
    with pytest.raises(DataError, match=r"repeats itself \(a score of \d\.\d\d, the limit is 0\.8\)") as refused:
        refuse_degenerate(reply(*targets), MOST)
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "targets",
    [
        [5] * 31,  # short: "ha" five times is a reply
        list(range(100)),
        [token for i in range(20) for token in (1, 2, 3, 100 + i)],  # lines that begin alike
        [*range(60), *[5] * 40],  # a loop of two fifths
    ],
)
def test_ordinary_repetition_is_not(targets: list[int]) -> None:
    refuse_degenerate(reply(*targets), MOST)


def test_a_limit_of_one_lets_everything_through() -> None:
    refuse_degenerate(reply(*[5] * 100), 1.0)
