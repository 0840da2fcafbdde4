"""The three images of each packet, as the packet has them: bytes of a file format, or none."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from alert_broker.avro.columns import places

Image = bytes | memoryview | None  # null and empty are both None
Triplet = tuple[Image, ...]  # science, template and difference, in the order of `Survey.cutouts`


def triplets_at(columns: pa.RecordBatch, paths: Sequence[str], data: Sequence[memoryview]) -> list[Triplet]:
    """Return the images of each packet as views of its data. columns: placed columns (`avro.plan.compile_plan`); a path
    without a column has no images. data: (packets,) the bytes in which each packet's images are."""
    images: list[list[Image]] = []
    for path in paths:
        column = _column(columns, path)
        if column is None:
            images.append([None] * len(data))
            continue
        starts, sizes = (array.tolist() for array in places(column))
        images.append(
            [
                view[start : start + size] if size else None
                for view, start, size in zip(data, starts, sizes, strict=True)
            ]
        )
    return list(zip(*images, strict=True))


def triplets_in(columns: pa.RecordBatch, paths: Sequence[str]) -> list[Triplet]:
    """Return the images of each row of a table. A column that is not of bytes has no images."""
    images: list[list[Image]] = []
    for path in paths:
        column = _column(columns, path)
        if column is None or not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            images.append([None] * columns.num_rows)
        else:
            images.append([value or None for value in column.to_pylist()])
    return list(zip(*images, strict=True))


def _column(columns: pa.RecordBatch, path: str) -> pa.Array | None:
    """Return the column at a dotted path; None if there is none."""
    top, *inner = path.split(".")
    if top not in columns.schema.names:
        return None
    array = columns[top]
    for name in inner:
        if not pa.types.is_struct(array.type) or array.type.get_field_index(name) < 0:
            return None
        array = pc.struct_field(array, name)
    return array
