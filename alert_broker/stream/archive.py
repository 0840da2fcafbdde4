"""An archive of results as Parquet, partitioned by night. A replay cannot double a row, however it cuts its batches.

    FOLDER/night=2026-11-25/alerts-3-000000004096.parquet

Each file has the rows of one topic and partition whose offsets are in one segment: 4096 offsets from a multiple of 4096
on, which the file's name contains. So the message alone determines the file of its row. If the archive writes rows of a
segment whose file exists, they replace the rows with the same offsets and the other rows stay: the archive reads the
file, merges the rows and replaces the file in one step. So after a crash the consumer may start at any offset and cut
its batches anywhere, and every row is in the archive once.

When `write` has returned, the batch is on disk (fsync) and its offsets may be committed. If `write` fails, each file on
disk is the old one or the new one, and writing the batch again repairs it. Consumers on one machine may share a folder:
each partition has a lock. All rows of one message must be in one call, because they replace the message's earlier rows.
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

# This number is part of the layout and must not change: files of another length would overlap. A file is small enough
# to be written again for each batch (some 0.5 MB), and large enough that a night of ten million alerts is 2,500 files.
SEGMENT = 4096
# A night has the date of the evening on which it begins. UTC less 16 hours cuts no night: neither in Chile (22 to 10 h
# UTC) nor in California (2 to 14 h).
NIGHT_SHIFT = datetime.timedelta(hours=16)
DAY_MILLISECONDS = 86_400_000
NIGHTS = 100_000  # nights after 1970 that a time can have: up to the year 2243
POSITION = (("stream_topic", pa.string()), ("stream_partition", pa.int32()), ("stream_offset", pa.int64()))
OFFSET = "stream_offset"
PARTITIONING = ds.partitioning(pa.schema([("night", pa.string())]), flavor="hive")


@dataclass(frozen=True, slots=True)
class Positions:
    """The origin of rows, (rows,) each. timestamp: that of the message, in milliseconds since 1970 UTC; it determines
    the night, and is the same in a replay."""

    topic: list[str]
    partition: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    timestamp: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.topic)


class Archive:
    """A folder of results. Rows have `schema`; files also have the columns of POSITION."""

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
        """Add or replace rows, and return the files that now have them. Raises EdgekitError if they cannot be written,
        for example to a full disk."""
        if rows.num_rows != len(positions):
            raise EdgekitError(
                f"got {rows.num_rows} rows with the positions of {len(positions)}; expected a position for each row"
            )
        arrays = [*rows.columns, pa.array(positions.topic, pa.string()), pa.array(positions.partition, pa.int32())]
        whole = pa.Table.from_arrays([*arrays, pa.array(positions.offset, pa.int64())], schema=self.schema)
        groups: dict[Path, list[int]] = {}
        nights = (
            (positions.timestamp - NIGHT_SHIFT // datetime.timedelta(milliseconds=1)) // DAY_MILLISECONDS
        ).tolist()
        segments = (positions.offset // SEGMENT * SEGMENT).tolist()
        partitions = positions.partition.tolist()
        for row, key in enumerate(zip(nights, positions.topic, partitions, segments, strict=True)):
            groups.setdefault(self._file(*key), []).append(row)
        for path, indices in groups.items():
            self._merge(path, whole.take(pa.array(indices)))
        return list(groups)

    def _file(self, night: int, topic: str, partition: int, segment: int) -> Path:
        known = 0 <= night < NIGHTS  # a producer may send any time, or none
        evening = (datetime.date(1970, 1, 1) + datetime.timedelta(days=night)).isoformat() if known else "unknown"
        if topic[:1] in (".", "_"):
            topic = f"~{topic}"  # readers of Parquet folders skip such names; no topic has a tilde
        return self.folder / f"night={evening}" / f"{topic}-{partition}-{segment:012}.parquet"

    def _merge(self, path: Path, rows: pa.Table) -> None:
        """Put rows into a file, in the order of offsets. They replace the file's rows with the same offsets."""
        with _writing(path):
            if not path.parent.is_dir():
                path.parent.mkdir(exist_ok=True)
                _sync(self.folder)
            # pyarrow and other readers of Parquet folders skip names that begin with a dot
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            with _locked(self.folder / f".{path.name.rpartition('-')[0]}.lock"):
                for stale in path.parent.glob(f".{path.name}.*"):
                    stale.unlink()  # a killed process left this file
                if path.exists():
                    rows = pa.concat_tables([self._kept(path, rows), rows])
                order = np.argsort(rows[OFFSET].to_numpy(), kind="stable")
                try:
                    with partial.open("wb") as stream:
                        pq.write_table(rows.take(pa.array(order)), stream, compression="zstd")
                        stream.flush()
                        os.fsync(stream.fileno())
                    partial.replace(path)
                    _sync(path.parent)
                finally:
                    partial.unlink(missing_ok=True)

    def _kept(self, path: Path, rows: pa.Table) -> pa.Table:
        """Return the rows of a file that these rows do not replace."""
        before = pq.ParquetFile(path).read()
        if not before.schema.equals(self.schema):
            raise EdgekitError(
                f"{path} has other columns: it was written with another model or version of edgekit; "
                "choose a new folder for the archive"
            )
        return before.filter(pa.array(~np.isin(before[OFFSET].to_numpy(), rows[OFFSET].to_numpy())))


def read(folder: Path) -> ds.Dataset:
    """Return the archive as a dataset with a column `night`: `read(folder).to_table(filter=...)`."""
    return ds.dataset(folder, format="parquet", partitioning=PARTITIONING)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    """Write a folder's list of names to disk."""
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
        advice = "free some space" if number in (errno.ENOSPC, errno.EDQUOT) else "make the folder writable"
        reason = os.strerror(number) if number else str(error)
        raise EdgekitError(
            f"the archive cannot write {path}: {reason}; {advice} and start again: "
            "the consumer then reads these alerts again"
        ) from error
