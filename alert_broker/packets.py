"""Alert packets from files and folders, and their light curves in batches; what cannot be read becomes a `BadPacket`.

`containers.split` cuts bytes into blocks, `decode` turns a block into packets: the step to replace by a compiled one.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from alert_broker.containers import BadPacket, Block, Buffer, split
from alert_broker.lightcurve import LightCurves
from alert_broker.surveys.base import LightCurve, PacketError, Survey, join, surveys
from edgekit.errors import EdgekitError

PARQUET_MAGIC = b"PAR1"
PARQUET_ROWS = 256  # per read: some MB of history rows
TRUTH_KEY = b"edgekit.truth"  # in the metadata of a simulator's table of true classes, which is not a packet file


@dataclass(frozen=True, slots=True)
class Packet:
    """One decoded alert.

    content: all fields of an Avro packet, of a Parquet row only those in the survey's `fields`; offset: the packet's
    byte in an Avro file (inside a compressed block, the block's), its row in Parquet.
    """

    survey: Survey
    content: dict[str, Any]
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class AlertBatch:
    """Light curves of one survey and, in the same order, a row of `ALERT_COLUMNS` for each."""

    survey: Survey
    curves: LightCurves
    alerts: pa.RecordBatch


ALERT_COLUMNS = pa.schema(
    [
        ("alert_id", pa.int64()),
        ("object_id", pa.string()),
        ("survey", pa.string()),
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("n_detections", pa.list_(pa.int32())),  # in the order of the survey's bands
        ("n_forced", pa.list_(pa.int32())),
        ("n_upper_limits", pa.int32()),
        ("n_dropped", pa.int32()),  # rows without a usable value
    ]
)


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files at these paths, folders walked in order of name, each file once; hidden files are passed over."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = list(_walk(path))
            if not files:
                raise EdgekitError(f"the folder {path} holds no files; give a folder or files of alert packets")
            found.update(dict.fromkeys(files))
        elif path.is_file():
            found[path] = None
        else:
            what = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise EdgekitError(f"the path {path} {what}; give files or folders of alert packets")
    if not found:
        raise EdgekitError("no path was given; give files or folders of alert packets")
    return list(found)


def read_packets(paths: Iterable[str | Path]) -> Iterator[Packet | BadPacket]:
    """Every packet of these files and folders, decoded, in order; a path that does not exist is an EdgekitError now."""
    return _read_files(find_files(paths))


def batches(packets: Iterable[Packet | BadPacket], size: int = 1024) -> Iterator[AlertBatch | BadPacket]:
    """Light curves of up to `size` alerts of one survey; bad packets pass through as they come. Packets are emptied."""
    if size < 1:
        raise EdgekitError(f"batch size is {size}; expected 1 or more")
    pending: dict[str, list[tuple[Packet, LightCurve]]] = {}
    for packet in packets:
        if isinstance(packet, BadPacket):
            yield packet
            continue
        try:
            curve = packet.survey.light_curve(packet.content)
        except PacketError as error:
            yield BadPacket(packet.file, packet.offset, str(error))
            continue
        rows = pending.setdefault(packet.survey.name, [])
        packet.content.clear()  # its light curve has been taken; a decoded LSST alert is megabytes of Python objects
        rows.append((packet, curve))
        if len(rows) == size:
            yield assemble(pending.pop(packet.survey.name))
    for rows in pending.values():
        yield assemble(rows)


def assemble(alerts: Sequence[tuple[Packet, LightCurve]]) -> AlertBatch:
    """One batch of alerts that share their survey."""
    assert alerts
    survey = alerts[0][0].survey
    assert all(packet.survey is survey for packet, _ in alerts)
    curves = [curve for _, curve in alerts]
    joined = join(curves, survey.bands)
    columns = [
        [curve.alert_id for curve in curves],
        [curve.object_id for curve in curves],
        [survey.name] * len(alerts),
        [packet.file for packet, _ in alerts],
        [packet.offset for packet, _ in alerts],
        list(_count_by_band(joined, detected=True)),
        list(_count_by_band(joined, detected=False)),
        [curve.upper_limits for curve in curves],
        [curve.dropped for curve in curves],
    ]
    arrays = [pa.array(values, column.type) for values, column in zip(columns, ALERT_COLUMNS, strict=True)]
    return AlertBatch(survey, joined, pa.RecordBatch.from_arrays(arrays, schema=ALERT_COLUMNS))


def decode(block: Block) -> Iterator[Packet | BadPacket]:
    """The packets of a block. One that fails takes the rest of the block along: nothing marks where the next begins."""
    schema = block.schema
    if schema.survey is None:
        known = ", ".join(surveys())
        reason = f"unsupported survey: the schema is {schema.name!r}; supported: {known}"
        yield BadPacket(block.file, block.offset, reason, "skipped", block.count)
        return
    body = io.BytesIO(block.data)
    packets: list[Packet] = []
    failure: BadPacket | None = None
    for index in range(block.count):
        offset = block.offset + (0 if block.compressed else body.tell())
        try:
            content = fastavro.schemaless_reader(body, schema.parsed, None)
        except Exception as error:  # arbitrary bytes: whatever the decoder raises is the packet's reason
            reason = f"does not decode as {schema.name} ({type(error).__name__}: {error})"
            failure = BadPacket(block.file, offset, reason, packets=block.count - index)
            break
        assert isinstance(content, dict), schema  # a survey's schema is a record
        packets.append(Packet(schema.survey, content, block.file, offset))
    left = len(block.data) - body.tell()
    if failure is None and left:
        # The lengths do not add up, so where packets start is not known either: none of them is to be trusted.
        reason = f"decodes as {schema.name} with {left} bytes left over: it was written with another schema"
        yield BadPacket(block.file, block.offset, reason, packets=block.count)
        return
    yield from packets
    if failure is not None:
        yield failure


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise EdgekitError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _read_files(files: Sequence[Path]) -> Iterator[Packet | BadPacket]:
    for path in files:
        try:
            with path.open("rb") as stream:
                empty = os.fstat(stream.fileno()).st_size == 0
                # Mapped, not read: a night's container can be larger than memory. An empty file cannot be mapped.
                data: Buffer = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            yield BadPacket(str(path), 0, f"cannot be read: {error.strerror or error}")
            continue
        if data[:4] == PARQUET_MAGIC:
            yield from _read_parquet(path)
            continue
        for block in split(data, str(path)):
            if isinstance(block, BadPacket):
                yield block
            else:
                yield from decode(block)


def _read_parquet(path: Path) -> Iterator[Packet | BadPacket]:
    row = 0
    rows = 1
    try:
        with pq.ParquetFile(path) as parquet:
            if TRUTH_KEY in (parquet.schema_arrow.metadata or {}):
                return
            rows = parquet.metadata.num_rows
            columns = [name for item in parquet.schema_arrow for name in _leaves(item.name, item.type)]
            survey = next((item for item in surveys().values() if item.recognises_columns(frozenset(columns))), None)
            if survey is None or rows == 0:
                known = ", ".join(surveys())
                named = ", ".join(parquet.schema_arrow.names[:8])
                reason = f"unsupported table: its columns begin {named}; supported layouts: {known}"
                yield BadPacket(str(path), 0, reason if rows else "the table has no rows", "skipped", rows)
                return
            wanted = {name for top, inner in survey.fields.items() for name in _join(top, inner)}
            chosen = [parquet.schema.column(index).path for index, name in enumerate(columns) if name in wanted]
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=chosen):
                for content in batch.to_pylist():
                    yield Packet(survey, content, str(path), row)
                    row += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = f"cannot be read as Parquet from row {row} on: {error}"
        yield BadPacket(str(path), row, reason, packets=max(rows - row, 1))


def _leaves(name: str, kind: pa.DataType) -> Iterator[str]:
    """Dotted names of a column's leaves, in Parquet's order; lists add no name."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(name, kind.value_type)
    elif pa.types.is_struct(kind):
        for item in kind:
            yield from _leaves(f"{name}.{item.name}", item.type)
    else:
        yield name


def _join(top: str, inner: Sequence[str]) -> list[str]:
    return [f"{top}.{name}" for name in inner] or [top]


def _count_by_band(curves: LightCurves, *, detected: bool) -> npt.NDArray[np.int64]:
    """(alerts, bands) number of points of either kind."""
    chosen = curves.detected == detected
    cell = curves.object_of_point[chosen] * len(curves.bands) + curves.band[chosen]
    return np.bincount(cell, minlength=len(curves) * len(curves.bands)).reshape(len(curves), -1)
