"""Make dataclasses from tables of TOML or JSON. An error for a wrong key or value names it, its position, and what is
allowed there."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
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


LARGEST_TOML, MOST_DOTS = 1 << 20, 5000  # bytes of a file; dots in it, which separate the parts of keys


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a file. A key of very many parts, and tables in tables in tables, would take the parser's
    memory in the square of their number."""
    with path.open("rb") as stream:
        content = stream.read(LARGEST_TOML + 1)
    if len(content) > LARGEST_TOML or content.count(b".") > MOST_DOTS:
        raise EdgekitError(
            f"{path}: more than {LARGEST_TOML:,} bytes or {MOST_DOTS:,} dots; edgekit reads no larger TOML files"
        )
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise EdgekitError(f"{path}: not valid TOML: {error}") from None


def from_table(wanted: Any, table: Any, where: str, base: Any = None) -> Any:
    """Return a dataclass from a table, or a copy of `base` with the values of the table. Fields may be dataclasses,
    tuples and mappings of dataclasses, choices, or X | None."""
    if not isinstance(table, Mapping):
        raise EdgekitError(f"{where} is {table!r}; expected a table")
    hints, known = typing.get_type_hints(wanted), {item.name: item for item in dataclasses.fields(wanted)}
    for key in table:
        if key not in known:
            raise unknown("key", key, known, where=where)
    for key, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and base is None and key not in table:
            raise EdgekitError(f"{where}: key {key!r} is missing; {wanted.__name__} takes {', '.join(known)}")
    values = {key: converted(hints[key], value, f"{where}: {key}") for key, value in table.items()}
    try:
        return wanted(**values) if base is None else dataclasses.replace(base, **values)
    except EdgekitError as error:
        raise EdgekitError(f"{where}: {error}") from None


def converted(wanted: Any, value: Any, where: str) -> Any:
    """Return the value as this type: tables become dataclasses, arrays become tuples, and whole numbers become
    floats."""
    if wanted is Any:
        return value
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
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
    if dataclasses.is_dataclass(wanted) and isinstance(value, Mapping):
        return from_table(wanted, value, where)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(wanted, type) and type(value) is wanted:
        return value
    raise EdgekitError(f"{where} = {value!r}; expected {TOML_NAMES.get(origin or wanted, 'a table')}")
