"""Tokens to text in pieces: together always what the tokenizer says of the whole."""

import random
from typing import Any

import pytest
from api_fakes import chat_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from insitu.live.api.detokenize import Detokenizer
from insitu.live.api.generation import StopStrings


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    decoder = detokenizer.decoder()
    return [*(decoder.push(id) for id in ids), decoder.flush()]


def byte_fallback_tokenizer() -> Any:
    """Llama-2 like: words begin with U+2581, unknown characters are spelled in bytes, the first space is dropped."""
    words = ["<unk>", "</s>", "▁hello", "▁world", "hello", "o", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("text", ["hello world", "a😀é中", "<think it>", "👩‍👩‍👧 family", "tab\tnew\n\nline", ""])
def test_pieces_of_real_text_add_up_exactly(text: str) -> None:
    tokenizer = chat_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(Detokenizer(tokenizer), ids)
    assert "".join(found) == text == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


def test_pieces_of_random_tokens_are_what_the_tokenizer_decodes() -> None:
    """Random ids are mostly broken UTF-8: as many replacement characters, in the same places."""
    tokenizer = chat_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(len(tokenizer)) for _ in range(30)]
        assert "".join(pieces(detokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_that_is_not_byte_level_is_asked_for_windows() -> None:
    tokenizer = byte_fallback_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = [2, 3, *(7 + byte for byte in "😀".encode()), 6, 4, 5, 1]
    found = pieces(detokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True) == "hello world😀 helloo"
    assert "😀" in found
    assert detokenizer.bytes_of(7 + 0x41) == b"A"


def test_windows_do_not_wait_for_ever_for_a_broken_character() -> None:
    tokenizer = byte_fallback_tokenizer()
    decoder = Detokenizer(tokenizer).decoder()
    assert any(decoder.push(7 + 0xF0) for _ in range(20))


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    """A model's vocabulary is often padded."""
    for tokenizer in (chat_tokenizer(), byte_fallback_tokenizer()):
        detokenizer = Detokenizer(tokenizer)
        assert pieces(detokenizer, [len(tokenizer) + 5]) == ["", ""]
        assert detokenizer.bytes_of(len(tokenizer) + 5) == b""


def test_stop_strings_do_not_depend_on_how_the_text_is_cut() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        text = "".join(draw.choices("ab", k=12))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        results = set()
        for size in (1, 2, 5, 12):
            matcher = StopStrings(stops)
            out = ""
            for at in range(0, len(text), size):
                out += matcher.push(text[at : at + size])
                if matcher.found:
                    break
            results.add((out + matcher.flush(), matcher.found))
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert len(results) == 1, (text, stops, results)
        ((shown, found),) = results
        assert found == bool(ends)
        assert text.startswith(shown)
        if found:
            assert any(text.startswith(shown + stop) and len(shown + stop) == min(ends) for stop in stops)
        else:
            assert shown == text
