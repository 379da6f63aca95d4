"""The fields of a configuration section: is the key known, does the value fit its type, and the same as a JSON schema."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A configuration that cannot be run. The message says what, where, what was expected, and the way out."""


_PLAIN: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_WORDS = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "a string"}


def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Name and type of each field that ``kind``, a dataclass, is made with."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def check(kind: type[Any], values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """``values`` as arguments of the dataclass ``kind``; whole numbers become floats where a float is meant.

    Raises:
        ConfigError: a key that ``kind`` does not have (the nearest is named), a value of another type, a required key that
            is missing.
    """
    hints = hints_of(kind)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{section}.{key} is unknown{nearest(str(key), list(hints))}")
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if not _fits(value, hints[key]):
            raise ConfigError(f"{section}.{key}={value!r}: expected {_told(hints[key])}")
        numbers = _members(hints[key])
        checked[key] = float(value) if type(value) is int and float in numbers and int not in numbers else value
    for field in dataclasses.fields(kind):
        if field.init and field.name not in values and not _has_default(field):
            raise ConfigError(f"{section}.{field.name} is missing: expected {_told(hints[field.name])}")
    return checked


def nearest(key: str, known: Sequence[str]) -> str:
    """The end of a message that ``key`` is unknown: the nearest name, or all there are."""
    near = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {near[0]}?" if near else f": expected one of {', '.join(known)}"


def schema(kind: type[Any], skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The JSON schema of a dataclass as a section of a configuration file; fields named in ``skip`` are not set in files."""
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(kind):
        if not field.init or field.name in skip:
            continue
        properties[field.name] = _schema_of(hints_of(kind)[field.name])
        if "help" in field.metadata:
            properties[field.name]["description"] = str(field.metadata["help"])
        if not _has_default(field):
            required.append(field.name)
        elif field.default is not dataclasses.MISSING and isinstance(field.default, str | int | float | type(None)):
            default = field.default.value if isinstance(field.default, Enum) else field.default
            properties[field.name]["default"] = default
    made = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**made, "required": required} if required else made


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, member) for member in _members(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value if inner)
    if isinstance(origin, type) and issubclass(origin, Enum):
        return value in [member.value for member in origin]
    if dataclasses.is_dataclass(origin):
        # Its own section checks what is in it.
        return isinstance(value, Mapping)
    return isinstance(value, origin)


def _told(hint: Any) -> str:
    return " or ".join(dict.fromkeys(_told_one(member) for member in _members(hint)))


def _told_one(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return ", ".join(repr(choice) for choice in get_args(hint))
    if origin in _PLAIN:
        return _WORDS.get(_PLAIN[origin], "null")
    if isinstance(origin, type) and issubclass(origin, Enum):
        return "one of " + ", ".join(str(member.value) for member in origin)
    return "a list" if origin in (list, tuple) else "a mapping"


def _schema_of(hint: Any) -> dict[str, Any]:
    found = [_schema_of_one(member) for member in _members(hint)]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _schema_of_one(hint: Any) -> dict[str, Any]:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in _PLAIN:
        return {"type": _PLAIN[origin]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema_of(inner[0]) if inner else {}}
    if isinstance(origin, type) and issubclass(origin, Enum):
        return {"enum": [member.value for member in origin]}
    if dataclasses.is_dataclass(origin) and isinstance(origin, type):
        return schema(origin)
    return {} if origin is Any else {"type": "object"}
