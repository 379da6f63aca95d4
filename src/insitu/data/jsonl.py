"""Examples from a JSON Lines file: one object a line, either a chat or raw token ids.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"context_ids": [1, 2, 3], "continuation_ids": [4, 5]}

Optional on both: ``id`` (a string) and ``freeze_context`` (true or false). Anything else is refused: a misspelt key would
otherwise be training that silently does not happen.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from insitu.data.messages import DataError, check_example

_CHAT = {"messages"}
_RAW = {"context_ids", "continuation_ids"}
_OPTIONAL = {"id": str, "freeze_context": bool}


def read_jsonl(source: str | Path | IO[str] | IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object). Blank lines are skipped; the first broken one raises :class:`DataError` naming file, line
    and field; so does a file without any example."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as stream:
            yield from _read_lines(stream, str(source))
    else:
        yield from _read_lines(source, str(getattr(source, "name", "<stream>")))


def _read_lines(stream: Iterable[str | bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    empty = True
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            yield number, _read_line(line)
        except DataError as error:
            raise DataError(f"{name}:{number}: {error}", error.param) from error.__cause__
        empty = False
    if empty:
        raise DataError(f"{name}: no examples; expected one JSON object per line")


def _read_line(line: str | bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig") if isinstance(line, bytes) else line.removeprefix("\ufeff")
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError("not valid JSON: nested too deeply") from None
    except DataError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(
            f"a JSON {type(value).__name__}; expected an object with messages, or context_ids and continuation_ids"
        )
    _check_keys(value)
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{twice} is given twice; keep one", twice)
    return value


def _check_keys(value: dict[str, Any]) -> None:
    for key in value:
        if key not in _CHAT | _RAW | _OPTIONAL.keys():
            known = ", ".join([*sorted(_CHAT), *sorted(_RAW), *_OPTIONAL])
            raise DataError(f"{key} is not a known key; expected {known}", key)
    for key, kind in _OPTIONAL.items():
        if key in value and not isinstance(value[key], kind):
            raise DataError(f"{key}={value[key]!r}; expected a {kind.__name__}", key)
    if _CHAT & value.keys() and _RAW & value.keys():
        raise DataError("messages and token ids in one example; give one or the other", "messages")
    if "messages" in value:
        check_example(value["messages"])
        return
    for key in sorted(_RAW):
        if key not in value:
            raise DataError(f"{key} is missing; expected messages, or context_ids and continuation_ids", key)
        if not isinstance(value[key], list):
            raise DataError(f"{key} is {type(value[key]).__name__}; expected a list of token ids", key)
