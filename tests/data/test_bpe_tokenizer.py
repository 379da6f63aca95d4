"""The trained tokenizer: deterministic, lossless, loaded by transformers, and not trained on validation text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed import byte_tokenizer, write_source
from transformers import AutoTokenizer

from insitu.data.config import DataConfig
from insitu.data.messages import DataError
from insitu.data.split import is_validation
from insitu.data.tokenizer import END_OF_TEXT, make_tokenizer, train_tokenizer, training_texts
from insitu.data.tokens import read_tokens, tokenizer_key, write_tokens

TEXTS = [f"the cat number {i} sat on the mat, and the dog {i * 7} ran" for i in range(300)]
_TRAINED = train_tokenizer(TEXTS, 300)


def _data(tmp_path: Path, **options: Any) -> DataConfig:
    sources = [
        {"name": name, "path": str(write_source(tmp_path / f"{name}.jsonl", 80, seed))}
        for seed, name in enumerate("ab")
    ]
    return DataConfig(sources=sources, **{"validation": 0.25, "tokenizer": {"vocab_size": 280}, **options})


def test_training_twice_gives_the_same_tokenizer() -> None:
    again = train_tokenizer(iter(TEXTS), 300)
    assert again.backend_tokenizer.to_str() == _TRAINED.backend_tokenizer.to_str()
    assert len(again) == 300


@given(st.text())
def test_any_text_survives(text: str) -> None:
    ids = _TRAINED(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert _TRAINED.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(0 <= token < 300 for token in ids)


def test_frequent_words_became_tokens() -> None:
    assert len(_TRAINED("the cat sat on the mat")["input_ids"]) < 12


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size=5000, but the sources' text is enough for \d+ tokens only"):
        train_tokenizer(["abc abc"], 5000)


def test_a_fault_in_the_text_is_not_swallowed_by_the_trainer() -> None:
    def broken() -> Iterator[str]:
        yield from TEXTS
        raise DataError("line 301")

    with pytest.raises(DataError, match="line 301"):
        train_tokenizer(broken(), 300)


def test_texts_come_from_the_sources_in_turn_and_never_from_validation(tmp_path: Path) -> None:
    data = _data(tmp_path)
    texts = list(training_texts(data, 10**9))
    written = [json.loads(line)["text"] for n in "ab" for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()]
    assert sorted(texts) == sorted(text for text in written if not is_validation(text, 0.25))
    assert 0 < len(texts) < len(written)
    some = list(training_texts(data, 500))
    assert some == texts[: len(some)]
    assert sum(map(len, some[:-1])) < 500 <= sum(map(len, some))
    first = set(written[:80])
    assert [text in first for text in some] == [i % 2 == 0 for i in range(len(some))]


def test_it_is_made_once_and_saved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = _data(tmp_path), tmp_path / "cache"
    made = make_tokenizer(data, cache)
    assert (made.eos_token, made.bos_token, made.pad_token, len(made)) == (END_OF_TEXT, END_OF_TEXT, END_OF_TEXT, 280)
    made.save_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer_key(loaded) == tokenizer_key(made)
    monkeypatch.setattr("insitu.data.tokenizer.train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert tokenizer_key(make_tokenizer(data, cache)) == tokenizer_key(made)
    named = _data(tmp_path, tokenizer={"path": str(tmp_path / "model")})
    assert tokenizer_key(make_tokenizer(named, cache)) == tokenizer_key(made)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        make_tokenizer(_data(tmp_path, tokenizer={"vocab_size": 281}), cache)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer\.path=.*nowhere"):
        make_tokenizer(_data(tmp_path, tokenizer={"path": str(tmp_path / "nowhere")}), tmp_path)
    with pytest.raises(DataError, match=r"data\.tokenizer is not given"):
        make_tokenizer(_data(tmp_path, tokenizer=None), tmp_path)


def test_the_key_of_a_tokenizer_is_its_content() -> None:
    key = tokenizer_key(_TRAINED)
    _TRAINED(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_key(_TRAINED) == key
    assert tokenizer_key(train_tokenizer(TEXTS[:-100], 300)) != key


# Tokens on disk


def _write(texts: list[str], directory: Path, tokenizer: Any = None, share: float = 0.0) -> None:
    directory.mkdir()
    write_tokens(texts, tokenizer or byte_tokenizer(), share, directory)


def test_documents_are_encoded_whole_and_end_in_the_end_of_text(tmp_path: Path) -> None:
    texts = ["ab", "é <end> x", "c" * 3000] * 400  # more than one batch, and longer than any context
    tokenizer = byte_tokenizer()
    _write(texts, tmp_path / "t")
    read = read_tokens(tmp_path / "t", "train")
    starts = [0, *read.ends[:-1].tolist()]
    for text, start, end in zip(texts, starts, read.ends.tolist(), strict=True):
        assert read.ids[end - 1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in read.ids[start : end - 1], "what a text spells is no end"
        assert end - start == len(text.encode()) + 1
    assert tokenizer.decode(read.ids[starts[1] : read.ends[1] - 1].astype("i8")) == "é <end> x"
    assert len(read_tokens(tmp_path / "t", "validation").ids) == 0


def test_a_large_vocabulary_takes_wider_integers(tmp_path: Path) -> None:
    class Large:
        eos_token_id = 70_000

        def __len__(self) -> int:
            return 70_001

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[69_999] for _ in texts]}

    _write(["x"], tmp_path / "t", Large())
    assert read_tokens(tmp_path / "t", "train").ids.tolist() == [69_999, 70_000]
    _write(["x"], tmp_path / "small")
    assert read_tokens(tmp_path / "small", "train").ids.dtype.itemsize == 2


def test_a_cut_file_of_tokens_is_refused(tmp_path: Path) -> None:
    _write(["some text", "more of it"], tmp_path / "t")
    path = tmp_path / "t" / "train.ids"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train.ids has \d+ bytes; expected \d+; delete"):
        read_tokens(tmp_path / "t", "train")


def test_the_digest_follows_the_text(tmp_path: Path) -> None:
    digests = set()
    for name, texts in {"1": ["ab", "c"], "2": ["a", "bc"], "3": ["ab", "d"]}.items():
        _write(texts, tmp_path / name)
        digests.add(read_tokens(tmp_path / name, "train").digest)
    assert len(digests) == 3
