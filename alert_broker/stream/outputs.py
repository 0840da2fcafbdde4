"""Rows of the result as messages: Avro in Confluent wire format with a schema of our own, or a line of JSON.

The Avro schema follows from the Arrow one: a field for each column, a union with null where the column may be null,
which is everywhere in results. Names that Avro does not allow, `p_SLSN-I`, get underscores; the column's own name stays
beside them as the attribute `column`. Rows are written by one compiled loop over Arrow's columns, as `avro.walk` reads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

from alert_broker.containers import WIRE_HEADER
from edgekit.errors import EdgekitError, unknown

Format = Literal["avro", "json"]
FORMATS: tuple[Format, ...] = ("avro", "json")
RECORD, NAMESPACE = "classification", "edgekit"
# Arrow type to Avro's, and how the loop writes it: a zigzag number, 4 or 8 bytes as they are, a byte, sized bytes.
NUMBER, FOUR, EIGHT, BYTE, SIZED = range(5)
TYPES: tuple[tuple[Callable[[pa.DataType], bool], str, int], ...] = (
    (pa.types.is_boolean, "boolean", BYTE),
    (pa.types.is_int8, "int", NUMBER),
    (pa.types.is_int16, "int", NUMBER),
    (pa.types.is_int32, "int", NUMBER),
    (pa.types.is_int64, "long", NUMBER),
    (pa.types.is_float32, "float", FOUR),
    (pa.types.is_float64, "double", EIGHT),
    (pa.types.is_string, "string", SIZED),
    (pa.types.is_large_string, "string", SIZED),
    (pa.types.is_binary, "bytes", SIZED),
    (pa.types.is_large_binary, "bytes", SIZED),
)
MOST_BYTES = {NUMBER: 10, FOUR: 4, EIGHT: 8, BYTE: 1, SIZED: 10}  # without the content of what has a size
NEEDS_ESCAPE = r'["\\\x00-\x1f]'  # RFC 8259, section 7

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(Protocol):
    """Where schemas are known by number; see `registry.open_registry`."""

    def schema(self, identifier: int) -> str: ...

    def register(self, subject: str, schema: str) -> int: ...


class Encoder(Protocol):
    """Rows to messages, one for each, in order; the rows have the schema that the encoder was made for."""

    schema: pa.Schema

    def encode(self, rows: pa.RecordBatch) -> list[bytes]: ...


def encoder(
    format: Format, schema: pa.Schema, registry: Registry | None = None, subject: str = "edgekit-classification-value"
) -> Encoder:
    """The encoder of a format; Avro's schema is registered under the subject, now.

    Without a registry the schema's id is its fingerprint (`fingerprint`), so that two schemas still have two ids.
    """
    if format == "json":
        return JsonEncoder(schema)
    if format == "avro":
        text = avro_schema(schema)
        return AvroEncoder(schema, registry.register(subject, text) if registry else fingerprint(text))
    raise unknown("format", format, FORMATS, where="an output")


def avro_name(column: str) -> str:
    """The name of a column in Avro (specification 1.12, "Names"), and in filters."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", column)
    return name if re.match(r"[A-Za-z_]", name) else f"_{name}"


def avro_schema(schema: pa.Schema) -> str:
    """The Avro schema of rows, as JSON; EdgekitError for a column of a type that has none, or names that collide."""
    fields = []
    taken: dict[str, str] = {}
    for item in schema:
        name = avro_name(item.name)
        if name in taken:
            raise EdgekitError(f"the columns {taken[name]!r} and {item.name!r} are both {name!r} in Avro; rename one")
        taken[name] = item.name
        avro_type = _type(item)[0]
        field: dict[str, Any] = {"name": name, "type": ["null", avro_type] if item.nullable else avro_type}
        if item.nullable:
            field["default"] = None
        if name != item.name:
            field["column"] = item.name
        fields.append(field)
    return json.dumps({"type": "record", "name": RECORD, "namespace": NAMESPACE, "fields": fields})


