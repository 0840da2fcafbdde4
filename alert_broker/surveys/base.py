"""What a survey gives: its bands, the fields it reads, and the light curves inside a batch of alert packets.

A further survey is one file beside this one: a subclass of `Survey` with `name`, `bands`, `wavelengths`, `fields`, and
the methods `recognises_schema`, `recognises_columns` and `extract`. `surveys()` finds it.
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

MAGNITUDE_TO_LOG10 = -0.4  # Pogson: five magnitudes are a factor of 100 in flux
# Exposures of one band start at least 15 s apart in every survey here, so two rows closer than this are one exposure
# reported twice: as a detection and as forced photometry, or by two overlapping images.
SAME_EPOCH_DAYS = 1e-4
MJD_RANGE = (10_000.0, 100_000.0)  # years 1886 to 2132: outside it the number is damage, not a date

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class PacketError(EdgekitError):
    """A packet that gives no light curve; the message is the reason that its row carries."""


@dataclass(frozen=True, slots=True)
class LightCurve:
    """The photometry in one alert packet: arrays as in `LightCurves`, sorted by time, one point per exposure.

    upper_limits: exposures without a detection or a flux; dropped: rows left out because a value is missing, not
    finite, not positive where it must be, or in a band that the survey does not have.
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
    """Rows of photometry as read, (rows,) each; NaN where a value is missing, band -1 where it is unknown.

    owner: the alert that each row belongs to, ascending.
    """

    owner: Integers
    time: Floats
    band: npt.NDArray[np.int8]
    flux: Floats
    flux_error: Floats
    detected: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a record, or of a list of records, of all alerts: Arrow columns by the name of the field.

    owner: (rows,) the alert that each row belongs to, ascending.
    """

    owner: Integers
    columns: Mapping[str, pa.Array]

    def numbers(self, name: str) -> Floats:
        """(rows,) float64, NaN for null."""
        if len(self.owner) == 0:  # of a list that is empty everywhere, the fields may not be known
            return np.empty(0)
        values = self.columns[name]
        if not pa.types.is_float64(values.type):
            values = values.cast(pa.float64(), safe=False)
        return np.asarray(values.to_numpy(zero_copy_only=False))

    def integers(self, name: str, *, optional: bool = False) -> Integers:
        """(rows,) int64, 0 for null and, if the field is optional, where it is not there."""
        if optional and name not in self.columns:
            return np.zeros(len(self.owner), np.int64)
        return np.asarray(pc.fill_null(self.columns[name].cast(pa.int64()), 0).to_numpy())

    def positions(self, name: str, labels: Sequence[Any]) -> npt.NDArray[np.int8]:
        """(rows,) where each value stands among the labels, -1 for a value that is none of them."""
        if len(self.owner) == 0:
            return np.empty(0, np.int8)
        column = self.columns[name]
        if pa.types.is_null(column.type):
            return np.full(len(self.owner), -1, np.int8)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        found = pc.index_in(column, options=_value_set(tuple(labels), column.type))
        return np.asarray(pc.fill_null(found, -1).to_numpy().astype(np.int8))

    def where(self, keep: npt.NDArray[np.bool_]) -> Rows:
        """The rows at which `keep`, (rows,) bool, is true."""
        mask = pa.array(keep)
        return Rows(self.owner[keep], {name: column.filter(mask) for name, column in self.columns.items()})


class Packets:
    """A batch of packets as Arrow columns: the survey's `fields` at the top, with records as structs and their lists.

    errors: why an alert gives no light curve, by its number; the first reason is kept.
    """

    def __init__(self, columns: pa.RecordBatch) -> None:
        self.errors: dict[int, str] = {}
        self._columns = {name: columns.column(k) for k, name in enumerate(columns.schema.names)}
        self._count = columns.num_rows

    def __len__(self) -> int:
        return int(self._count)

    def column(self, name: str) -> pa.Array:
        """The column of a field at the top; KeyError if there is none."""
        return self._columns[name]

    def record(self, name: str) -> Rows:
        """The records in a field, one for each alert."""
        return self._rows(name, np.arange(self._count), self._columns[name])

    def lists(self, name: str, *, optional: bool = False) -> Rows:
        """The rows of the lists of records in a field; none where it is null or, if it is optional, not there."""
        column = pa.nulls(self._count) if optional and name not in self._columns else self._columns[name]
        if pa.types.is_null(column.type):
            return Rows(np.empty(0, np.int64), {})
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            raise TypeError(f"{name} is of type {column.type}; expected a list")
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        return self._rows(name, np.repeat(np.arange(self._count), lengths), column.flatten())

    def _rows(self, name: str, owner: Integers, records: pa.Array) -> Rows:
        if len(owner) == 0:  # of a list that is empty everywhere, the type may not be known
            return Rows(owner, {})
        if not pa.types.is_struct(records.type):
            raise TypeError(f"{name} is of type {records.type}; expected a record")
        for alert in owner[records.is_null().to_numpy(zero_copy_only=False)].tolist():
            self.fail(alert, f"{name} is null, or a row of it is")
        return Rows(owner, dict(zip((item.name for item in records.type), records.flatten(), strict=True)))

    def fail(self, alert: int, reason: str) -> None:
        self.errors.setdefault(alert, reason)


@dataclass(frozen=True, slots=True)
class Photometry:
    """What a survey reads in a batch of packets. parts: points, most trusted first; upper_limits: (alerts,)."""

    alert_id: pa.Array
    object_id: list[str]
    parts: Sequence[Points]
    upper_limits: Integers


@dataclass(frozen=True, slots=True)
class Extracted:
    """Light curves of a batch of packets, with the numbers of `LightCurve` for each; errors: alert to reason, and what
    such an alert has elsewhere means nothing."""

    curves: LightCurves
    alert_id: Integers
    object_id: list[str]
    upper_limits: Integers
    dropped: Integers
    errors: Mapping[int, str]


class Survey(ABC):
    """One survey's alert packets. `fields` maps each top-level field that is read to the fields read inside it."""

    name: ClassVar[str]
    bands: ClassVar[tuple[str, ...]]
    wavelengths: ClassVar[tuple[float, ...]]  # effective, in angstrom, one for each band
    fields: ClassVar[Mapping[str, tuple[str, ...]]]
    record: ClassVar[
        str
    ]  # full name, by which it is recognised, of the Avro record that a row of a table is replayed as
    cutouts: ClassVar[tuple[str, str, str]] = ("cutoutScience", "cutoutTemplate", "cutoutDifference")  # bytes, as paths

    @abstractmethod
    def recognises_schema(self, name: str) -> bool:
        """Whether an Avro record of this full name is this survey's alert."""

    @abstractmethod
    def recognises_columns(self, columns: frozenset[str]) -> bool:
        """Whether a table with these columns (`diaSource.psfFlux`, lists not marked) holds this survey's alerts."""

    @abstractmethod
    def extract(self, packets: Packets) -> Photometry:
        """The photometry of the packets; a field that is not there may simply raise KeyError."""

    def schema_id(self, name: str) -> int | None:
        """The Confluent id of the schema with this name, if the survey sends its packets in that format."""
        return None

    @property
    def paths(self) -> list[str]:
        """The fields that are read, as dotted paths."""
        return [path for top, inner in self.fields.items() for path in ([f"{top}.{name}" for name in inner] or [top])]

    def light_curves(self, columns: pa.RecordBatch) -> Extracted:
        """The light curves of a batch of packets; PacketError with the reason where it is the same for all of them."""
        packets = Packets(columns)
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
    """Labels to be looked up in columns of a type; made once, for a batch has a dozen such columns."""
    return pc.SetLookupOptions(value_set=pa.array(labels).cast(dtype))


