"""What a survey gives: its bands, the fields it reads, and the light curve inside one alert packet.

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

from alert_broker.lightcurve import LightCurves
from edgekit.errors import EdgekitError, unknown

MAGNITUDE_TO_LOG10 = -0.4  # Pogson: five magnitudes are a factor of 100 in flux
# Exposures of one band start at least 15 s apart in every survey here, so two rows closer than this are one exposure
# reported twice: as a detection and as forced photometry, or by two overlapping images.
SAME_EPOCH_DAYS = 1e-4
MJD_RANGE = (10_000.0, 100_000.0)  # years 1886 to 2132: outside it the number is damage, not a date

Row = Mapping[str, Any]
Floats = npt.NDArray[np.float64]


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
    """Rows of photometry as read, (rows,) each; NaN where a value is missing, band -1 where it is unknown."""

    time: Floats
    band: npt.NDArray[np.int8]
    flux: Floats
    flux_error: Floats
    detected: bool


class Survey(ABC):
    """One survey's alert packets. `fields` maps each top-level field that is read to the fields read inside it."""

    name: ClassVar[str]
    bands: ClassVar[tuple[str, ...]]
    wavelengths: ClassVar[tuple[float, ...]]  # effective, in angstrom, one for each band
    fields: ClassVar[Mapping[str, tuple[str, ...]]]

    @abstractmethod
    def recognises_schema(self, name: str) -> bool:
        """Whether an Avro record of this full name is this survey's alert."""

    @abstractmethod
    def recognises_columns(self, columns: frozenset[str]) -> bool:
        """Whether a table with these columns (`diaSource.psfFlux`, lists not marked) holds this survey's alerts."""

    @abstractmethod
    def extract(self, packet: Row) -> LightCurve:
        """The light curve of a packet; a field that is not there may simply raise KeyError."""

    def light_curve(self, packet: Row) -> LightCurve:
        """The light curve of one decoded packet; PacketError with the reason where there is none."""
        try:
            return self.extract(packet)
        except KeyError as error:
            raise PacketError(f"the {self.name} packet has no field {error}") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PacketError(f"the {self.name} packet has a malformed field: {error}") from error


@functools.cache
def surveys() -> Mapping[str, Survey]:
    """Every survey by name, from the modules of this package."""
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found: dict[str, Survey] = {}
    pending = list(Survey.__subclasses__())
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        found[kind.name] = kind()
    return dict(sorted(found.items()))


def survey_named(name: str) -> Survey:
    """The survey of this name; EdgekitError with the known names otherwise."""
    if name not in surveys():
        raise unknown("survey", name, surveys())
    return surveys()[name]


def fluxcal(magnitude_offset: float | Floats) -> Any:
    """10^(-0.4 x): the flux in FLUXCAL of a magnitude 27.5 + x, or the factor from zero point 27.5 + x to FLUXCAL."""
    return 10.0 ** (MAGNITUDE_TO_LOG10 * magnitude_offset)


def table(rows: Sequence[Row], names: Sequence[str]) -> Floats:
    """(names, rows) float64 of the rows' fields, NaN for null."""
    values = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    return values.reshape(len(rows), len(names)).T


def band_indices(labels: Sequence[Any], index: Mapping[Any, int]) -> npt.NDArray[np.int8]:
    """(rows,) band numbers by the survey's label, -1 for a label it does not have."""
    return np.array([index.get(label, -1) for label in labels], dtype=np.int8)


def curve_of_points(alert_id: int, object_id: str, parts: Sequence[Points], upper_limits: int = 0) -> LightCurve:
    """Join the parts, most trusted first: drop what is not a measurement, keep one point per exposure, sort by time."""
    time, flux, flux_error = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("time", "flux", "flux_error")
    )
    band = np.concatenate([part.band for part in parts])
    detected = np.concatenate([np.full(len(part.time), part.detected) for part in parts])
    with np.errstate(invalid="ignore"):
        valid = (time > MJD_RANGE[0]) & (time < MJD_RANGE[1]) & (flux_error > 0) & (band >= 0)
    measured = np.flatnonzero(valid & np.isfinite(flux) & np.isfinite(flux_error))
    kept = measured[_first_of_each_exposure(time[measured], band[measured])]
    kept = kept[np.argsort(time[kept], kind="stable")]
    dropped = len(time) - len(measured)
    return LightCurve(
        _identifier(alert_id), object_id, time[kept], band[kept], flux[kept], flux_error[kept], detected[kept],
        upper_limits, dropped,
    )  # fmt: skip


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


def _first_of_each_exposure(time: Floats, band: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """Positions of the first row, in the order given, of each group in one band within SAME_EPOCH_DAYS."""
    if len(time) == 0:
        return np.empty(0, np.int64)
    order = np.lexsort((time, band))
    new = np.ones(len(order), np.bool_)
    new[1:] = (np.diff(band[order]) != 0) | (np.diff(time[order]) > SAME_EPOCH_DAYS)
    return np.sort(np.minimum.reduceat(order, np.flatnonzero(new))).astype(np.int64)


def _identifier(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise PacketError(f"the alert's id is {value!r}; expected a 64-bit integer")
    return value
