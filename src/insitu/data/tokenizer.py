"""A byte-level BPE tokenizer trained on the sources themselves."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from insitu.data.config import DataConfig
from insitu.data.durable import directory_made
from insitu.data.messages import DataError
from insitu.data.split import is_validation
from insitu.data.text import documents, fingerprint, locate

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A ``transformers.PreTrainedTokenizerFast`` of byte-level BPE (Sennrich et al. 2016; on bytes as in GPT-2).

    The same texts in the same order give the same tokenizer. Every string of Unicode can be encoded and decoded without loss.
    The end-of-text token is also the first token of a text and the padding: a model is trained from scratch on it.

    Args:
        texts: what the merges are counted in.
        vocab_size: 256 bytes, the end-of-text token, and merges.

    Raises:
        DataError: the texts have too few different pairs for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size={vocab_size}, but the sources' text is enough for {backend.get_vocab_size()} tokens "
            "only; lower it or add text",
            "data.tokenizer.vocab_size",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def training_texts(config: DataConfig, max_bytes: int) -> Iterator[str]:
    """Documents of the training side, one of each source in turn, until ``max_bytes`` of UTF-8 are reached."""
    readers = [documents(source, config.directory) for source in config.sources]
    total = 0
    while readers:
        for reader in [*readers]:
            text = next((text for text in reader if not is_validation(text, config.validation)), None)
            if text is None:
                readers.remove(reader)
                continue
            total += len(text.encode("utf-8", "surrogatepass"))
            yield text
            if total >= max_bytes:
                return


def make_tokenizer(config: DataConfig, cache: Path) -> Any:
    """The tokenizer that ``config.tokenizer`` asks for: loaded, or trained once and kept under ``cache``.

    Raises:
        DataError: ``config.tokenizer`` is None, a source or tokenizer cannot be read, or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    wanted = config.tokenizer
    if wanted is None:
        raise DataError(
            "data.tokenizer is not given, and the model brings none; give path or vocab_size", "data.tokenizer"
        )
    if wanted.path is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(wanted.path)
        except (OSError, ValueError) as error:
            raise DataError(f"data.tokenizer.path={wanted.path}: {error}", "data.tokenizer.path") from error
    else:
        assert wanted.vocab_size is not None
        made_of = [fingerprint(source, locate(source, config.directory)) for source in config.sources]
        key = json.dumps([1, made_of, wanted.vocab_size, wanted.max_bytes, config.validation])
        size = wanted.vocab_size
        directory = directory_made(
            cache / "tokenizer",
            key,
            lambda partial: train_tokenizer(training_texts(config, wanted.max_bytes), size).save_pretrained(partial),
        )
        tokenizer = AutoTokenizer.from_pretrained(directory)
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that documents cannot be packed with."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Transformers makes an empty one for a directory that has a model and no tokenizer.
        raise DataError(f"{tokenizer.name_or_path or 'the tokenizer'} has no tokens but special ones", "data.tokenizer")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no end-of-text token (eos_token), which "
            "must stand between documents; set one in its configuration",
            "data.tokenizer",
        )
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            f"{type(tokenizer).__name__} is not a fast tokenizer (a tokenizer.json); text is read with fast ones only",
            "data.tokenizer",
        )
