"""Read alert packets from files and folders, and their light curves in batches. A packet that cannot be read becomes a
`BadPacket`.

Packets come in `Block`s of Avro data or in `ParquetRows`. Both become Arrow columns of the fields that the survey
reads, and the columns become light curves, many packets at a time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from alert_broker.avro.columns import Columns
from alert_broker.avro.plan import ReadPlan
from alert_broker.containers import BadPacket, Block, Buffer, split
from alert_broker.lightcurve import LightCurves, concatenate
from alert_broker.packet_images import Triplet, triplets_at, triplets_in
from alert_broker.surveys.base import Extracted, PacketError, Survey, surveys
from edgekit.data.parquet import bounded_batches, open_bounded
from edgekit.errors import EdgekitError

PARQUET_MAGIC = b"PAR1"
PARQUET_ROWS = 256  # rows per read, which give some MB of history rows
MOST_ROWS = 1 << 18  # history rows that wait for their batch, some 100 MB: one packet may hold as many as a thousand do
TRUTH_KEY = b"edgekit.truth"  # marks a simulator's table of true classes, which is not a packet file, in its metadata


@dataclass(frozen=True, slots=True)
class ParquetRows:
    """Rows of a Parquet file, one packet each, with the fields that the survey reads, and the images if they are
    wanted. offset: the number of the first row."""

    survey: Survey
    file: str
    offset: int
    columns: pa.RecordBatch

    @property
    def count(self) -> int:
        return int(self.columns.num_rows)


PacketSource = Block | ParquetRows


@dataclass(frozen=True, slots=True)
class AlertBatch:
    """Light curves of one survey and, in the same order, a row of `ALERT_COLUMNS` for each, and its images as they are
    in the packet if images are wanted."""

    survey: Survey
    curves: LightCurves
    alerts: pa.RecordBatch
    images: Sequence[Triplet] | None = None

    def take(self, indices: Sequence[int]) -> AlertBatch:
        """Return some of the alerts, in this order."""
        images = None if self.images is None else [self.images[index] for index in indices]
        alerts = self.alerts.take(pa.array(indices, pa.int64()))
        return AlertBatch(self.survey, self.curves.take(np.asarray(indices, np.int64)), alerts, images)


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


def file_name(path: Path) -> str:
    """The path as text for rows and messages. Linux allows file names that are not UTF-8; their bytes are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files at these paths, each file once. Folders are read in order of name, and hidden files are
    skipped."""
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
            fault = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise EdgekitError(f"the path {path} {fault}; give files or folders of alert packets")
    if not found:
        raise EdgekitError("no path was given; give files or folders of alert packets")
    return list(found)


def read_blocks(paths: Iterable[str | Path], *, images: bool = False) -> Iterator[PacketSource | BadPacket]:
    """Yield all packets of these files and folders, in order. Raises EdgekitError at the call if a path does not
    exist. images: whether tables are read with their images."""
    return _read_files(find_files(paths), images)


def batches(
    blocks: Iterable[PacketSource | BadPacket],
    size: int = 1024,
    buffer_pool: dict[ReadPlan, Columns] | None = None,
    *,
    images: bool = False,
) -> Iterator[AlertBatch | BadPacket]:
    """Yield light curves of up to `size` alerts of one survey, with their images if they are wanted. Bad packets are
    passed through in their order.

    A packet that cannot be decoded makes the rest of its block unreadable, because nothing marks where the next one
    begins. A packet that can be decoded but has no light curve is yielded as a BadPacket before its batch. buffer_pool:
    keeps the read buffers for the next call.
    """
    if size < 1:
        raise EdgekitError(f"batch size is {size}; expected 1 or more")
    waiting: dict[str, _Waiting] = {}
    for block in blocks:
        if isinstance(block, BadPacket):
            yield block
            continue
        if isinstance(block, ParquetRows):
            survey = block.survey
        elif block.schema.survey is not None:
            survey = block.schema.survey
        else:
            yield _unsupported(block)
            continue
        if survey.name not in waiting:
            waiting[survey.name] = _Waiting(survey, {} if buffer_pool is None else buffer_pool, images)
        if bad := waiting[survey.name].add(block):
            yield bad
        if len(waiting[survey.name]) >= size or waiting[survey.name].rows >= MOST_ROWS:
            yield from waiting.pop(survey.name).take(size)
    for queue in waiting.values():
        yield from queue.take(size)


class _Waiting:
    """Packets of one survey that wait for their batch, read into columns: one set for each layout, and one for each
    Parquet table."""

    def __init__(self, survey: Survey, buffer_pool: dict[ReadPlan, Columns], images: bool) -> None:
        self.survey, self._buffer_pool, self._images = survey, buffer_pool, images
        self._data: dict[int, memoryview] = {}  # by the packet's index: the bytes that hold its images
        self._files: list[str] = []  # the file of each packet, in the order in which the packets came
        self._offsets: list[int] = []
        self._columns: dict[str, tuple[Columns, list[int]]] = {}  # by layout, with the packets' indices in that order
        self._tables: list[tuple[pa.RecordBatch, list[int]]] = []
        self.rows = 0  # of the longest history columns

    def __len__(self) -> int:
        return len(self._files)

    def add(self, block: PacketSource) -> BadPacket | None:
        """Read a block into columns; return the part of it that could not be decoded."""
        if isinstance(block, ParquetRows):
            indices = self._number(block.file, range(block.offset, block.offset + block.count))
            self._tables.append((block.columns, indices))
            return None
        plan = (block.schema.with_places if self._images else None) or block.schema.plan
        assert plan is not None
        if plan.layout not in self._columns:
            grown = next((known for known in self._buffer_pool if known.layout == plan.layout), None)
            self._columns[plan.layout] = (Columns(plan) if grown is None else self._buffer_pool.pop(grown), [])
        columns, indices = self._columns[plan.layout]
        ends, fault = columns.read(block.data, block.count, plan)
        if block.index is not None:
            positions = [block.index] * (len(ends) + 1)
        elif block.compressed:
            positions = [block.offset] * (len(ends) + 1)
        else:
            positions = [block.offset, *(block.offset + ends).tolist()]
        numbers = self._number(block.file, positions[: len(ends)])
        indices += numbers
        if self._images:
            self._data |= dict.fromkeys(numbers, memoryview(block.data))
        self.rows = max(self.rows, columns.rows)
        if fault is None:
            return None
        name, lost = block.schema.name, block.count - len(ends)
        if not fault.field:
            reason = f"the packet decodes as {name} with {fault.reason}: it was written with another schema"
        else:
            byte = f"{fault.at} of the decompressed block" if block.compressed else block.offset + fault.at
            reason = f"the packet does not decode as {name}: {fault.reason} (byte {byte}, in {fault.field})"
        return BadPacket(block.file, positions[len(ends)], reason, packets=lost)

    def take(self, size: int) -> Iterator[AlertBatch | BadPacket]:
        """Yield all waiting packets, as batches of up to `size`."""
        sources = [(columns.take(), indices, False) for columns, indices in self._columns.values()]
        sources += [(rows, indices, True) for rows, indices in self._tables]
        self._buffer_pool.update((columns.plan, columns) for columns, _ in self._columns.values())
        found: list[tuple[LightCurves, pa.RecordBatch, list[int]]] = []
        images: dict[int, Triplet] = {}  # by the packet's index
        for columns, indices, table in sources:
            try:
                extracted = self.survey.light_curves(columns, table=table)
                errors = extracted.errors
            except PacketError as error:
                errors = dict.fromkeys(range(len(indices)), str(error))
            if self._images and table:
                images |= dict(zip(indices, triplets_in(columns, self.survey.cutouts), strict=True))
            elif self._images:
                data = [self._data[index] for index in indices]
                images |= dict(zip(indices, triplets_at(columns, self.survey.cutouts, data), strict=True))
            for alert, reason in sorted(errors.items()):
                yield BadPacket(self._files[indices[alert]], self._offsets[indices[alert]], reason)
            if len(errors) < len(indices):
                good = [alert for alert in range(len(indices)) if alert not in errors]
                kept = [indices[alert] for alert in good]
                found.append((*self._alerts(extracted, good, kept), kept))
        if not found:
            return
        curves, rows = found[0][:2] if len(found) == 1 else _joined(found)
        kept = sorted(index for _, _, indices in found for index in indices)
        for start in range(0, len(curves), size):
            stop = min(start + size, len(curves))
            part = curves.take(np.arange(start, stop)) if stop - start < len(curves) else curves
            triplets = [images[index] for index in kept[start:stop]] if self._images else None
            yield AlertBatch(self.survey, part, rows.slice(start, stop - start), triplets)

    def _number(self, file: str, offsets: Sequence[int]) -> list[int]:
        """Record the file and the offset of packets; return their indices."""
        first = len(self._files)
        self._files += [file] * len(offsets)
        self._offsets += offsets
        return list(range(first, len(self._files)))

    def _alerts(self, found: Extracted, good: list[int], indices: list[int]) -> tuple[LightCurves, pa.RecordBatch]:
        """Return the light curves of some of the alerts, and their rows of `ALERT_COLUMNS`."""
        curves = found.curves if len(good) == len(found.curves) else found.curves.take(good)
        columns = [
            found.alert_id[good],
            [found.object_id[alert] for alert in good],
            [self.survey.name] * len(good),
            [self._files[index] for index in indices],
            [self._offsets[index] for index in indices],
            _count_by_band(curves, detected=True),
            _count_by_band(curves, detected=False),
            found.upper_limits[good],
            found.dropped[good],
        ]
        arrays = [pa.array(values, column.type) for values, column in zip(columns, ALERT_COLUMNS, strict=True)]
        return curves, pa.RecordBatch.from_arrays(arrays, schema=ALERT_COLUMNS)


def _joined(found: Sequence[tuple[LightCurves, pa.RecordBatch, list[int]]]) -> tuple[LightCurves, pa.RecordBatch]:
    """Return light curves and rows of several sources together, in the order in which their packets came."""
    order = np.argsort([index for _, _, kept in found for index in kept])
    alerts = pa.Table.from_batches([part for _, part, _ in found]).take(order)
    (rows,) = alerts.combine_chunks().to_batches()
    return concatenate(part for part, _, _ in found).take(order), rows


def _unsupported(block: Block) -> BadPacket:
    known = ", ".join(surveys())
    reason = f"unsupported survey: the schema is {block.schema.name!r}; supported: {known}"
    where = block.offset if block.index is None else block.index
    return BadPacket(block.file, where, reason, "skipped", block.count)


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise EdgekitError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _read_files(files: Sequence[Path], images: bool) -> Iterator[PacketSource | BadPacket]:
    for path in files:
        try:
            with path.open("rb") as stream:
                empty = os.fstat(stream.fileno()).st_size == 0
                # The file is mapped into memory, because a night's container can be larger than memory. An empty file
                # cannot be mapped.
                data: Buffer = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            yield BadPacket(file_name(path), 0, f"the file cannot be read: {error.strerror or error}")
            continue
        if data[:4] == PARQUET_MAGIC:
            yield from _read_parquet(path, images)
        else:
            yield from split(data, file_name(path))


def _read_parquet(path: Path, images: bool) -> Iterator[ParquetRows | BadPacket]:
    row = 0
    rows = 1
    try:
        # pyarrow opens no file whose name is not UTF-8
        with path.open("rb") as stream, open_bounded(stream) as parquet:
            if TRUTH_KEY in (parquet.schema_arrow.metadata or {}):
                return
            rows = parquet.metadata.num_rows
            columns = leaves(parquet.schema_arrow)
            survey = survey_of(columns)
            if survey is None or rows == 0:
                known = ", ".join(surveys())
                named = ", ".join(parquet.schema_arrow.names[:8])
                reason = f"unsupported table: its first columns are {named}; supported layouts: {known}"
                yield BadPacket(file_name(path), 0, reason if rows else "the table has no rows", "skipped", rows)
                return
            if missing := survey.missing(frozenset(columns)):
                reason = f"the {survey.name} table has no field {missing[0]!r}, which the survey's schema requires"
                yield BadPacket(file_name(path), 0, reason, packets=rows)
                return
            wanted = {*survey.paths, *(survey.cutouts if images else ())}
            chosen = [parquet.schema.column(index).path for index, name in enumerate(columns) if name in wanted]
            size = os.fstat(stream.fileno()).st_size
            for first, batch in bounded_batches(stream, parquet, chosen, PARQUET_ROWS, size):
                yield ParquetRows(survey, file_name(path), first, batch)
                row = first + batch.num_rows
    except (pa.ArrowException, OSError, ValueError, EdgekitError) as error:
        reason = f"the file cannot be read as Parquet from row {row} on: {error}"
        yield BadPacket(file_name(path), row, reason, packets=max(rows - row, 1))


def survey_of(columns: Iterable[str]) -> Survey | None:
    """Return the survey whose alerts a table with these leaf columns holds; None if there is none."""
    names = frozenset(columns)
    return next((item for item in surveys().values() if item.recognises_columns(names)), None)


def leaves(schema: pa.Schema) -> list[str]:
    """Return the dotted names of the leaves of all columns, in Parquet's order. Lists add no name."""
    return [name for item in schema for name in _leaves(item.name, item.type)]


def _leaves(name: str, dtype: pa.DataType) -> Iterator[str]:
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype):
        yield from _leaves(name, dtype.value_type)
    elif pa.types.is_struct(dtype):
        for item in dtype:
            yield from _leaves(f"{name}.{item.name}", item.type)
    else:
        yield name


def _count_by_band(curves: LightCurves, *, detected: bool) -> pa.Array:
    """Return (alerts,) lists with the number of points in each band: of detections, or of forced photometry."""
    chosen, bands = curves.detected == detected, len(curves.bands)
    cell = curves.object_of_point[chosen] * bands + curves.band[chosen]
    counts = np.bincount(cell, minlength=len(curves) * bands).astype(np.int32)
    return pa.ListArray.from_arrays(np.arange(len(curves) + 1, dtype=np.int32) * np.int32(bands), counts)
