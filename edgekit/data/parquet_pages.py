"""Read the headers of a Parquet file's pages, to see what they declare before anything is decompressed.

Each page begins with a header in Thrift's compact protocol, which says how many values the page has and how many bytes
it takes when it is decompressed. pyarrow takes that memory, whatever the footer says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

STOP, BYTE, DOUBLE, BINARY, STRUCT = 0, 3, 7, 8, 12  # types of the compact protocol
LISTS, INTEGERS, BOOLEANS = (9, 10), (4, 5, 6), (1, 2)
UNCOMPRESSED, COMPRESSED, HEADERS = 2, 3, (5, 8)  # fields of a page's header; headers of data pages, versions 1 and 2
VALUES = 1  # a field of the header of a data page
ENCODINGS = ((5, 2), (8, 4))  # where the headers of data pages, versions 1 and 2, name their encoding
DELTA_BYTE_ARRAY = 7  # each text is a length of the text before it, and a rest: few bytes can stand for 2 GB
MOST_DEPTH = 8


class UndeclaredSizeError(Exception):
    """A page has an encoding that does not declare the size of its values."""


def page_sizes(content: Any, chunk: Any, name: str) -> tuple[int, int]:
    """Return how many values the pages of a column chunk declare, and the bytes that they take decompressed. content:
    the file's bytes; chunk: pyarrow's ColumnChunkMetaData; name: what errors call the column. Raises ValueError if
    there are no such pages, or if texts have an encoding whose size the headers do not declare."""
    values = size = 0
    try:
        for header in _headers(content, chunk):
            size += header[UNCOMPRESSED]
            values += sum(header[key][VALUES] for key in HEADERS if key in header)
            encoded = [header[key][field] for key, field in ENCODINGS if key in header]
            if DELTA_BYTE_ARRAY in encoded and chunk.physical_type == "BYTE_ARRAY":
                raise UndeclaredSizeError
    except UndeclaredSizeError:
        raise ValueError(
            f"the texts of column {name[:80]!r} have the encoding DELTA_BYTE_ARRAY, which does not declare their size; "
            "write the file with plain texts or dictionaries, which is what pyarrow does by default"
        ) from None
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the pages of column {name[:80]!r} contradict the footer ({error}); write it again") from None
    return values, size


def _headers(content: Any, chunk: Any) -> Iterator[dict[int, Any]]:
    """Yield the headers of the chunk's pages, as far as the file reaches."""
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
        at = chunk.dictionary_page_offset
    end = min(at + chunk.total_compressed_size, len(content))
    while 0 <= at < end:
        header, at = _struct(content, at)
        if header[COMPRESSED] < 0 or header[UNCOMPRESSED] < 0:
            raise ValueError("a negative size")
        at += header[COMPRESSED]
        yield header


def _struct(content: Any, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct by number, and where it ends. Lists are skipped."""
    if depth > MOST_DEPTH:
        raise ValueError("too deep")
    fields: dict[int, Any] = {}
    number = 0
    while (head := content[at]) & 15 != STOP:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(content, at)
        fields[number], at = _value(content, at, head & 15, depth)
    return fields, at + 1


def _value(content: Any, at: int, code: int, depth: int) -> tuple[Any, int]:
    if code in BOOLEANS:
        return code == BOOLEANS[0], at
    if code in INTEGERS:
        return _integer(content, at)
    if code in (BYTE, DOUBLE):
        return None, at + (1 if code == BYTE else 8)
    if code == BINARY:
        length, at = _unsigned(content, at)
        return None, at + length
    if code == STRUCT:
        return _struct(content, at, depth + 1)
    if code not in LISTS:
        raise ValueError(f"the type {code}")
    head, at = content[at], at + 1
    length = head >> 4
    if length == 15:
        length, at = _unsigned(content, at)
    for _ in range(length):
        _, at = (None, at + 1) if head & 15 in BOOLEANS else _value(content, at, head & 15, depth + 1)
    return None, at


def _integer(content: Any, at: int) -> tuple[int, int]:
    value, at = _unsigned(content, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(content: Any, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without end")
