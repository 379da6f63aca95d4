"""Small sources made on the spot: as tokens in memory, and as files."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from insitu.data.config import DataConfig
from insitu.data.tokens import Tokens


def tokens(documents: list[list[int]]) -> Tokens:
    """Documents of token ids, each with its end in it."""
    ids = np.array([token for document in documents for token in document], dtype="<u2")
    ends = np.cumsum([len(document) for document in documents]).astype("<i8")
    return Tokens(ids, ends, hashlib.sha256(ids.tobytes() + ends.tobytes()).hexdigest())


def numbered(source: int, num_documents: int, length: int) -> Tokens:
    """Every token says whose it is: source * 1000 + a running number; each document ends in 0."""
    number, documents = 0, []
    for _ in range(num_documents):
        documents.append([source * 1000 + number + i for i in range(length - 1)] + [0])
        number += length - 1
    return tokens(documents)


def config(names: str, **options: Any) -> DataConfig:
    """One source for each letter of ``names``; options that are dicts are by source, the others the config's."""
    per_source = {key: value for key, value in options.items() if isinstance(value, dict)}
    rest = {key: value for key, value in options.items() if not isinstance(value, dict)}
    sources = [
        {"name": name, "path": "unused"} | {key: value[name] for key, value in per_source.items() if name in value}
        for name in names
    ]
    return DataConfig(sources=sources, **rest)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and an end-of-text token: its ids can be worked out by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={letter: i + 1 for i, letter in enumerate(alphabet)} | {"<end>": 0}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def write_source(path: Path, num_documents: int, seed: int, words: str = "red green blue one two three") -> Path:
    rng, choices = random.Random(seed), words.split()
    lines = [
        json.dumps({"text": " ".join(rng.choices(choices, k=rng.randint(4, 30))) + f" {i}"})
        for i in range(num_documents)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
