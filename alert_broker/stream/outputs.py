"""Encode rows of the result as messages: Avro in Confluent wire format with a schema of our own, or a line of JSON.

The Avro schema follows from the Arrow schema: each column is a field, which is a union with null if the column may be
null, as all columns of results may. In names that Avro does not allow, such as `p_SLSN-I`, underscores replace the
forbidden characters; the attribute `column` holds the column's own name. One compiled loop over Arrow's columns writes
the rows, as `avro.walk` reads them.
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
# The Avro type for each Arrow type, and how the loop writes it: as a zigzag number, as 4 or 8 unchanged bytes, as one
# byte, or as a size and its bytes.
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
# most bytes of a value; for a value with a size, most bytes of the size
MAX_BYTES = {NUMBER: 10, FOUR: 4, EIGHT: 8, BYTE: 1, SIZED: 10}
NEEDS_ESCAPE = r'["\\\x00-\x1f]'  # RFC 8259, section 7

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(Protocol):
    """A service that stores schemas by number; see `registry.open_registry`."""

    def schema(self, identifier: int) -> str: ...

    def register(self, subject: str, schema: str) -> int: ...


class Encoder(Protocol):
    """Encodes rows as messages, one for each row, in order. The rows must have the encoder's schema."""

    schema: pa.Schema

    def encode(self, rows: pa.RecordBatch) -> list[bytes]: ...


def encoder(
    format: Format, schema: pa.Schema, registry: Registry | None = None, subject: str = "edgekit-classification-value"
) -> Encoder:
    """Return the encoder of a format. For Avro, this call registers the schema under the subject.

    Without a registry the schema's id is its fingerprint (`fingerprint`), so that two schemas have two ids in this case
    as well.
    """
    if format == "json":
        return JsonEncoder(schema)
    if format == "avro":
        text = avro_schema(schema)
        return AvroEncoder(schema, registry.register(subject, text) if registry else fingerprint(text))
    raise unknown("format", format, FORMATS, where="an output")


