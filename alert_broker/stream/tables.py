"""Read packets from Parquet: a column of unchanged packets, or rows of a survey's table, which become Avro.

The Avro of a row differs from what the survey sent. It has the table's columns (including those that a broker added),
with the table's types, and its schema describes them. Times are microseconds since 1970. Columns of Arrow's type null,
which have no values, are left out, but nullable fields that the survey reads and the table lacks are added as null. The
Avro contains all other values of the row, and its light curve is the same.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

import fastavro
import pyarrow as pa

from alert_broker.containers import SYNC_BYTES
from alert_broker.packets import TRUTH_KEY, leaves, survey_of
from alert_broker.stream.archive import OFFSET
from alert_broker.stream.outputs import avro_name
from alert_broker.surveys.base import Survey
from edgekit.data.parquet import bounded_batches, open_bounded, plain_schema
from edgekit.errors import EdgekitError

PACKETS = ("packet", "value")  # the names that our outputs and Kafka's own sinks use
ROWS = 64  # rows per read: some MB
SHOWN = 8  # names of columns in an error
SYNC = bytes(SYNC_BYTES)  # no container has more than one block, so that nobody needs to find the next one


def table_packets(source: Any, name: str, column: str = "") -> Iterator[bytes]:
    """Yield the packets of a Parquet file. source: an open file, or its content; column: the column that holds them. By
    default it is one of PACKETS, if it exists and is binary; otherwise the rows are the packets. Raises EdgekitError if
    the file cannot be read, or before it takes more memory than it may."""
    try:
        size = len(source) if isinstance(source, bytes) else os.fstat(source.fileno()).st_size
        with open_bounded(source) as table:
            schema = plain_schema(table.schema_arrow)
            if TRUTH_KEY in (schema.metadata or {}):  # a simulator's true classes
                return
            if chosen := _column(schema, name, column):
                for _, batch in bounded_batches(source, table, [chosen], ROWS, size):
                    yield from (value or b"" for value in batch[0].to_pylist())
            else:
                columns = [table.schema.column(index).path for index in range(len(table.schema))]
                batches = bounded_batches(source, table, columns, ROWS, size)
                yield from _rows(schema, (batch for _, batch in batches), name)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise EdgekitError(f"{name} cannot be read as Parquet: {error}") from None


def _column(schema: pa.Schema, name: str, column: str) -> str:
    """Return the column that holds packets; "" if there is none."""
    binary = [item.name for item in schema if pa.types.is_binary(item.type) or pa.types.is_large_binary(item.type)]
    if column and column not in binary:
        fault = f"is of type {schema.field(column).type}" if column in schema.names else "does not exist"
        raise EdgekitError(f"{name}: the column {column!r} {fault}; binary columns: {', '.join(binary) or 'none'}")
    return column or next((item for item in PACKETS if item in binary), "")


def _rows(schema: pa.Schema, batches: Iterator[pa.RecordBatch], name: str) -> Iterator[bytes]:
    survey = survey_of(leaves(schema))
    if survey is None:
        note = ", an archive of results, which holds no packets" if OFFSET in schema.names else ""
        raise EdgekitError(
            f"{name} is Parquet{note}: it has no binary column {' or '.join(PACKETS)}, and no survey has its columns "
            f"{', '.join(schema.names[:SHOWN])}; name the column that holds packets with --column"
        )
    if missing := survey.missing(frozenset(leaves(schema))):
        raise EdgekitError(f"{name}: the {survey.name} table has no field {missing[0]!r}; write the table with it")
    chosen = [item for item in schema if not pa.types.is_null(item.type)]
    plain = [pa.field(item.name, pa.int64()) if pa.types.is_timestamp(item.type) else item for item in chosen]
    parsed = fastavro.parse_schema(_record(survey.record, _with_nulls(plain, survey), name))
    names = [avro_name(item.name) for item in chosen]
    stream = io.BytesIO()
    fastavro.writer(stream, parsed, [], codec="null", sync_marker=SYNC)
    header = stream.getvalue()
    for batch in batches:
        columns = [_plain(batch[item.name]) for item in chosen]
        for row in pa.RecordBatch.from_arrays(columns, names).to_pylist():
            stream = io.BytesIO()
            fastavro.schemaless_writer(stream, parsed, row)
            yield container(header, stream.getvalue())


def _with_nulls(fields: list[pa.Field], survey: Survey) -> list[pa.Field]:
    """Return the fields, and those that the survey reads and that are absent because they are null in every row."""
    paths = survey.paths_in(frozenset(leaves(pa.schema(fields))))
    inner = {name: [path.split(".")[1] for path in paths if path.startswith(f"{name}.")] for name in survey.fields}
    known = {item.name for item in fields}
    complete = []
    for item in fields:
        absent = [name for name in inner.get(item.name, []) if f"{item.name}.{name}" in survey.nullable]
        complete.append(pa.field(item.name, _with_children(item.type, absent)))
    for name in survey.fields:
        if name in survey.nullable and name not in known:
            # always empty; the fields are numbers because a record of nulls takes no bytes, which the decoder refuses
            row = pa.struct([pa.field(part, pa.float64()) for part in inner[name]])
            complete.append(pa.field(name, pa.list_(row)))
    return complete


def _with_children(dtype: pa.DataType, names: list[str]) -> pa.DataType:
    """Return a record's type, or that of a list of records, with a null field for each name that it lacks."""
    if pa.types.is_list(dtype):
        return pa.list_(_with_children(dtype.value_type, names))
    if pa.types.is_large_list(dtype):
        return pa.large_list(_with_children(dtype.value_type, names))
    if not pa.types.is_struct(dtype):
        return dtype
    known = {item.name for item in dtype}
    return pa.struct([*dtype, *(pa.field(name, pa.null()) for name in names if name not in known)])