def fingerprint(schema: str) -> int:
    """A positive 31-bit number that the text determines."""
    return int.from_bytes(hashlib.sha256(schema.encode()).digest()[:4], "big") >> 1


class AvroEncoder:
    """Confluent wire format: a zero byte, the schema's id, the datum."""

    def __init__(self, schema: pa.Schema, identifier: int) -> None:
        self.schema, self.identifier = schema, identifier
        self._header = np.frombuffer(WIRE_HEADER.pack(0, identifier), np.uint8)
        self._encodings = np.array([_type(item)[1] for item in schema], np.int64)
        self._optional = np.array([item.nullable for item in schema], np.uint8)
        self._fixed = len(self._header) + sum(1 + MOST_BYTES[int(encoding)] for encoding in self._encodings)

    def encode(self, rows: pa.RecordBatch) -> list[bytes]:
        _check(rows, self.schema)
        count = rows.num_rows
        cells, sizes = (
            np.zeros((len(self._encodings), count), np.int64),
            np.zeros((len(self._encodings), count), np.int64),
        )
        valid = np.ones((len(self._encodings), count), np.uint8)
        texts, used = [], 0
        for k, (column, encoding) in enumerate(zip(rows.columns, self._encodings.tolist(), strict=True)):
            if column.null_count:
                valid[k] = column.is_valid().to_numpy(zero_copy_only=False)
            if encoding == SIZED:
                ends, text = _content(column)
                cells[k], sizes[k] = ends[:-1] + used, np.diff(ends)
                texts.append(text)
                used += len(text)
            else:
                cells[k] = _bits(column)
        out = np.empty(self._fixed * count + int((sizes * valid).sum()), np.uint8)
        ends = np.empty(count, np.int64)
        _write(
            self._header,
            self._encodings,
            self._optional,
            cells,
            sizes,
            valid,
            np.concatenate([*texts, np.empty(0, np.uint8)]),
            out,
            ends,
        )
        data = out[: ends[-1] if count else 0].tobytes()
        return [data[start:end] for start, end in pairwise([0, *ends.tolist()])]


class JsonEncoder:
    """An object with the columns' own names, UTF-8, without newlines. JSON has no NaN, no infinity and no bytes: the
    former are null, and bytes are base64 (RFC 4648)."""

    def __init__(self, schema: pa.Schema) -> None:
        for item in schema:
            _type(item)  # raises for what outputs do not have
        self.schema = schema
        names = [json.dumps(item.name, ensure_ascii=False) for item in schema]
        self._before = [f"{',' if k else '{'}{name}:" for k, name in enumerate(names)]

    def encode(self, rows: pa.RecordBatch) -> list[bytes]:
        _check(rows, self.schema)
        parts: list[Any] = []
        for before, column in zip(self._before, rows.columns, strict=True):
            parts += [before, _json(column)]
        if not parts:
            return [b"{}"] * rows.num_rows
        return [text.encode() for text in pc.binary_join_element_wise(*parts, "}", "").to_pylist()]


def _type(item: pa.Field) -> tuple[str, int]:
    """The Avro type of a column and how it is written."""
    for matches, name, encoding in TYPES:
        if matches(item.type):
            return name, encoding
    raise EdgekitError(
        f"the column {item.name!r} is of type {item.type}; outputs have booleans, integers of up to 64 bits, floats, "
        "strings and bytes"
    )


def _check(rows: pa.RecordBatch, schema: pa.Schema) -> None:
    """Raise unless the rows are of the schema, and without null where it allows none."""
    if not rows.schema.equals(schema):
        raise EdgekitError(
            f"rows with the columns {rows.schema.names} for an encoder of {schema.names}, or other types"
        )
    for item, column in zip(schema, rows.columns, strict=True):
        if column.null_count and not item.nullable:
            raise EdgekitError(f"the column {item.name!r} has a null, which its schema does not allow")


