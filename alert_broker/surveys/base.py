"""What a survey is: its bands, the fields that it reads, and how light curves are extracted from a batch of its alert
packets.

A new survey is one file beside this one: a subclass of `Survey` with `name`, `bands`, `wavelengths`, `fields`, and the
methods `recognises_schema`, `recognises_columns` and `extract`. `surveys()` finds it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from alert_broker.lightcurve import LightCurves
from edgekit.errors import EdgekitError, unknown

MAGNITUDE_TO_LOG10 = -0.4  # Pogson's definition: five magnitudes are a factor of 100 in flux
# In every survey here, exposures of one band start at least 15 s apart. So two rows closer than this are one exposure
# that was reported twice: as a detection and as forced photometry, or by two overlapping images.
SAME_EPOCH_DAYS = 1e-4
MJD_RANGE = (10_000.0, 100_000.0)  # years 1886 to 2132; a number outside this range is damaged and no date

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class PacketError(EdgekitError):
    """A packet without a usable light curve. The message is the reason that the packet's row shows."""


@dataclass(frozen=True, slots=True)
class LightCurve:
    """The photometry in one alert packet: arrays as in `LightCurves`, sorted by time, one point per exposure.

    upper_limits: number of exposures without a detection or a flux; dropped: number of rows that were left out because
    a value is missing, not finite, not positive where it must be, or in a band that the survey does not have.
    """

    alert_id: int
    object_id: str
    time: Floats
    band: npt.NDArray[np.int8]
    flux: Floats
    flux_error: Floats
    detected: npt.NDArray[np.bool_]
    upper_limits: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Points:
    """Rows of photometry as read, (rows,) each. A missing value is NaN, and an unknown band is -1.

    owner: the alert of each row, ascending.
    """

    owner: Integers
    time: Floats
    band: npt.NDArray[np.int8]
    flux: Floats
    flux_error: Floats
    detected: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one record, or of one list of records, of all alerts: Arrow columns by field name.

    owner: (rows,) the alert of each row, ascending; nullable: the fields that are null in every row if there is no
    column for them.
    """

    owner: Integers
    columns: Mapping[str, pa.Array]
    nullable: frozenset[str] = frozenset()

    def column(self, name: str) -> pa.Array:
        """Return the field's column. Raises KeyError if there is none, unless the field is nullable."""
        if name not in self.columns and name in self.nullable:
            return pa.nulls(len(self.owner))
        return self.columns[name]

    def numbers(self, name: str) -> Floats:
        """Return the field as (rows,) float64, with NaN for null."""
        if len(self.owner) == 0:  # a list that is empty in every packet may come without its fields
            return np.empty(0)
        values = self.column(name)
        if not pa.types.is_float64(values.type):
            values = values.cast(pa.float64(), safe=False)
        return np.asarray(values.to_numpy(zero_copy_only=False))

    def integers(self, name: str, *, optional: bool = False) -> Integers:
        """Return the field as (rows,) int64, with 0 for null. An optional field that the record does not have is 0 in
        all rows."""
        if optional and name not in self.columns:
            return np.zeros(len(self.owner), np.int64)
        return np.asarray(pc.fill_null(self.column(name).cast(pa.int64()), 0).to_numpy())

    def positions(self, name: str, labels: Sequence[Any]) -> npt.NDArray[np.int8]:
        """Return (rows,) the index of each value among the labels, -1 for a value that is not one of them."""
        if len(self.owner) == 0:
            return np.empty(0, np.int8)
        column = self.column(name)
        if pa.types.is_null(column.type):
            return np.full(len(self.owner), -1, np.int8)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        found = pc.index_in(column, options=_value_set(tuple(labels), column.type))
        return np.asarray(pc.fill_null(found, -1).to_numpy().astype(np.int8))

    def where(self, keep: npt.NDArray[np.bool_]) -> Rows:
        """Return the rows for which `keep`, (rows,) bool, is true."""
        mask = pa.array(keep)
        columns = {name: column.filter(mask) for name, column in self.columns.items()}
        return Rows(self.owner[keep], columns, self.nullable)


