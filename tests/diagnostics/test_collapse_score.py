"""The score of a text: real text far above the threshold, the lesson's collapsed samples below it, each part by its formula."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.diagnostics.collapse import ENGLISH, THRESHOLD, Score, repetition, score, tokens

ROOT = Path(__file__).parents[2]
LENGTH = 420

NOVEL = """
The lamp in the tower had been dark for three nights when Marta climbed the stairs again. She carried a can of oil, two
wicks and her father's knife, and counted the steps aloud because the wind made the whole building hum. Far below, the
boats lay on the sand like sleeping animals. Nobody had gone out since the storm took the pier. At the landing she
stopped, held her breath and listened: somebody was moving above her. "Who is there?" she called. No answer came, only
the slow scrape of a chair across the boards. She thought of running, then of the ships that would pass before morning
and find no light on this coast. So she went on. An old man sat beside the lens with his hat on his knees. He looked
tired rather than dangerous, and his coat was wet to the collar. "I waited for your father," he said. "We served on the
Heron together, forty years ago, when this rock still had a bell." Marta put down the can. Her father had never spoken
about any ship of that name. She asked him what he wanted, and while he talked she filled the lamp, trimmed the wick and
struck a match, for the light could not wait even if the dead themselves came visiting. When the flame stood straight he
smiled and pointed at the window. Out there, beyond the bar, a small white sail had turned toward the land.
"""
GERMAN = """
Am Morgen nach dem Regen standen die Kinder barfuß im Garten und zählten Schnecken. Oma hatte versprochen, dass es für
jede gefundene Schnecke eine Kirsche gibt, doch niemand wusste genau, wie viele Kirschen der Baum in diesem Jahr trug.
Der Nachbar lehnte am Zaun, rauchte seine Pfeife und gab gute Ratschläge, die keiner hören wollte. Unter dem Rhabarber
saßen die größten Tiere, sagte er, und unter dem Brett neben der Regentonne. Paul glaubte ihm nicht, hob aber trotzdem
das Brett an und schrie laut, denn dort lag eine Kröte. Seine Schwester lachte, bis sie Schluckauf bekam. Später trug
man alles in einem Eimer zum Bach hinunter, schüttete die Beute vorsichtig ins hohe Gras und wusch sich die Hände. Die
Kirschen waren sauer, aber das gab am Abend beim Essen niemand zu, und im nächsten Sommer wollte jeder wieder suchen.
"""
CODE = (ROOT / "src/insitu/optim/rounding.py").read_text()


def cut(text: str, length: int = LENGTH) -> list[str]:
    """Pieces of about ``length`` words and marks; a text that is shorter is one piece."""
    words = text.split()
    per = max(1, round(len(words) * length / max(1, len(tokens(text)))))
    pieces = [" ".join(words[i : i + per]) for i in range(0, len(words), per)]
    return [piece for piece in pieces if len(tokens(piece)) > length // 2]


def repeated(text: str) -> str:
    """Extended to 420 tokens."""
    return (text * (1 + LENGTH // len(text.split())))[: 6 * LENGTH]


def quotes() -> str:
    """Runs of one to five quotation marks in no order: the characters differ from word to word, the token does not."""
    chance = random.Random(0)
    return " ".join("'" * chance.randint(1, 5) + ("?" if chance.random() < 0.1 else "") for _ in range(LENGTH))


COLLAPSED = {
    "region": repeated("region "),
    "quotes": quotes(),
    "quotes as quoted": repeated("''''' ''''' '' ''' '' ''' '''?' ''' ' '' '' '"),
    "games": repeated("games, "),
    "Budy": repeated("Budy "),
}
WRITTEN = ["README.md", "CONTRIBUTING.md", "LICENSE", "docs/design/architecture.md"]
WRITTEN += [f"docs/guide/{name}.md" for name in ("optimizers", "trust", "vllm", "memory", "integrations")]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_this_project_has_written_scores_at_least_60(name: str) -> None:
    pieces = cut((ROOT / name).read_text())
    assert pieces
    assert min(score(piece).total for piece in pieces) >= 60


@pytest.mark.parametrize(("kind", "text"), [("novel", NOVEL), ("German", GERMAN), ("code", CODE)])
def test_other_kinds_of_text_score_at_least_60(kind: str, text: str) -> None:
    found = [score(piece) for piece in cut(text)] or [score(text)]
    assert min(one.total for one in found) >= 60
    if kind == "German":  # no English word is needed
        assert found[0].words < 5
        assert found[0].total > 70


@pytest.mark.parametrize("length", [140, 420])
def test_nineteen_of_twenty_pieces_of_documents_and_code_have_all_points_for_their_n_grams(length: int) -> None:
    texts = [ROOT / name for name in WRITTEN] + sorted((ROOT / "src/insitu/optim").glob("*.py"))
    found = [score(piece) for path in texts for piece in cut(path.read_text(), length)]
    assert len(found) > 100
    for part in ("bigrams", "trigrams"):
        assert sum(getattr(one, part) > 34.9 for one in found) >= 0.95 * len(found), part


@pytest.mark.parametrize("name", COLLAPSED)
def test_the_lessons_collapsed_samples_score_under_30(name: str) -> None:
    found = score(COLLAPSED[name])
    assert found.tokens > 200
    assert found.total < THRESHOLD
    assert found.bigrams + found.trigrams < 5


def test_they_are_under_30_even_where_every_word_is_known() -> None:
    """The margin is the characters: a loop of one word has few."""
    for text in COLLAPSED.values():
        assert score(text, known={"region", "games", "budy"}).total < THRESHOLD


SENTENCES = [
    "the quick brown fox jumps over the lazy dog ",
    "I don't know what you are talking about, but I want to go to the ",
    "What is it? It is a question, and you have to answer it now before they do. ",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_loop_of_one_ordinary_sentence_is_seen_by_both_measures(sentence: str) -> None:
    """All its words may be known and all letters in it: they count once."""
    assert score(repeated(sentence)).total < THRESHOLD
    assert repetition(tokens(repeated(sentence))) > 0.8


@given(st.lists(st.sampled_from([*sorted(ENGLISH), "Quixotic", "jazz", "?!", "Ünder"]), min_size=1, max_size=24))
def test_any_loop_of_24_tokens_is_seen_by_both_measures(period: list[str]) -> None:
    """The score over text, and the guard's figure over tokens, say the same of a loop."""
    words = (period * LENGTH)[:LENGTH]
    assert score(" ".join(words)).total < THRESHOLD
    assert repetition(words) > 0.8  # the live guard's limit for a lesson