@functools.cache
def surveys() -> Mapping[str, Survey]:
    """Every survey by name, from the modules of this package."""
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
    """The survey of this name; EdgekitError with the known names otherwise."""
    if name not in surveys():
        raise unknown("survey", name, surveys())
    return surveys()[name]


def fluxcal(magnitude_offset: float | Floats) -> Any:
    """10^(-0.4 x): the flux in FLUXCAL of a magnitude 27.5 + x, or the factor from zero point 27.5 + x to FLUXCAL."""
    return 10.0 ** (MAGNITUDE_TO_LOG10 * magnitude_offset)


def join(curves: Sequence[LightCurve], bands: tuple[str, ...]) -> LightCurves:
    """The light curves of one survey's alerts as one ragged batch, in the same order."""
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
    """Join the parts, most trusted first: drop what is not a measurement, keep one point per exposure, sort by time.

    Returns also the number of rows dropped from each alert.
    """
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
    order = order[np.argsort(owner[order], kind="stable")]  # by alert, and within it as the parts stand
    kept = order[_first_of_each_exposure(owner[order], band[order], time[order])]
    kept = kept[np.lexsort((time[kept], owner[kept]))]
    offsets = np.searchsorted(owner[kept], np.arange(alerts + 1))
    curves = LightCurves(bands, offsets, time[kept], band[kept], flux[kept], flux_error[kept], detected[kept])
    return curves, dropped


def _first_of_each_exposure(owner: Integers, band: npt.NDArray[np.int8], time: Floats) -> Integers:
    """Positions of the first row, in the order given, of each group of an alert in one band within SAME_EPOCH_DAYS."""
    if len(time) == 0:
        return np.empty(0, np.int64)
    order = np.lexsort((time, band, owner))
    new = np.ones(len(order), np.bool_)
    new[1:] = (np.diff(owner[order]) != 0) | (np.diff(band[order]) != 0) | (np.diff(time[order]) > SAME_EPOCH_DAYS)
    return np.sort(np.minimum.reduceat(order, np.flatnonzero(new))).astype(np.int64)


def _identifiers(column: pa.Array, packets: Packets) -> Integers:
    """(alerts,) the alerts' ids; an alert without one, or with one that is no 64-bit integer, has failed."""
    if not pa.types.is_integer(column.type) and not pa.types.is_null(column.type):
        raise TypeError(f"the alert's id is of type {column.type}; expected a 64-bit integer")
    numbers = np.asarray(pc.fill_null(column.cast(pa.int64(), safe=False), 0).to_numpy())
    unusable = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_uint64(column.type):
        unusable = unusable | (numbers < 0)  # wrapped around
    for alert in np.flatnonzero(unusable).tolist():
        packets.fail(alert, f"the alert's id is {column[alert].as_py()}; expected a 64-bit integer")
    return numbers