class Packets:
    """A batch of packets as Arrow columns: the survey's `fields`, with records as structs, and lists of such structs.

    errors: the reason why an alert has no usable light curve, by the alert's number. The first reason is kept.
    nullable: paths that are null in every packet if there is no column for them.
    """

    def __init__(self, columns: pa.RecordBatch, nullable: frozenset[str] = frozenset()) -> None:
        self._nullable = nullable
        self.errors: dict[int, str] = {}
        self._columns = {name: columns.column(k) for k, name in enumerate(columns.schema.names)}
        self._count = columns.num_rows

    def __len__(self) -> int:
        return int(self._count)

    def column(self, name: str) -> pa.Array:
        """Return the column of a top-level field. Raises KeyError if there is none."""
        return self._columns[name]

    def record(self, name: str) -> Rows:
        """Return the records in a field, one for each alert."""
        return self._rows(name, np.arange(self._count), self._columns[name])

    def lists(self, name: str, *, optional: bool = False) -> Rows:
        """Return the rows of the lists of records in a field. A null list has no rows, and neither has an optional
        field that the packets do not have."""
        optional = optional or name in self._nullable
        column = pa.nulls(self._count) if optional and name not in self._columns else self._columns[name]
        if pa.types.is_null(column.type):
            return Rows(np.empty(0, np.int64), {})
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            raise TypeError(f"{name} is of type {column.type}; expected a list")
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        return self._rows(name, np.repeat(np.arange(self._count), lengths), column.flatten())

    def _rows(self, name: str, owner: Integers, records: pa.Array) -> Rows:
        if len(owner) == 0:  # a list that is empty in every packet may come without its type
            return Rows(owner, {})
        if not pa.types.is_struct(records.type):
            raise TypeError(f"{name} is of type {records.type}; expected a record")
        for alert in owner[records.is_null().to_numpy(zero_copy_only=False)].tolist():
            self.fail(alert, f"{name} or a row in it is null")
        columns = dict(zip((item.name for item in records.type), records.flatten(), strict=True))
        prefix = f"{name}."
        nullable = frozenset(path.removeprefix(prefix) for path in self._nullable if path.startswith(prefix))
        return Rows(owner, columns, nullable)

    def fail(self, alert: int, reason: str) -> None:
        self.errors.setdefault(alert, reason)


@dataclass(frozen=True, slots=True)
class Photometry:
    """The photometry that a survey read in a batch of packets. parts: points, most trusted first; upper_limits:
    (alerts,)."""

    alert_id: pa.Array
    object_id: list[str]
    parts: Sequence[Points]
    upper_limits: Integers


@dataclass(frozen=True, slots=True)
class Extracted:
    """The light curves of a batch of packets, with the numbers of `LightCurve` for each. errors: alert to reason; the
    other values of such an alert have no meaning."""

    curves: LightCurves
    alert_id: Integers
    object_id: list[str]
    upper_limits: Integers
    dropped: Integers
    errors: Mapping[int, str]


class Survey(ABC):
    """One survey's alert packets. `fields` maps each top-level field that is read to the fields that are read inside
    it."""

    name: ClassVar[str]
    bands: ClassVar[tuple[str, ...]]
    wavelengths: ClassVar[tuple[float, ...]]  # effective wavelengths in angstrom, one for each band
    fields: ClassVar[Mapping[str, tuple[str, ...]]]
    # The paths of these fields that may be null in some version of the survey's schema. A Parquet file often lacks a
    # column that would be null everywhere, so such a field may be absent from a table.
    nullable: ClassVar[frozenset[str]] = frozenset()
    # The survey's Avro record: its full name, by which the survey is recognised when a table's rows are replayed.
    record: ClassVar[str]
    cutouts: ClassVar[tuple[str, str, str]] = ("cutoutScience", "cutoutTemplate", "cutoutDifference")  # bytes, as paths

    @abstractmethod
    def recognises_schema(self, name: str) -> bool:
        """Whether an Avro record with this full name is this survey's alert."""

    @abstractmethod
    def recognises_columns(self, columns: frozenset[str]) -> bool:
        """Whether a table with these columns (such as `diaSource.psfFlux`; lists add no name) holds this survey's
        alerts."""

    @abstractmethod
    def extract(self, packets: Packets) -> Photometry:
        """Return the photometry of the packets. If a field is missing, the method may simply raise KeyError."""

    def schema_id(self, name: str) -> int | None:
        """Return the Confluent id of the schema with this name, if the survey sends its packets in that format."""
        return None

    @property
    def paths(self) -> list[str]:
        """The fields that are read, as dotted paths."""
        return [path for top, inner in self.fields.items() for path in ([f"{top}.{name}" for name in inner] or [top])]

    def paths_in(self, columns: frozenset[str]) -> list[str]:
        """The fields that are read from a table with these columns: `paths`, without other versions' names."""
        return self.paths

    def missing(self, columns: frozenset[str]) -> list[str]:
        """Return the fields that a table with these columns lacks, although they may not be null."""
        absent = [path for path in self.paths_in(columns) if path not in columns | self.nullable]
        records = {name.split(".")[0] for name in columns if "." in name}  # a list that is always empty has no fields
        return [path for path in absent if path.split(".")[0] in records or path.split(".")[0] not in self.nullable]

    def light_curves(self, columns: pa.RecordBatch, *, table: bool = False) -> Extracted:
        """Return the light curves of a batch of packets. table: whether they are rows of a table, in which absent
        nullable fields are null; in Avro, a schema without them is one that this survey does not know. Raises
        PacketError if the same reason holds for all packets."""
        packets = Packets(columns, self.nullable if table else frozenset())
        try:
            found = self.extract(packets)
            alert_id = _identifiers(found.alert_id, packets)
        except KeyError as error:
            raise PacketError(f"the {self.name} packet has no field {error}") from error
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise PacketError(f"the {self.name} packet has a malformed field: {error}") from error
        curves, dropped = _curves_of_points(found.parts, len(packets), self.bands)
        return Extracted(curves, alert_id, found.object_id, found.upper_limits, dropped, packets.errors)


