"""The results that classification writes: their columns, the account of all packets, and Parquet files that appear only
when they are complete."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from alert_broker.containers import BadPacket
from alert_broker.packets import AlertBatch
from alert_broker.surveys.base import surveys
from edgekit.errors import EdgekitError

CLASSIFIED = "classified"
METADATA = b"edgekit"  # key of the Parquet file's metadata, whose value is JSON of the account, with models and runtime
SHORT_DIGEST = 12  # characters by which results name a bundle
ROW_GROUP = 32_768  # rows per Parquet row group: some MB in memory, and large enough to be read quickly
STAGES = ("start", "decode", "features", "inference")

ERRORS = pa.schema(
    [
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("packets", pa.int64()),  # number of packets that the row stands for
        ("status", pa.string()),  # "error": damaged; "skipped": sound, but no survey reads it
        ("reason", pa.string()),
    ]
)


@cache
def all_bands() -> tuple[str, ...]:
    """Return the bands of all surveys, from blue to red."""
    wavelength = {band: w for item in surveys().values() for band, w in zip(item.bands, item.wavelengths, strict=True)}
    return tuple(sorted(wavelength, key=wavelength.__getitem__))


def result_schema(classes: Sequence[str]) -> pa.Schema:
    """Return the columns of the result, which are the same for every survey. Class and probabilities are null for an
    alert that was not classified."""
    columns = [("alert_id", pa.int64()), ("object_id", pa.string()), ("survey", pa.string()), ("status", pa.string())]
    columns += [("best_class", pa.string()), ("best_probability", pa.float32())]
    columns += [(f"p_{name}", pa.float32()) for name in classes]
    columns += [(f"n_det_{band}", pa.int32()) for band in all_bands()]
    columns += [(name, pa.int32()) for name in ("n_forced", "n_upper_limits", "n_dropped")]
    columns += [(name, pa.string()) for name in ("model", "bundle", "prior", "file")] + [("offset", pa.int64())]
    return pa.schema(columns)


@dataclass(slots=True)
class CutoutAccount:
    """The account of the images: every row of the result has a score, or a reason why not."""

    model: str
    digest: str
    runtime: str
    scored: int
    unscored: Counter[str]  # by reason


@dataclass(slots=True)
class Account:
    """The account of all packets: packets = classified + the sum of skipped + corrupt."""

    files: int = 0
    packets: int = 0  # counted when they are read; all other numbers are counted when they are written
    classified: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    corrupt: int = 0
    surveys: Counter[str] = field(default_factory=Counter)  # rows of the result
    classes: Counter[str] = field(default_factory=Counter)  # the classified alerts by their most probable class
    models: dict[str, str] = field(default_factory=dict)  # name to digest
    prior: str = "uniform"  # the class shares that the probabilities are for
    runtime: str = ""  # the runtime, its provider and its device, as they really are
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    stopped: bool = False
    cutouts: CutoutAccount | None = None  # None if images are not scored

    def add_bad(self, bad: BadPacket) -> None:
        if bad.status == "error":
            self.corrupt += bad.packets
        elif bad.packets:  # an empty file stands for no packet
            self.skipped[bad.reason.split(":")[0]] += bad.packets

    def add_rows(self, rows: pa.RecordBatch) -> None:
        statuses = _counts(rows["status"])
        self.classified += statuses.pop(CLASSIFIED, 0)
        self.skipped.update(statuses)
        self.classes.update(_counts(rows["best_class"].drop_null()))
        self.surveys.update(_counts(rows["survey"]))

    def check(self, rows: int) -> None:
        """Raise unless every packet is accounted for, and every alert that was read has its row."""
        if rows != self.surveys.total():
            raise EdgekitError(
                f"{self.surveys.total()} alerts were read, but {rows} rows were written; "
                "this is a bug in edgekit, please report it"
            )
        if self.cutouts is not None and rows != self.cutouts.scored + self.cutouts.unscored.total():
            raise EdgekitError(
                f"{rows} rows were written, but the images of {self.cutouts.scored} alerts were scored and those of "
                f"{self.cutouts.unscored.total()} were not; this is a bug in edgekit, please report it"
            )
        if self.packets != self.classified + self.skipped.total() + self.corrupt:
            raise EdgekitError(
                f"the account does not add up: {self.packets} packets read, {self.classified} classified + "
                f"{self.skipped.total()} skipped + {self.corrupt} corrupt written; "
                "this is a bug in edgekit, please report it"
            )

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "in": self.packets,
            "classified": self.classified,
            "skipped": self.skipped.total(),
            "corrupt": self.corrupt,
            "stopped": self.stopped,
            "files": self.files,
            "reasons": dict(self.skipped.most_common()),
            "surveys": dict(self.surveys.most_common()),
            "classes": dict(self.classes.most_common()),
            "models": self.models,
            "prior": self.prior,
            "runtime": self.runtime,
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
        }
        if self.cutouts is not None:
            found["cutouts"] = asdict(self.cutouts) | {"unscored": dict(self.cutouts.unscored.most_common())}
        return found


class ResultTable:
    """A Parquet file that appears, complete, if the block succeeds. If the block raises, no file appears."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self.rows = path, schema, 0
        self._partial = path.with_name(f".{path.name}.{os.getpid()}")
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> Self:
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._partial, self.schema, compression="zstd")
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        try:
            with _writing(self.path):
                if error_type is None:
                    self._flush()
                self._writer.close()
                if error_type is None:
                    self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, rows: pa.RecordBatch) -> None:
        self._waiting.append(rows)
        self.rows += rows.num_rows
        if sum(item.num_rows for item in self._waiting) >= ROW_GROUP:
            with _writing(self.path):
                self._flush()

    def describe(self, values: Mapping[str, object]) -> None:
        """Store these values in the file's metadata, as JSON."""
        self._writer.add_key_value_metadata({METADATA: json.dumps(values).encode()})

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting, self.schema), row_group_size=ROW_GROUP)
            self._waiting.clear()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # pyarrow's errors are OSErrors too
        raise EdgekitError(f"{path} cannot be written: {error.strerror or error}; choose another path") from None


