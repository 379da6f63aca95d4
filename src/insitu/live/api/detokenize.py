"""Token ids to text, one token at a time, never half a character.

A token is bytes and a character may be spread over several tokens (an emoji usually is). With a byte-level BPE tokenizer
(GPT-2, Llama 3, Qwen, SmolLM2) the bytes of every id are known beforehand, so an incremental UTF-8 decoder gives exactly what
decoding the whole sequence would. Other tokenizers are asked to decode a short window of ids instead.
"""

import codecs
import copy
import threading
from typing import Any, Protocol


class Decoder(Protocol):
    """Text of a growing sequence of ids."""

    def push(self, id: int) -> str:
        """The characters that are complete now and were not before."""

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD, as in ``tokenizer.decode``."""


class Detokenizer:
    """The texts of one tokenizer. Never changes after construction, so any thread may use it; the tokenizer itself is kept
    out of reach because encoding in another thread would fail it ("Already borrowed")."""

    def __init__(self, tokenizer: Any) -> None:
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1  # its len() is less where ids have holes
        tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        self._special = frozenset(tokenizer.all_special_ids) | {
            id for id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._bytes: list[bytes] | None = None
        if _is_byte_level(tokenizer):
            alphabet = _byte_alphabet()
            self._bytes = [_token_bytes(token, alphabet) for token in tokens]
        else:
            self._holes = frozenset(id for id, token in enumerate(tokens) if token is None)
            self._tokenizer = copy.deepcopy(tokenizer)
            self._lock = threading.Lock()

    def decoder(self, *, show_special: bool = False) -> Decoder:
        """Start a sequence. Special tokens have no text unless ``show_special``."""
        hidden = frozenset[int]() if show_special else self._special
        return _Windows(self, hidden) if self._bytes is None else _Bytes(self, hidden)

    def bytes_of(self, id: int) -> bytes:
        """The bytes of one token alone."""
        if not 0 <= id < self.vocab_size:
            return b""  # the model's vocabulary is often padded beyond the tokenizer's
        if self._bytes is not None:
            return self._bytes[id]
        return self.decode([id], frozenset()).encode()

    def label(self, id: int) -> str:
        """A token's text, or OpenAI's ``bytes:\\\\xf0\\\\x9f`` if its bytes are no whole characters."""
        raw = self.bytes_of(id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def decode(self, ids: list[int], hidden: frozenset[int]) -> str:
        shown = [id for id in ids if id < self.vocab_size and id not in hidden and id not in self._holes]
        with self._lock:
            text: str = self._tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class _Bytes:
    """For byte-level tokenizers: the bytes one after another through an incremental decoder."""

    def __init__(self, texts: Detokenizer, hidden: frozenset[int]) -> None:
        self._texts = texts
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return "" if id in self._hidden else self._utf8.decode(self._texts.bytes_of(id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Windows:
    """For the others: decode from a few tokens back, and give out what a longer window adds. The tokens before the window's
    middle are context only (a leading space depends on them)."""

    _PATIENCE = 8  # a character is at most four bytes, a byte at most a token; beyond that U+FFFD is really meant

    def __init__(self, texts: Detokenizer, hidden: frozenset[int]) -> None:
        self._texts = texts
        self._hidden = hidden
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, id: int) -> str:
        if id in self._hidden:
            return ""
        self._pending.append(id)
        added = self._added()
        if added.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < self._PATIENCE:
            return ""
        if added:
            self._context, self._pending = self._pending, []
        return added

    def flush(self) -> str:
        return self._added() if self._pending else ""

    def _added(self) -> str:
        before = self._texts.decode(self._context, self._hidden)
        return self._texts.decode(self._context + self._pending, self._hidden)[len(before) :]


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible character for each byte, inverted: printable Latin-1 stands for itself, the rest begins at U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in visible]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _token_bytes(token: str | None, alphabet: dict[str, int]) -> bytes:
    if token is None:  # a hole in the vocabulary
        return b""
    try:
        return bytes(alphabet[char] for char in token)
    except KeyError:  # an added token is stored as it is written
        return token.encode()
