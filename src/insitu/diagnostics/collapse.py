"""Degenerate text, seen in token ids alone: a model that an update has wrecked says the same again and again.

Two measures, because each is blind where the other sees. ``seq_rep_n`` finds phrases that come back anywhere but wants
several of them before it is large; ``longest_loop`` finds a loop at once, however short its period, but only where the rounds
follow one another. Pure functions of hashable tokens; nothing here is random.
"""

from collections.abc import Hashable, Sequence

MAX_PERIOD = 8
_LEAST = 4  # tokens of a loop: "that that" and a doubled newline are no loops


def seq_rep_n(ids: Sequence[Hashable], n: int = 4) -> float:
    """Share of the n-grams that repeat an earlier one, in [0, 1):

        seq-rep-n = 1 - |unique n-grams| / |n-grams|        (Welleck et al. 2019, arXiv 1908.04319, section 6)

    0 for a sequence shorter than n, which has no n-gram. ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}; expected an integer, 1 or more")
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_loop(ids: Sequence[Hashable], max_period: int = MAX_PERIOD) -> int:
    """Length in tokens of the longest stretch that goes round with a period of at most ``max_period``.

    A stretch counts from two whole rounds and four tokens on, so a sequence of fewer than four tokens has none (0).
    ValueError if max_period < 1.
    """
    if max_period < 1:
        raise ValueError(f"max_period={max_period}; expected an integer, 1 or more")
    longest = 0
    for period in range(1, min(max_period, len(ids) // 2) + 1):
        same = 0  # tokens in a row that equal the one a period before
        for i in range(period, len(ids)):
            same = same + 1 if ids[i] == ids[i - period] else 0
            if same >= period and same + period >= _LEAST:
                longest = max(longest, same + period)
    return longest


def repetition(ids: Sequence[Hashable]) -> float:
    """How much of the text repeats itself, in [0, 1]: the larger of seq-rep-4 and the share of the longest loop.

    0 where no token comes twice and for fewer than four tokens; 1 for one loop from the first token to the last.
    """
    return max(seq_rep_n(ids, 4), longest_loop(ids) / len(ids)) if ids else 0.0
