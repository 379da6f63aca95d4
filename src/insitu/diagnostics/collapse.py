"""Degenerate text: a model that an update or a long training has wrecked says the same again and again.

For replies of a few dozen tokens, in token ids, two measures, because each is blind where the other sees. ``seq_rep_n`` finds
phrases that come back anywhere but wants several of them before it is large; ``longest_loop`` finds a loop at once, however
short its period, but only where the rounds follow one another. Pure functions of hashable tokens; nothing here is random.

For samples of some hundred tokens, in text, a score of 0 to 100; under 30 the model has collapsed. A model can collapse while
its loss still falls, because what it repeats is likely: so samples are judged, not the loss.

    score = 35 min(1, d_2 / 0.6)^2 + 35 min(1, d_3 / 0.75)^2 + 20 min(1, k / 25) + 10 min(1, c / 40)

over the tokens of the text (:func:`tokens`: words and marks, not the model's own, so that scores of different tokenizers
compare), where d_n = 1 - seq-rep-n is the share of n-grams that are distinct, k the number of distinct known words, c that of
distinct characters. 0.6 and 0.75 are what nineteen of twenty pieces of documents and code have, from 140 to 420 tokens. The
squares are because a loop that has come round R times still has 1 / R of its n-grams distinct, and a sample shows only so many
rounds. Known words count once each: by their share, a loop of one ordinary sentence would begin with 30 points. The weights and
the threshold are those of the ANDREA lessons' coherence gate. So a loop of up to 24 tokens scores under 30 whatever its words
are, and real text of any language passes by its n-grams alone. What the score cannot see: nonsense that does not repeat itself,
and lists that count up.
"""

import re
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass

MAX_PERIOD = 8
_LOOP = 4  # tokens of a loop: "that that" and a doubled newline are no loops

THRESHOLD = 30.0
WINDOW = 420  # tokens judged at once
LEAST = 32  # tokens of a text that can show what it is

# Function words: no topic brings or takes them, and a model that repeats a noun has none. The training text's own vocabulary
# would also know "region", and would have to travel with every checkpoint.
_ENGLISH = (
    "a about after all also an and any are as at be because been before but by can could did do does for from had has have "
    "he her here him his how i if in into is it its just may me more most my no not now of on one only or other our out "
    "over she should so some such than that the their them then there these they this those through to two under up us "
    "was we were what when where which while who will with would you your"
)
ENGLISH = frozenset(_ENGLISH.split())

# A word piece of at most 16 letters or digits (an endless word is a loop too), one letter of a script that puts no spaces
# between words, or a run of marks.
_TOKEN = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]{1,16}|(?:[^\w\s]|_)+")
_AGAIN = re.compile(r"(.)\1+")


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
            if same >= period and same + period >= _LOOP:
                longest = max(longest, same + period)
    return longest


def repetition(ids: Sequence[Hashable]) -> float:
    """How much of the text repeats itself, in [0, 1]: the larger of seq-rep-4 and the share of the longest loop.

    0 where no token comes twice and for fewer than four tokens; 1 for one loop from the first token to the last.
    """
    return max(seq_rep_n(ids, 4), longest_loop(ids) / len(ids)) if ids else 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """Points of each part: ``bigrams`` and ``trigrams`` 0 to 35, ``words`` 0 to 20, ``characters`` 0 to 10. ``tokens`` is how
    many words and marks there were to judge; under 32 the diversity is taken of 32, so a short text scores little."""

    bigrams: float
    trigrams: float
    words: float
    characters: float
    tokens: int

    @property
    def total(self) -> float:
        """0 to 100."""
        return self.bigrams + self.trigrams + self.words + self.characters

    @property
    def note(self) -> str:
        """ "empty", "short", or nothing: whether there was enough to judge."""
        return "" if self.tokens >= LEAST else "short" if self.tokens else "empty"


def tokens(text: str) -> list[str]:
    """Words in lower case and runs of marks; within a run a repeated mark counts once, so that a ruler is one token."""
    return [
        _AGAIN.sub(r"\1", token).casefold() if not token[0].isalnum() else token.casefold()
        for token in _TOKEN.findall(text)
    ]


def score(text: str, known: Set[str] = ENGLISH) -> Score:
    """The parts of the score of ``text``, each the mean over its equal pieces of at most 420 tokens.

    Args:
        text: what a model wrote, without the prompt. A text without a token scores 0.
        known: words in lower case. The default is about a hundred English function words.
    """
    found = tokens(text)
    if not found:
        return Score(0.0, 0.0, 0.0, 0.0, 0)
    num = -(-len(found) // WINDOW)
    pieces = [found[len(found) * i // num : len(found) * (i + 1) // num] for i in range(num)]
    letters = "".join(text.split())
    cut = [letters[len(letters) * i // num : len(letters) * (i + 1) // num] for i in range(num)]
    return Score(
        sum(35 * min(1.0, _diversity(piece, 2) / 0.6) ** 2 for piece in pieces) / num,
        sum(35 * min(1.0, _diversity(piece, 3) / 0.75) ** 2 for piece in pieces) / num,
        sum(20 * min(1.0, len(set(piece) & known) / 25) for piece in pieces) / num,
        sum(10 * min(1.0, len(set(piece)) / 40) for piece in cut) / num,
        len(found),
    )


def _diversity(piece: Sequence[str], n: int) -> float:
    """d_n, as if a short text went on without anything new."""
    grams = max(0, len(piece) - n + 1)
    return (1 - seq_rep_n(piece, n)) * grams / max(grams, LEAST - n + 1)
