"""Parsed YAML to dataclasses, strictly: no unknown key, no missing one, no wrong type.

A dataclass checks its own values in ``__post_init__`` and raises ValueError with a message that begins with the key.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from tasks.errors import ConfigError

Settings = TypeVar("Settings")


class Misfit(Exception):
    """A value that a schema refuses: the dotted key below the schema, and why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason


def from_plain(schema: type[Settings], values: Any, where: str) -> Settings:
    """Build the dataclass ``schema`` from parsed YAML, refusing unknown and missing keys and wrong types.

    Args:
        schema: a dataclass; nested dataclasses, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` and scalars
            are understood. ``float`` accepts whole numbers; nothing else is converted.
        values: the parsed YAML.
        where: file or key that messages begin with.

    Raises:
        ConfigError: naming the file, the key, what was given and what is allowed.
    """
    try:
        return typing.cast(Settings, convert(schema, values))
    except Misfit as error:
        separator = (": " if where.endswith(".yaml") else ".") if error.key else ""
        raise ConfigError(f"{where}{separator}{error.key}: {error.reason}") from error


def convert(kind: Any, value: Any, key: str = "") -> Any:
    """As :func:`from_plain` for any kind that it understands, raising :class:`Misfit`."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None:
            if type(None) in options:
                return None
        else:
            try:
                return convert(next(o for o in options if o is not type(None)), value, key)
            except Misfit as error:
                if error.key != key:
                    raise
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(convert(typing.get_args(kind)[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping):
            for name in value:
                if not isinstance(name, str):
                    raise Misfit(_below(key, name), f"the key is {name!r} ({type(name).__name__}), write it in quotes")
            return {k: convert(typing.get_args(kind)[1], v, _below(key, k)) for k, v in value.items()}
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return _convert_dataclass(kind, value, key)
    elif kind is float:
        if is_finite(value):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    given = "nothing" if value is None else f"{_short(value)} ({type(value).__name__})"
    raise Misfit(key, f"got {given}, allowed is {_describe(kind)}")


def is_finite(value: Any) -> bool:
    """Tell whether a parsed value is a number that a float can hold; true, NaN and infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _below(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _convert_dataclass(schema: Any, values: Mapping[str, Any], key: str) -> Any:
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    for name in values:
        if name not in fields:
            raise Misfit(_below(key, name), f"unknown key, allowed are {', '.join(fields)}")
    converted = {}
    for name, spec in fields.items():
        if name in values:
            converted[name] = convert(hints[name], values[name], _below(key, name))
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise Misfit(_below(key, name), f"missing, expected {_describe(hints[name])}")
    try:
        return schema(**converted)
    except ValueError as error:  # a schema's own checks begin with the key they speak of
        name, _, reason = str(error).partition(": ")
        raise Misfit(_below(key, name), reason) from error


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping to {_describe(arguments[1])}"
    if dataclasses.is_dataclass(kind):
        return "a mapping with the keys " + ", ".join(f.name for f in dataclasses.fields(kind))
    names = {type(None): "null", str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
