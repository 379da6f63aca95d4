"""Documents from files, directories, the Hub and packaged sets; and what is said where there are none."""

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from insitu.data.config import SourceConfig
from insitu.data.messages import DataError
from insitu.data.text import documents, locate


def _read(path: Path, **options: Any) -> list[str]:
    return list(documents(SourceConfig(name="s", path=str(path), **options)))


def _jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_a_text_file_is_one_document_and_a_line_of_jsonl_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nstill first\n")
    (tmp_path / "b.jsonl").write_bytes(_jsonl("second", " \n", "third é") + b"\n\n")
    assert _read(tmp_path / "a.txt") == ["first\n\nstill first\n"]
    assert _read(tmp_path / "b.jsonl") == ["second", "third é"]


def test_compressed_files_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(_jsonl("second", "third")))
    assert _read(tmp_path / "a.txt.gz") == ["first"]
    assert _read(tmp_path / "b.jsonl.gz") == ["second", "third"]


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "2", "a.txt": "1", "sub/c.txt": "3", "notes.md": "no"}.items():
        (tmp_path / name).write_text(text)
    assert _read(tmp_path) == ["1", "2", "3"]
    assert _read(tmp_path, max_documents=2) == ["1", "2"]


def test_another_column_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    assert _read(tmp_path / "a.jsonl", text_column="body") == ["yes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', r"a\.jsonl:3: no 'text', only 'body'; set text_column"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: a JSON list; expected an object with 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' is int; expected a string"),
        ("a.jsonl", b'{"text": "x\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"text": "x \\ud800"}\n', r"a\.jsonl:1: 'text' has half a character"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON: nested too deeply"),
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8: invalid start byte at byte 3"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(_jsonl("x" * 5000))[:-9], "not a whole gzip file"),
        ("a.csv", b"x", "is none of .txt, .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _read(tmp_path / name)


def test_missing_and_useless_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source s: .*nowhere: no such file or directory"):
        _read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no file that ends in"):
        _read(tmp_path)


# Local copies instead of the Hub


@pytest.mark.parametrize("place", ["owner/corpus.jsonl", "corpus/part.jsonl", "s.jsonl"])
def test_a_local_directory_stands_for_the_hub(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(_jsonl("local"))
    source = SourceConfig(name="s", hub="owner/corpus")
    assert list(documents(source, str(tmp_path))) == ["local"]
    monkeypatch.setenv("INSITU_DATA", str(tmp_path))
    assert list(documents(source)) == ["local"]


def test_a_local_directory_without_the_set_is_an_error_and_not_the_hub(tmp_path: Path) -> None:
    source = SourceConfig(name="s", hub="owner/corpus", max_documents=1)
    with pytest.raises(DataError, match="has no owner/corpus; expected a file or directory at"):
        locate(source, str(tmp_path))
    with pytest.raises(DataError, match=r"data.directory=.*nowhere: no such directory"):
        locate(source, str(tmp_path / "nowhere"))


def test_a_hub_set_is_streamed_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INSITU_DATA", raising=False)
    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return ({"text": f"document {i}"} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = SourceConfig(name="s", hub="allenai/c4", subset="en", split="validation", max_documents=3)
    assert list(documents(source)) == ["document 0", "document 1", "document 2"]
    assert asked == [(("allenai/c4", "en"), {"split": "validation", "streaming": True})]


def test_a_hub_set_needs_an_end_and_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INSITU_DATA", raising=False)
    with pytest.raises(DataError, match="set max_documents"):
        next(documents(SourceConfig(name="s", hub="owner/corpus")))
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(DataError, match="pip install datasets"):
        next(documents(SourceConfig(name="s", hub="owner/corpus", max_documents=1)))


def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INSITU_DATA", raising=False)

    def load_dataset(*names: Any, **options: Any) -> Any:
        raise FileNotFoundError("there is no such set")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"owner/corpus .train. cannot be read from the Hub: there is no such set"):
        next(documents(SourceConfig(name="s", hub="owner/corpus", max_documents=1)))


# Packaged sets


@pytest.mark.parametrize("place", ["wordnet.jsonl", "andrea16/wordnet.jsonl"])
def test_a_packaged_source_is_found_by_its_name(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(_jsonl("> define a"))
    assert list(documents(SourceConfig(name="wordnet", package="andrea16"), str(tmp_path))) == ["> define a"]


def test_a_packaged_source_that_is_not_there_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INSITU_DATA", raising=False)
    source = SourceConfig(name="wordnet", package="andrea16")
    for directory in (None, str(tmp_path)):
        with pytest.raises(DataError, match="run `insitu train get-data andrea16 --out DIR`"):
            locate(source, directory)
