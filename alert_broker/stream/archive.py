"""Results as Parquet, partitioned by night, in which a replay cannot double a row, however its batches fall.

    FOLDER/night=2026-11-25/alerts-3-000000004096.parquet

Each file has the rows of one topic and partition whose offsets are in one segment: 4096 of them from a multiple of 4096
on, which is in the name. Where a row belongs thus follows from its message alone. Writing rows of a segment that is
there already replaces those of the same offsets and keeps the others: the file is read, merged and put into place in
one step. So after a crash the consumer may start at any offset and cut its batches anywhere, and every row is there
once.

A batch that has returned is on disk (fsync), and its offsets may be committed. If it fails, what is on disk is the old
files or the new ones, and writing the batch again repairs it. Consumers on one machine may share a folder: they take
turns by a lock on each partition. All rows of one message are in one call: they replace those of the message.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from edgekit.errors import EdgekitError

# Part of the layout, not to be changed: files of another length would overlap. Small enough to be written again for
# each batch (some 0.5 MB), large enough that a night of ten million alerts is 2,500 files.
SEGMENT = 4096
# Nights are named after the evening on which they begin. By UTC less 16 hours no night is cut: neither in Chile (22 to
# 10 h UTC) nor in California (2 to 14 h).
NIGHT_SHIFT = datetime.timedelta(hours=16)
DAY_MILLISECONDS = 86_400_000
NIGHTS = 100_000  # after 1970 that a time can be of: up to the year 2243
POSITION = (("stream_topic", pa.string()), ("stream_partition", pa.int32()), ("stream_offset", pa.int64()))
OFFSET = "stream_offset"
PARTITIONING = ds.partitioning(pa.schema([("night", pa.string())]), flavor="hive")


@dataclass(frozen=True, slots=True)
class Positions:
    """Where rows come from, (rows,) each. timestamp: of the message, in milliseconds since 1970 UTC; it names the
    night, and is the same in a replay."""

    topic: list[str]
    partition: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    timestamp: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.topic)


class Archive:
    """A folder of results. Rows have `schema`; files have the columns of POSITION besides."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema
        for name, dtype in POSITION:
            if name in schema.names:
                raise EdgekitError(f"the results have a column {name!r}, which the archive adds; rename it")
            self.schema = self.schema.append(pa.field(name, dtype, nullable=False))
        if "night" in schema.names:
            raise EdgekitError("the results have a column 'night', which the archive's folders add; rename it")
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, rows: pa.RecordBatch, positions: Positions) -> list[Path]:
        """Add or replace rows; the files that now have them. EdgekitError if they cannot be written: a full disk."""
        if rows.num_rows != len(positions):
            raise EdgekitError(f"{rows.num_rows} rows with the positions of {len(positions)}")
        arrays = [*rows.columns, pa.array(positions.topic, pa.string()), pa.array(positions.partition, pa.int32())]
        whole = pa.Table.from_arrays([*arrays, pa.array(positions.offset, pa.int64())], schema=self.schema)
        groups: dict[Path, list[int]] = {}
        nights = (
            (positions.timestamp - NIGHT_SHIFT // datetime.timedelta(milliseconds=1)) // DAY_MILLISECONDS
        ).tolist()
        segments = (positions.offset // SEGMENT * SEGMENT).tolist()
        partitions = positions.partition.tolist()
        for row, place in enumerate(zip(nights, positions.topic, partitions, segments, strict=True)):
            groups.setdefault(self._file(*place), []).append(row)
        for path, places in groups.items():
            self._merge(path, whole.take(pa.array(places)))
        return list(groups)

    def _file(self, night: int, topic: str, partition: int, segment: int) -> Path:
        known = 0 <= night < NIGHTS  # a producer may claim any time, or none
        evening = (datetime.date(1970, 1, 1) + datetime.timedelta(days=night)).isoformat() if known else "unknown"
        if topic[:1] in (".", "_"):
            topic = f"~{topic}"  # readers of Parquet folders pass over such names; no topic has a tilde
        return self.folder / f"night={evening}" / f"{topic}-{partition}-{segment:012}.parquet"

    def _merge(self, path: Path, rows: pa.Table) -> None:
        """Put rows into a file, in the order of offsets; those that are there with the same offsets go."""
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            # pyarrow passes over names that begin with a dot, and so does what reads Parquet folders elsewhere
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            with _locked(self.folder / f".{path.name.rpartition('-')[0]}.lock"):
                for stale in path.parent.glob(f".{path.name}.*"):
                    stale.unlink()  # of a process that was killed
                if path.exists():
                    rows = pa.concat_tables([self._kept(path, rows), rows])
                order = np.argsort(rows[OFFSET].to_numpy(), kind="stable")
                try:
                    with fresh.open("wb") as stream:
                        pq.write_table(rows.take(pa.array(order)), stream, compression="zstd")
                        stream.flush()
                        os.fsync(stream.fileno())
                    fresh.replace(path)
                    _sync(path.parent)
                finally:
                    fresh.unlink(missing_ok=True)

    def _kept(self, path: Path, rows: pa.Table) -> pa.Table:
        """The rows of a file that stay when these come."""
        before = pq.ParquetFile(path).read()
        if not before.schema.equals(self.schema):
            raise EdgekitError(
                f"{path} has other columns: it was written with another model or version of edgekit; "
                "archive into a new folder"
            )
        return before.filter(pa.array(~np.isin(before[OFFSET].to_numpy(), rows[OFFSET].to_numpy())))


def read(folder: Path) -> ds.Dataset:
    """The archive as a dataset, with `night` as a column: `read(folder).to_table(filter=...)`."""
    return ds.dataset(folder, format="parquet", partitioning=PARTITIONING)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    """Have the names in a folder on disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        number = getattr(error, "errno", None)
        advice = "free some space" if number in (errno.ENOSPC, errno.EDQUOT) else "see that the folder can be written"
        reason = os.strerror(number) if number else str(error)
        raise EdgekitError(
            f"the archive cannot write {path}: {reason}; {advice} and start again: these rows will come again"
        ) from error
