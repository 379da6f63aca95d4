import io
from pathlib import Path
from typing import Any

import pytest

from insitu.data.jsonl import read_jsonl
from insitu.data.messages import DataError

CHAT = '{"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]}'
RAW = '{"context_ids": [1, 2], "continuation_ids": [3], "id": "a", "freeze_context": true}'


def test_lines_come_with_their_numbers_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{CHAT}\n\n  \r\n{RAW}".encode())  # BOM, blank lines, no newline at the end
    expected = [
        (1, {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]}),
        (4, {"context_ids": [1, 2], "continuation_ids": [3], "id": "a", "freeze_context": True}),
    ]
    assert list(read_jsonl(path)) == expected
    assert list(read_jsonl(str(path))) == expected
    with path.open() as text, path.open("rb") as binary:
        assert list(read_jsonl(text)) == list(read_jsonl(binary)) == expected


def test_a_line_separator_inside_a_string_does_not_end_the_line() -> None:
    stream = io.BytesIO(CHAT.replace("Yes.", "Yes.\u2028No.").encode())
    assert [number for number, _ in read_jsonl(stream)] == [1]


@pytest.mark.parametrize(
    ("line", "param", "says"),
    [
        (b'{"messages": [', None, "not valid JSON: Expecting value at column 15"),
        (b"\xff", None, "not UTF-8"),
        (b"[" * 100_000, None, "nested too deeply"),
        (b'{"id": ' + b"1" * 5000 + b"}", None, "not valid JSON"),
        (b"[1]", None, "a JSON list; expected an object"),
        (b"null", None, "a JSON NoneType"),
        (b"{}", "context_ids", "context_ids is missing; expected messages, or"),
        (b'{"context_ids": [1]}', "continuation_ids", "continuation_ids is missing"),
        (b'{"context_ids": [1], "continuation_ids": "2"}', "continuation_ids", "str; expected a list"),
        (RAW.replace("{", '{"mesages": [], ').encode(), "mesages", "mesages is not a known key; expected messages, "),
        (RAW.replace("{", '{"messages": [], ').encode(), "messages", "give one or the other"),
        (RAW.replace("true", "1").encode(), "freeze_context", "=1; expected a bool"),
        (RAW.replace('"a"', "7").encode(), "id", "=7; expected a str"),
        (b'{"messages": [], "messages": []}', "messages", "given twice"),
        (CHAT.replace("assistant", "boss").encode(), "messages[1].role", "'boss' is unknown"),
        (CHAT.replace("assistant", "user").encode(), "messages", "no assistant turn"),
        (CHAT.replace("Hm?", "\\ud83d").encode(), "messages[0].content", "Unicode"),
    ],
)
def test_a_broken_line_is_named_with_file_line_and_field(line: bytes, param: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(f"{CHAT}\n".encode() + line)
    examples = read_jsonl(path)
    assert next(examples)[0] == 1
    with pytest.raises(DataError) as caught:
        next(examples)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert says in str(caught.value)
    assert caught.value.param == param


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no examples"):
        list(read_jsonl(path))
    with pytest.raises(DataError, match=r"<stream>: no examples"):
        list(read_jsonl(io.StringIO("")))


def test_reading_needs_neither_torch_nor_transformers(run_python: Any) -> None:
    code = "import sys, insitu.data.jsonl; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    run_python(code)
