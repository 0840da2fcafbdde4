"""Extract the image cutouts from packets, unchanged: science, template and difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alert_broker.avro.columns import Columns
from alert_broker.avro.plan import ReadPlan
from alert_broker.containers import Block, message

CUTOUTS = ("cutout_science", "cutout_template", "cutout_difference")


def cutouts(
    packets: Sequence[bytes | memoryview], schema_text: Callable[[int], str] | None = None
) -> list[pa.LargeBinaryArray]:
    """Return (packets,) bytes for each of CUTOUTS. An element is null if the packet has no such image, or if the
    message does not hold exactly one packet."""
    groups: dict[ReadPlan, tuple[tuple[str, str, str], Columns, list[int]]] = {}
    for index, packet in enumerate(packets):
        block = message(bytes(packet), index, schema_text)
        if not isinstance(block, Block) or not block.schema.survey or not block.schema.cutouts:
            continue
        plan = block.schema.cutouts
        if plan not in groups:
            groups[plan] = (block.schema.survey.cutouts, Columns(plan), [])
        _, columns, indices = groups[plan]
        if columns.read(block.data, 1)[1] is None:
            indices.append(index)
    # the images of all groups joined, with a null at the end for packets without images
    order = np.full(len(packets), sum(len(indices) for _, _, indices in groups.values()))
    parts_of: list[list[pa.Array]] = [[] for _ in CUTOUTS]
    before = 0
    for paths, columns, indices in groups.values():
        order[indices] = np.arange(before, before + len(indices))
        before += len(indices)
        rows = columns.take()
        for images, path in zip(parts_of, paths, strict=True):
            images.append(_images(rows, path))
    nothing = pa.nulls(1, pa.large_binary())
    return [pa.concat_arrays([*images, nothing]).take(pa.array(order)) for images in parts_of]


def _images(rows: pa.RecordBatch, path: str) -> pa.Array:
    top, *inner = path.split(".")
    if top not in rows.schema.names:
        return pa.nulls(rows.num_rows, pa.large_binary())
    array = rows[top]
    for name in inner:
        array = pc.struct_field(array, name)
    return array.cast(pa.large_binary())