def _bits(column: pa.Array) -> Integers:
    """(rows,) the values as 64 bits: numbers, or the bits of a float."""
    dtype = column.type
    if pa.types.is_boolean(dtype):
        return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False).astype(np.int64))
    values = pc.fill_null(column, 0) if column.null_count else column
    array = values.to_numpy(zero_copy_only=False)
    if pa.types.is_floating(dtype):
        return np.asarray(array.view(np.int32 if pa.types.is_float32(dtype) else np.int64).astype(np.int64))
    return np.asarray(array.astype(np.int64))


def _content(column: pa.Array) -> tuple[Integers, Bytes]:
    """(rows + 1,) where each string begins and ends in the bytes that follow, without what a slice leaves out."""
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    width = np.int64 if large else np.int32
    _, offsets, data = column.buffers()
    if offsets is None or len(column) == 0:
        return np.zeros(len(column) + 1, np.int64), np.empty(0, np.uint8)
    ends = np.frombuffer(offsets, width)[column.offset :][: len(column) + 1].astype(np.int64)
    text = np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
    return ends - ends[0], text[ends[0] : ends[-1]]


def _json(column: pa.Array) -> pa.Array:
    """(rows,) strings: the JSON of each value."""
    dtype = column.type
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype):
        column = column.cast(pa.string())
        plain = pc.binary_join_element_wise('"', column, '"', "")
        special = pc.fill_null(pc.match_substring_regex(column, NEEDS_ESCAPE), False)
        if pc.any(special).as_py():
            escaped = [json.dumps(text, ensure_ascii=False) for text in column.filter(special).to_pylist()]
            plain = pc.replace_with_mask(plain, special, pa.array(escaped, pa.string()))
        return pc.fill_null(plain, "null")
    if pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype):
        data = (None if item is None else f'"{base64.b64encode(item).decode()}"' for item in column.to_pylist())
        return pc.fill_null(pa.array(data, pa.string()), "null")
    if pa.types.is_floating(dtype):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, dtype))
    return pc.fill_null(column.cast(pa.string()), "null")


def _compiled(function: Function) -> Function:
    return cast(Function, njit(cache=True, nogil=True)(function))


@_compiled
def _put_number(out: Bytes, at: int, value: int) -> int:
    """A zigzag number of variable length; the byte after it."""
    rest = np.uint64(value << 1) ^ np.uint64(value >> 63)
    while rest > 0x7F:
        out[at] = np.uint8(rest & np.uint64(0x7F)) | 0x80
        rest >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(rest)
    return at + 1


@_compiled
def _write(
    header: Bytes,
    encodings: Integers,
    optional: Bytes,
    cells: Integers,
    sizes: Integers,
    valid: Bytes,
    text: Bytes,
    out: Bytes,
    ends: Integers,
) -> None:
    """Write every row behind the other into `out`, which has room, and where each ends.

    cells: (columns, rows) values, or where a string begins in `text`; sizes: of the strings; valid: 0 for null.
    """
    at = 0
    for row in range(len(ends)):
        for k in range(len(header)):
            out[at + k] = header[k]
        at += len(header)
        for column in range(len(encodings)):
            if optional[column]:
                out[at] = 2 * valid[column, row]  # the branch: null is 0, the value is 1
                at += 1
                if not valid[column, row]:
                    continue
            encoding, value = encodings[column], cells[column, row]
            if encoding == NUMBER:
                at = _put_number(out, at, value)
            elif encoding == SIZED:
                size = sizes[column, row]
                at = _put_number(out, at, size)
                for k in range(size):
                    out[at + k] = text[value + k]
                at += size
            else:
                width = 1 if encoding == BYTE else 4 if encoding == FOUR else 8
                for k in range(width):
                    out[at + k] = np.uint8((value >> (8 * k)) & 0xFF)
                at += width
        ends[row] = at