@functools.lru_cache(maxsize=64)
def _value_set(labels: tuple[Any, ...], dtype: pa.DataType) -> pc.SetLookupOptions:
    """Return labels to be looked up in columns of a type. They are made once, because a batch has a dozen such
    columns."""
    return pc.SetLookupOptions(value_set=pa.array(labels).cast(dtype))


@functools.cache
def surveys() -> Mapping[str, Survey]:
    """Return every survey by name. The surveys are the subclasses in the modules of this package."""
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found: dict[str, Survey] = {}
    pending = list(Survey.__subclasses__())
    while pending:
        survey = pending.pop()
        pending += survey.__subclasses__()
        found[survey.name] = survey()
    return dict(sorted(found.items()))


def survey_named(name: str) -> Survey:
    """Return the survey with this name. Raises EdgekitError with the known names if there is none."""
    if name not in surveys():
        raise unknown("survey", name, surveys())
    return surveys()[name]


def fluxcal(magnitude_offset: float | Floats) -> Any:
    """Return 10^(-0.4 x): the flux in FLUXCAL of a magnitude 27.5 + x, or the factor that converts a flux of zero point
    27.5 + x to FLUXCAL."""
    return 10.0 ** (MAGNITUDE_TO_LOG10 * magnitude_offset)


def join(curves: Sequence[LightCurve], bands: tuple[str, ...]) -> LightCurves:
    """Return the light curves of one survey's alerts as one ragged batch, in the same order."""
    empty = np.empty(0)
    return LightCurves(
        bands,
        np.cumsum([0] + [len(curve.time) for curve in curves]).astype(np.int64),
        np.concatenate([empty, *(curve.time for curve in curves)]),
        np.concatenate([empty.astype(np.int8), *(curve.band for curve in curves)]),
        np.concatenate([empty, *(curve.flux for curve in curves)]),
        np.concatenate([empty, *(curve.flux_error for curve in curves)]),
        np.concatenate([empty.astype(np.bool_), *(curve.detected for curve in curves)]),
    )


def _curves_of_points(parts: Sequence[Points], alerts: int, bands: tuple[str, ...]) -> tuple[LightCurves, Integers]:
    """Join the parts, most trusted first: drop rows that are no measurement, keep one point per exposure, and sort by
    time. Return the light curves and the number of rows dropped from each alert."""
    owner, time, band, flux, flux_error = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("owner", "time", "band", "flux", "flux_error")
    )
    detected = np.concatenate([np.full(len(part.time), part.detected) for part in parts])
    with np.errstate(invalid="ignore"):
        valid = (time > MJD_RANGE[0]) & (time < MJD_RANGE[1]) & (flux_error > 0) & (band >= 0)
    valid &= np.isfinite(flux) & np.isfinite(flux_error)
    dropped = np.bincount(owner[~valid], minlength=alerts)
    order = np.flatnonzero(valid)
    order = order[np.argsort(owner[order], kind="stable")]  # by alert, and within an alert in the order of the parts
    kept = order[_first_of_each_exposure(owner[order], band[order], time[order])]
    kept = kept[np.lexsort((time[kept], owner[kept]))]
    offsets = np.searchsorted(owner[kept], np.arange(alerts + 1))
    curves = LightCurves(bands, offsets, time[kept], band[kept], flux[kept], flux_error[kept], detected[kept])
    return curves, dropped


def _first_of_each_exposure(owner: Integers, band: npt.NDArray[np.int8], time: Floats) -> Integers:
    """Return the positions of the first row, in the given order, of each exposure: the rows of an alert in one band
    within SAME_EPOCH_DAYS."""
    if len(time) == 0:
        return np.empty(0, np.int64)
    order = np.lexsort((time, band, owner))
    new = np.ones(len(order), np.bool_)
    new[1:] = (np.diff(owner[order]) != 0) | (np.diff(band[order]) != 0) | (np.diff(time[order]) > SAME_EPOCH_DAYS)
    return np.sort(np.minimum.reduceat(order, np.flatnonzero(new))).astype(np.int64)


def _identifiers(column: pa.Array, packets: Packets) -> Integers:
    """Return (alerts,) the alerts' ids. An alert has failed if it has no id, or an id that is not a 64-bit integer."""
    if not pa.types.is_integer(column.type) and not pa.types.is_null(column.type):
        raise TypeError(f"the alert's id is of type {column.type}; expected a 64-bit integer")
    numbers = np.asarray(pc.fill_null(column.cast(pa.int64(), safe=False), 0).to_numpy())
    unusable = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_uint64(column.type):
        unusable = unusable | (numbers < 0)  # a number of 2^63 or more became negative
    for alert in np.flatnonzero(unusable).tolist():
        packets.fail(alert, f"the alert's id is {column[alert].as_py()}; expected a 64-bit integer")
    return numbers
