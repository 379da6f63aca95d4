"""Documents of a source, as strings: from files, directories, the Hub, or the sets that ``insitu train get-data`` fetched."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from insitu.data.config import SourceConfig
from insitu.data.messages import DataError

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
ENVIRONMENT = "INSITU_DATA"


def data_directory(directory: str | None) -> Path | None:
    """Where Hub and packaged data sets lie on this machine: what was asked for, else the environment's, else nowhere."""
    named = directory or os.environ.get(ENVIRONMENT)
    if not named:
        return None
    path = Path(named).expanduser()
    if not path.is_dir():
        where = "data.directory" if directory else ENVIRONMENT
        raise DataError(f"{where}={named}: no such directory", "data.directory")
    return path


def locate(source: SourceConfig, directory: str | None = None) -> list[Path] | None:
    """The files a source is read from, in the order they are read; None for one that is streamed from the Hub.

    Raises:
        DataError: nothing there, or nothing readable as text.
    """
    if source.path is not None:
        return _files(Path(source.path).expanduser(), source.name)
    local = data_directory(directory)
    if source.package is not None:
        return _files(_packaged(source, local), source.name)
    if local is None:
        return None
    owner_and_name = str(source.hub)
    places = [local / owner_and_name, local / owner_and_name.rsplit("/", 1)[-1], local / source.name]
    for place in places:
        for candidate in [place, *(place.with_name(place.name + suffix) for suffix in SUFFIXES)]:
            if candidate.exists():
                return _files(candidate, source.name)
    raise DataError(
        f"source {source.name}: {local} has no {owner_and_name}; expected a file or directory at "
        f"{' or '.join(str(place) for place in places)}; without data.directory and {ENVIRONMENT} it is read from the Hub",
        "data.directory",
    )


def _packaged(source: SourceConfig, local: Path | None) -> Path:
    way_out = (
        f"run `insitu train get-data {source.package} --out DIR` and give it as data.directory or in {ENVIRONMENT}"
    )
    if local is None:
        raise DataError(
            f"source {source.name}: {source.package} is packaged data, and no directory is given; {way_out}"
        )
    for directory in (local, local / str(source.package)):
        file = directory / f"{source.name}.jsonl"
        if file.is_file():
            return file
    raise DataError(f"source {source.name}: {local} has no {source.name}.jsonl; {way_out}")


def _files(path: Path, name: str) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"source {name}: {path} has no file that ends in {', '.join(SUFFIXES)}")
        return files
    if not path.exists():
        raise DataError(f"source {name}: {path}: no such file or directory")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"source {name}: {path} is none of {', '.join(SUFFIXES)}")
    return [path]


def fingerprint(source: SourceConfig, files: list[Path] | None) -> str:
    """What the documents of a source depend on, so that tokens made of them can be kept: names, sizes and times of the files,
    or the Hub's name."""
    what: dict[str, Any] = {"column": source.text_column, "documents": source.max_documents}
    if files is None:
        what |= {"hub": source.hub, "subset": source.subset, "split": source.split}
    else:
        stats = [(str(file), file.stat()) for file in files]
        what["files"] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return json.dumps(what, sort_keys=True)


def documents(source: SourceConfig, directory: str | None = None) -> Iterator[str]:
    """Yield each document of a source that has a character other than white space.

    Raises:
        DataError: a missing file, a line that is no JSON object with the text column, bytes that are not UTF-8, a Hub data set
            without ``datasets`` installed, without ``max_documents``, or that cannot be reached.
    """
    files = locate(source, directory)
    texts = _stream(source) if files is None else (text for file in files for text in _read(file, source.text_column))
    return (text for text in islice(texts, source.max_documents) if not text.isspace() and text)


def _read(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open("rb") as raw, gzip.open(raw, "rb") if path.suffix == ".gz" else raw as stream:
            if ".jsonl" in path.suffixes[-2:]:
                yield from _lines(stream, path, column)
            else:
                yield _decode(stream.read(), str(path))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error


def _lines(stream: Iterable[bytes], path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise DataError(f"{where}: not valid JSON: nested too deeply") from None
        yield _text(value, column, where)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}; expected an object with {column!r}")
    if column not in value:
        raise DataError(f"{where}: no {column!r}, only {', '.join(map(repr, value))}; set text_column", "text_column")
    if not isinstance(value[column], str):
        raise DataError(f"{where}: {column!r} is {type(value[column]).__name__}; expected a string", "text_column")
    text: str = value[column]
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a character, as "\\ud800"
            raise DataError(
                f"{where}: {column!r} has half a character ({error.object[error.start]!r}); no text has one"
            ) from None
    return text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None


def check_hub(source: SourceConfig) -> None:
    """What a streamed source needs and can be known before it is reached."""
    if source.max_documents is None:
        raise DataError(
            f"source {source.name}: {source.hub} is streamed from the Hub, perhaps without end; set max_documents",
            "max_documents",
        )
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DataError(
            f"source {source.name}: {source.hub} needs the package datasets: `pip install datasets`, or give a local copy as "
            f"data.directory or in {ENVIRONMENT}"
        ) from None


def _stream(source: SourceConfig) -> Iterator[str]:
    check_hub(source)
    from datasets import load_dataset

    where = f"{source.hub} ({source.split})"
    try:
        rows = iter(load_dataset(source.hub, source.subset, split=source.split, streaming=True))
    except (OSError, ValueError) as error:  # not found, no such subset or split, no connection
        raise DataError(
            f"source {source.name}: {where} cannot be read from the Hub: {error}; a local copy is read if data.directory or "
            f"{ENVIRONMENT} names the directory it is in"
        ) from error
    return (_text(row, source.text_column, where) for row in rows)