def test_a_loop_that_has_come_round_a_few_times_only_is_seen() -> None:
    """A sample of 60 words: seven rounds of a sentence of eight, and four of one of fourteen."""
    assert score("the clock in the hall struck nine again " * 7).total < THRESHOLD
    assert score("the old clock in the hall struck nine and nobody was awake to hear " * 4).total < THRESHOLD


def test_both_measures_pass_real_text() -> None:
    for piece in [*cut(NOVEL), *cut((ROOT / "docs/guide/trust.md").read_text())]:
        assert score(piece).total > 60
        assert repetition(tokens(piece)) < 0.3


def test_a_text_that_falls_into_a_loop_loses_points_all_the_way() -> None:
    words = NOVEL.split()
    totals = [
        score(" ".join(words[: len(words) * left // 4] + ["region"] * (LENGTH * (4 - left) // 4))).total
        for left in range(5)
    ]
    assert totals == sorted(totals)
    assert totals[0] < THRESHOLD < 60 < totals[-1]


def test_each_part_by_hand() -> None:
    """32 tokens, so that nothing is short: 8 distinct words, four times in a row."""
    found = score("the cat and dog saw bird near pond " * 4)
    assert found.tokens == 32
    assert found.bigrams == pytest.approx(35 * (8 / 31 / 0.6) ** 2)
    assert found.trigrams == pytest.approx(35 * (8 / 30 / 0.75) ** 2)
    assert found.words == pytest.approx(20 * 2 / 25)  # "the" and "and"
    assert found.characters == pytest.approx(10 * len(set("thecatanddogsawbirdnearpond")) / 40)
    assert found.total == pytest.approx(found.bigrams + found.trigrams + found.words + found.characters)


def test_known_words_can_be_given() -> None:
    text = "der Hund und die Katze " * 8
    assert score(text).words == 0
    assert score(text, known={"der", "und", "die"}).words == pytest.approx(20 * 3 / 25)


@pytest.mark.parametrize(("text", "note"), [("", "empty"), (" \n\t ", "empty"), ("Hello there.", "short"), (NOVEL, "")])
def test_a_text_too_short_to_judge_is_named_and_scores_little(text: str, note: str) -> None:
    found = score(text)
    assert found.note == note
    assert (found.total < THRESHOLD) is bool(note)
    if note == "empty":
        assert found == Score(0.0, 0.0, 0.0, 0.0, 0)


def test_an_endless_word_is_a_loop_and_endless_writing_without_spaces_is_not() -> None:
    assert score("region" * 700).total < THRESHOLD
    assert score("的" * 420).total < THRESHOLD
    chance = random.Random(1)
    written = "".join(chr(0x4E00 + chance.randrange(2000)) for _ in range(LENGTH))
    assert score(written).total > 60
    assert score(written).tokens == LENGTH


def test_a_long_text_scores_as_its_pieces_do() -> None:
    """Distinct n-grams get fewer the longer a text is: a book must not look like a loop."""
    book = " ".join(f"{a} {b}" for a in sorted(ENGLISH) for b in sorted(ENGLISH))
    assert len(tokens(book)) > 20 * LENGTH
    pieces = [" ".join(book.split()[i : i + LENGTH]) for i in range(0, 10 * LENGTH, LENGTH)]
    assert score(book).total == pytest.approx(sum(score(p).total for p in pieces) / len(pieces), rel=0.1)


@given(st.text(max_size=2000))
def test_a_score_is_between_0_and_100_for_any_text(text: str) -> None:
    found = score(text)
    assert 0 <= found.bigrams <= 35
    assert 0 <= found.trigrams <= 35
    assert 0 <= found.words <= 20
    assert 0 <= found.characters <= 10


def test_words_and_marks() -> None:
    assert tokens("Don't stop -- 3.5% |---|:-:|") == ["don", "'", "t", "stop", "-", "3", ".", "5", "%", "|-|:-:|"]
    assert tokens("snake_case") == ["snake", "_", "case"]
    assert tokens("a" * 20) == ["a" * 16, "aaaa"]
