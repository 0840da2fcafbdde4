"""Dataclasses from tables of TOML or JSON. A wrong key or value is an error that names it, where it is, and what is
allowed there."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from edgekit.errors import EdgekitError, unknown

TOML_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "an array",
    dict: "a table",
}


def from_table(kind: Any, table: Any, where: str, base: Any = None) -> Any:
    """A dataclass from a table, or `base`, one of them, with what the table changes. Fields may be dataclasses,
    tuples and mappings of such, choices, or X | None."""
    if not isinstance(table, Mapping):
        raise EdgekitError(f"{where} is {table!r}; expected a table")
    hints, known = typing.get_type_hints(kind), {item.name: item for item in dataclasses.fields(kind)}
    for key in table:
        if key not in known:
            raise unknown("key", key, known, where=where)
    for key, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and base is None and key not in table:
            raise EdgekitError(f"{where}: key {key!r} is missing; {kind.__name__} takes {', '.join(known)}")
    values = {key: converted(hints[key], value, f"{where}: {key}") for key, value in table.items()}
    try:
        return kind(**values) if base is None else dataclasses.replace(base, **values)
    except EdgekitError as error:
        raise EdgekitError(f"{where}: {error}") from None


def converted(kind: Any, value: Any, where: str) -> Any:
    """A value of this type: dataclasses from tables, tuples from arrays, floats from whole numbers, all else as it
    is."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return converted(next(item for item in arguments if item is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise unknown(where.rpartition(": ")[2], value, arguments, where=where.rpartition(": ")[0])
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(converted(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: converted(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return from_table(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise EdgekitError(f"{where} = {value!r}; expected {TOML_NAMES.get(origin or kind, 'a table')}")