def avro_name(column: str) -> str:
    """Return the name of a column in Avro (specification 1.12, "Names"), which filters use as well."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", column)
    return name if re.match(r"[A-Za-z_]", name) else f"_{name}"


def avro_schema(schema: pa.Schema) -> str:
    """Return the Avro schema of rows, as JSON. Raises EdgekitError if a column's type has no Avro type, or if two names
    become equal."""
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
    """Return a positive 31-bit number that the text determines."""
    return int.from_bytes(hashlib.sha256(schema.encode()).digest()[:4], "big") >> 1


class AvroEncoder:
    """Writes Confluent's wire format: a zero byte, the schema's id, and the datum."""

    def __init__(self, schema: pa.Schema, identifier: int) -> None:
        self.schema, self.identifier = schema, identifier
        self._header = np.frombuffer(WIRE_HEADER.pack(0, identifier), np.uint8)
        self._encodings = np.array([_type(item)[1] for item in schema], np.int64)
        self._optional = np.array([item.nullable for item in schema], np.uint8)
        self._fixed = len(self._header) + sum(1 + MAX_BYTES[int(encoding)] for encoding in self._encodings)

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
    """Writes a JSON object with the columns' own names, in UTF-8, without newlines. JSON has no NaN, no infinity and no
    bytes: numbers that are not finite become null, and bytes become base64 (RFC 4648)."""

    def __init__(self, schema: pa.Schema) -> None:
        for item in schema:
            _type(item)  # raises if outputs have no such type
        self.schema = schema
        names = [json.dumps(item.name, ensure_ascii=False) for item in schema]
        self._prefixes = [f"{',' if k else '{'}{name}:" for k, name in enumerate(names)]

    def encode(self, rows: pa.RecordBatch) -> list[bytes]:
        _check(rows, self.schema)
        texts = _json_of_columns(rows)
        parts: list[Any] = []
        text = ""  # between the last column that has values and the next one
        for number, prefix in enumerate(self._prefixes):
            text += prefix
            if number in texts:
                parts += [text, texts[number]]
                text = ""
            else:  # only nulls, as the classes of another survey's model
                text += "null"
        if not parts:
            return [f"{text or '{'}}}".encode()] * rows.num_rows
        return [line.encode() for line in pc.binary_join_element_wise(*parts, text + "}", "").to_pylist()]


def _type(item: pa.Field) -> tuple[str, int]:
    """Return the Avro type of a column, and how the loop writes it."""
    for matches, name, encoding in TYPES:
        if matches(item.type):
            return name, encoding
    raise EdgekitError(
        f"the column {item.name!r} is of type {item.type}; outputs can hold booleans, integers of up to 64 bits, "
        "floats, strings and bytes"
    )


def _check(rows: pa.RecordBatch, schema: pa.Schema) -> None:
    """Raise unless the rows have the schema, and have no null in a column that allows none."""
    if not rows.schema.equals(schema):
        raise EdgekitError(
            f"the rows have the columns {rows.schema.names}; expected {schema.names} with the encoder's types"
        )
    for item, column in zip(schema, rows.columns, strict=True):
        if column.null_count and not item.nullable:
            raise EdgekitError(f"the column {item.name!r} has a null, which its schema does not allow")


def _bits(column: pa.Array) -> Integers:
    """Return (rows,) the values as 64 bits: numbers, or the bits of a float."""
    dtype = column.type
    if pa.types.is_boolean(dtype):
        return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False).astype(np.int64))
    values = pc.fill_null(column, 0) if column.null_count else column
    array = values.to_numpy(zero_copy_only=False)
    if pa.types.is_floating(dtype):
        return np.asarray(array.view(np.int32 if pa.types.is_float32(dtype) else np.int64).astype(np.int64))
    return np.asarray(array.astype(np.int64))


def _content(column: pa.Array) -> tuple[Integers, Bytes]:
    """Return (rows + 1,) the offset at which each string begins and ends, and the bytes of the strings, without the
    bytes outside a slice."""
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    width = np.int64 if large else np.int32
    _, offsets, data = column.buffers()
    if offsets is None or len(column) == 0:
        return np.zeros(len(column) + 1, np.int64), np.empty(0, np.uint8)
    ends = np.frombuffer(offsets, width)[column.offset :][: len(column) + 1].astype(np.int64)
    text = np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
    return ends - ends[0], text[ends[0] : ends[-1]]


def _json_of_columns(rows: pa.RecordBatch) -> dict[int, pa.Array]:
    """Return the JSON of each column that has values, by the column's number. Columns of one type are written together,
    because a call into Arrow costs as much as the values of a hundred rows."""
    numbers: dict[pa.DataType, list[int]] = {}
    for number, column in enumerate(rows.columns):
        if column.null_count < rows.num_rows:
            numbers.setdefault(column.type, []).append(number)
    texts: dict[int, pa.Array] = {}
    for group in numbers.values():
        text = _json(pa.concat_arrays([rows.column(number) for number in group]))
        texts |= {number: text.slice(k * rows.num_rows, rows.num_rows) for k, number in enumerate(group)}
    return texts


def _json(column: pa.Array) -> pa.Array:
    """Return (rows,) the JSON of each value, as a string."""
    dtype = column.type
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype):
        column = column if pa.types.is_string(dtype) else column.cast(pa.string())
        text = pc.binary_join_element_wise('"', column, '"', "")
        special = pc.match_substring_regex(column, NEEDS_ESCAPE)
        if special.true_count:
            special = pc.fill_null(special, False)
            escaped = [json.dumps(value, ensure_ascii=False) for value in column.filter(special).to_pylist()]
            text = pc.replace_with_mask(text, special, pa.array(escaped, pa.string()))
    elif pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype):
        data = (None if item is None else f'"{base64.b64encode(item).decode()}"' for item in column.to_pylist())
        text = pa.array(data, pa.string())
    else:
        if pa.types.is_floating(dtype) and not np.isfinite(column.to_numpy(zero_copy_only=False)).all():
            column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, dtype))
        text = column.cast(pa.string())
    return pc.fill_null(text, "null") if text.null_count else text


def _compiled(function: Function) -> Function:
    return cast(Function, njit(cache=True, nogil=True)(function))


@_compiled
def _put_number(out: Bytes, at: int, value: int) -> int:
    """Write a zigzag number of variable length. Return the byte after it."""
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
    """Write all rows one after the other into `out`, which must be large enough, and the end of each row into `ends`.

    cells: (columns, rows) values, or the offset in `text` at which a string begins; sizes: of the strings; valid: 0 for
    null.
    """
    at = 0
    for row in range(len(ends)):
        for k in range(len(header)):
            out[at + k] = header[k]
        at += len(header)
        for column in range(len(encodings)):
            if optional[column]:
                out[at] = 2 * valid[column, row]  # the branch of the union: null is 0, the value is 1
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
