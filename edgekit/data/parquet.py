"""Compare what a Parquet file declares with the memory that it may take, before the columns are read.

A few kilobytes can stand for gigabytes: a million equal numbers are one number and a count, and a million equal texts
are one text and a count. The footer declares how many values each column has, and so do the headers of the pages, which
may contradict it: the larger number counts. They cannot say how long texts are, so texts are read as a dictionary of
different texts and their numbers, and are measured before each takes memory of its own.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edgekit.bundle.bounded import claim
from edgekit.data.parquet_pages import page_sizes

WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12, "BYTE_ARRAY": 4}  # bytes


def declared_bytes(source: Any, metadata: Any, columns: Collection[str]) -> list[int]:
    """Return the bytes that these columns take in memory, for each row group. source: an open file, or its content;
    metadata: pyarrow's, of the file; columns: paths such as "a.list.element". A text counts with what the file stores
    of it, and four bytes each time that it occurs."""
    if isinstance(source, bytes):
        return [_group_bytes(source, metadata, number, columns) for number in range(metadata.num_row_groups)]
    with mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [_group_bytes(content, metadata, number, columns) for number in range(metadata.num_row_groups)]


def _group_bytes(content: Any, metadata: Any, number: int, columns: Collection[str]) -> int:
    group, total = metadata.row_group(number), 0
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema in columns:
            width = WIDTHS.get(chunk.physical_type) or max(metadata.schema.column(index).length, 1)
            values, size = page_sizes(content, chunk, chunk.path_in_schema)
            values = max(values, chunk.num_values, group.num_rows)
            total += max(size, chunk.total_uncompressed_size, values * width)
    return total


def open_bounded(source: Any) -> pq.ParquetFile:
    """Open a Parquet file (an open file, or its content) whose columns of texts and bytes are read as dictionaries."""
    stream = pa.BufferReader(source) if isinstance(source, bytes) else source
    metadata = pq.read_metadata(stream)
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(stream, metadata=metadata, read_dictionary=texts)


def bounded_batches(
    source: Any, parquet: pq.ParquetFile, columns: list[str], rows: int, size: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield batches of these columns with the numbers of their first rows. source: what open_bounded opened as
    `parquet`; columns: the paths of leaves; rows: the most rows of a batch; size: the file's bytes. Raises EdgekitError
    before a group of rows or the texts of a batch take more memory than the file may."""
    claim(max(declared_bytes(source, parquet.metadata, set(columns)), default=0), size, "a group of its rows")
    # one group at a time, because pyarrow reads no list of texts with two dictionaries
    groups = range(parquet.metadata.num_row_groups)
    each = (parquet.iter_batches(rows, [group], columns=columns) for group in groups)
    row = 0
    for batch in itertools.chain.from_iterable(each):
        claim(sum(map(text_bytes, batch.columns)), size, f"rows {row} to {row + batch.num_rows}")
        yield row, without_dictionaries(batch)
        row += batch.num_rows


def text_bytes(array: pa.Array) -> int:
    """Return the bytes that the texts of a column, read as a dictionary, take when each occurrence has its own."""
    if isinstance(array, pa.DictionaryArray):
        texts = array.dictionary
        is_text = pa.types.is_string(texts.type) or pa.types.is_binary(texts.type)
        return len(array) * (pc.max(pc.binary_length(texts)).as_py() or 0) if is_text else 0
    if isinstance(array, pa.StructArray):
        return sum(text_bytes(array.field(index)) for index in range(array.type.num_fields))
    if isinstance(array, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        return text_bytes(array.values)
    return 0


def without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch with each text in its own memory."""
    return batch.cast(plain_schema(batch.schema))


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema with texts instead of dictionaries of texts."""
    return pa.schema([field.with_type(_plain(field.type)) for field in schema], schema.metadata)


def _plain(dtype: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(dtype):
        return dtype.value_type
    if pa.types.is_struct(dtype):
        return pa.struct([field.with_type(_plain(field.type)) for field in dtype])
    if pa.types.is_list(dtype):
        return pa.list_(dtype.value_field.with_type(_plain(dtype.value_type)))
    if pa.types.is_large_list(dtype):
        return pa.large_list(dtype.value_field.with_type(_plain(dtype.value_type)))
    return dtype
