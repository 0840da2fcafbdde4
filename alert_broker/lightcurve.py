"""A batch of light curves in Arrow's list layout: flat columns plus row offsets, ready for compiled kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FLUX_ZERO_POINT = 27.5  # AB magnitude of one flux unit: SNANA's FLUXCAL, the unit of PLAsTiCC and of the published t2


@dataclass(frozen=True, slots=True)
class LightCurves:
    """Difference-image photometry of many objects.

    offsets: (objects + 1,) int64, the points of object i are `offsets[i]:offsets[i + 1]`; time: (points,) float64, MJD
    in days, ascending within an object; band: (points,) int8, index into `bands`; flux, flux_error: (points,) float64
    in FLUXCAL (zero point 27.5 AB), negative if the source faded; detected: (points,) bool, true for a detection above
    the survey's threshold and false for forced photometry.
    """

    bands: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    time: npt.NDArray[np.float64]
    band: npt.NDArray[np.int8]
    flux: npt.NDArray[np.float64]
    flux_error: npt.NDArray[np.float64]
    detected: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def points(self) -> npt.NDArray[np.int64]:
        """(objects,) number of points of each object."""
        return np.diff(self.offsets)

    def take(self, objects: Sequence[int] | npt.NDArray[np.integer]) -> LightCurves:
        """Return the objects at these positions, in this order. A position may occur several times."""
        objects = np.asarray(objects, dtype=np.int64)
        rows = concatenate_ranges(self.offsets[objects], self.offsets[objects + 1])
        return LightCurves(
            self.bands,
            np.concatenate([[0], np.cumsum(self.points[objects])]).astype(np.int64),
            self.time[rows],
            self.band[rows],
            self.flux[rows],
            self.flux_error[rows],
            self.detected[rows],
        )

    def where(self, keep: npt.NDArray[np.bool_]) -> LightCurves:
        """Return the points for which `keep`, (points,) bool, is true. An object without such points stays, empty."""
        kept_before = np.concatenate([[0], np.cumsum(keep)])
        return LightCurves(
            self.bands,
            kept_before[self.offsets].astype(np.int64),
            self.time[keep],
            self.band[keep],
            self.flux[keep],
            self.flux_error[keep],
            self.detected[keep],
        )

    @property
    def object_of_point(self) -> npt.NDArray[np.int64]:
        """(points,) index of the object of each point."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.points)


def concatenate(batches: Iterable[LightCurves]) -> LightCurves:
    """Join batches that have the same bands."""
    items = list(batches)
    assert items
    assert all(item.bands == items[0].bands for item in items)
    starts = np.cumsum([0] + [int(item.offsets[-1]) for item in items])
    offsets = [item.offsets[:-1] + start for item, start in zip(items, starts[:-1], strict=True)]
    return LightCurves(
        items[0].bands,
        np.concatenate([*offsets, starts[-1:]]).astype(np.int64),
        np.concatenate([item.time for item in items]),
        np.concatenate([item.band for item in items]),
        np.concatenate([item.flux for item in items]),
        np.concatenate([item.flux_error for item in items]),
        np.concatenate([item.detected for item in items]),
    )


def concatenate_ranges(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return all integers of [start, stop) for each pair, joined: the row numbers of ragged rows."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    shifts: npt.NDArray[np.int64] = np.repeat(starts - (ends - lengths), lengths)
    return np.arange(len(shifts), dtype=np.int64) + shifts