def container(header: bytes, datum: bytes) -> bytes:
    """Return a container of one packet. header: the container's header with its sync marker."""
    return b"".join((header, b"\x02", _long(len(datum)), datum, header[-SYNC_BYTES:]))


def _long(value: int) -> bytes:
    """Return Avro's zigzag encoding of a number that is not negative."""
    rest, out = value << 1, bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _plain(column: pa.Array) -> pa.Array:
    """Return a column of times as microseconds since 1970, because Python has no shorter unit; other columns are
    unchanged."""
    return (
        column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
    )


def _record(full_name: str, fields: Any, where: str) -> dict[str, Any]:
    """Return the Avro record of a table or a struct, in which every field may be null."""
    return {
        "type": "record",
        "name": full_name,
        "fields": [
            {"name": avro_name(item.name), "type": ["null", dtype] if dtype != "null" else "null", "default": None}
            for item in fields
            for dtype in [_type(item.type, f"{full_name}.{avro_name(item.name)}", where)]
        ],
    }


def _type(dtype: pa.DataType, path: str, where: str) -> Any:
    types = pa.types
    if types.is_struct(dtype):
        return _record(path, dtype, where)
    if types.is_list(dtype) or types.is_large_list(dtype):
        inner = _type(dtype.value_type, f"{path}.item", where)
        return {"type": "array", "items": ["null", inner] if inner != "null" else "null"}
    for matches, name in (
        (types.is_null, "null"),
        (types.is_boolean, "boolean"),
        (types.is_uint32, "long"),
        (types.is_int64, "long"),
        (types.is_uint64, ""),
        (types.is_integer, "int"),
        (types.is_float32, "float"),
        (types.is_float64, "double"),
        (types.is_string, "string"),
        (types.is_large_string, "string"),
        (types.is_binary, "bytes"),
        (types.is_large_binary, "bytes"),
    ):
        if matches(dtype) and name:
            return name
    raise EdgekitError(
        f"{where}: {path} is of type {dtype}, which a replay of rows cannot encode; leave the column out"
    )