def result_rows(batch: AlertBatch, schema: pa.Schema, columns: Mapping[str, pa.Array]) -> pa.RecordBatch:
    """Return rows of the result: these columns, and the columns that come from the alerts themselves."""
    alerts, bands, count = batch.alerts, batch.survey.bands, len(batch.curves)
    detections, forced = (
        alerts[name].flatten().to_numpy().reshape(count, len(bands)) for name in ("n_detections", "n_forced")
    )
    known: dict[str, pa.Array] = dict(zip(alerts.schema.names, alerts.columns, strict=True))
    known |= dict.fromkeys((f"n_det_{band}" for band in all_bands()), pa.array(np.zeros(count, np.int32)))
    known |= {f"n_det_{band}": pa.array(detections[:, k]) for k, band in enumerate(bands)}
    known |= {"n_forced": pa.array(forced.sum(axis=1), pa.int32())}
    return fill({**known, **columns}, schema, count)


def fill(columns: Mapping[str, pa.Array], schema: pa.Schema, count: int) -> pa.RecordBatch:
    """Return the columns of the schema. A column that is not given is null."""
    arrays = [columns[item.name] if item.name in columns else pa.nulls(count, item.type) for item in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def texts(
    codes: npt.NDArray[np.int64], values: Sequence[str], null: npt.NDArray[np.bool_] | None = None
) -> pa.StringArray:
    """Return (rows,) the value of each code."""
    return pa.array(values, pa.string()).take(pa.array(codes, mask=null))


def repeat(value: str, count: int) -> pa.StringArray:
    return pa.repeat(pa.scalar(value, pa.string()), count)


def _counts(values: pa.Array) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in values.value_counts().to_pylist()}
