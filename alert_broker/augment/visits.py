"""When a survey visits a field, in which filter, and how deep: histories of visits that are drawn at random.

Those of LSST are the visits of the training sample itself; those of ZTF are drawn from its public cadence and depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from alert_broker.lightcurve import FLUX_ZERO_POINT, LightCurves
from alert_broker.simulate import CADENCES, DETECTION_SNR, visits
from alert_broker.surveys.base import fluxcal, survey_named

Floats = npt.NDArray[np.float64]

# Electrons by FLUXCAL in a visit of 30 s: the zero points of ugrizy for one electron per second are those of the LSST
# overview's throughputs (Ivezic+ 2019).
LSST_ELECTRONS = tuple(30.0 * 10 ** (0.4 * (zero - 27.5)) for zero in (27.03, 28.38, 28.16, 27.85, 27.46, 26.68))
MOST_SHARE_BRIGHT = 0.2  # a sample's light curve shows the sky's noise if no more of its points than this are bright
BRIGHT = 5.0  # in units of the error


@dataclass(frozen=True, slots=True)
class History:
    """Visits of one field: (visits,) times in MJD, positions of the filters in `wavelengths`, the noise of the sky in
    FLUXCAL, and electrons by FLUXCAL."""

    bands: tuple[str, ...]
    wavelengths: Floats
    time: Floats
    band: npt.NDArray[np.int8]
    sky: Floats
    electrons: Floats


class Histories(Protocol):
    """A survey's visits, and how likely it detects a source."""

    def draw(self, rng: np.random.Generator) -> History: ...

    def detection(self, signal_to_noise: Floats) -> Floats:
        """Return the probability of a detection at a noise-free |flux| / error."""
        ...


@dataclass(frozen=True)
class SampleHistories:
    """The visits of a sample's own light curves. deep: (objects,) whether the field is one of the few deep ones;
    deep_share: the share of histories that are of a deep field."""

    curves: LightCurves
    deep: npt.NDArray[np.bool_]
    efficiency: tuple[Floats, Floats]  # noise-free |flux| / error, and the share of such points that is detected
    deep_share: float = 0.02  # of the objects of PLAsTiCC's test set, about

    @classmethod
    def of(cls, curves: LightCurves, deep: npt.NDArray[np.bool_], efficiency: tuple[Floats, Floats]) -> SampleHistories:
        """Keep the light curves that are faint most of the time, because their errors are those of the sky."""
        bright = np.abs(curves.flux) > BRIGHT * curves.flux_error
        share = np.bincount(curves.object_of_point[bright], minlength=len(curves)) / np.maximum(curves.points, 1)
        kept = np.flatnonzero(share <= MOST_SHARE_BRIGHT)
        return cls(curves.take(kept), deep[kept], efficiency)

    @cached_property
    def _rows(self) -> dict[bool, npt.NDArray[np.int64]]:
        """The light curves of wide and of deep fields; all of them if the sample has none of one sort."""
        sorts = {sort: np.flatnonzero(self.deep == sort) for sort in (False, True)}
        return {sort: rows if len(rows) else np.arange(len(self.deep)) for sort, rows in sorts.items()}

    def draw(self, rng: np.random.Generator) -> History:
        rows = self._rows[rng.random() < self.deep_share]
        one = self.curves.take([int(rows[rng.integers(len(rows))])])
        electrons = np.array(LSST_ELECTRONS)[one.band]
        # A bright point's error holds the noise of the source's own light, which is not the sky's.
        sky = np.sqrt(np.maximum(one.flux_error**2 - np.maximum(one.flux, 0) / electrons, 0.25 * one.flux_error**2))
        return History(one.bands, np.array(survey_named("lsst").wavelengths), one.time.copy(), one.band, sky, electrons)

    def detection(self, signal_to_noise: Floats) -> Floats:
        return np.asarray(np.interp(signal_to_noise, *self.efficiency))


@dataclass(frozen=True, slots=True)
class ZtfHistories:
    """Seasons of ZTF's public survey in g and r."""

    seasons: int = 1

    def draw(self, rng: np.random.Generator) -> History:
        cadence, survey = CADENCES["ztf"], survey_named("ztf")
        time, band = visits(rng, cadence)
        limit = np.array(cadence.depth)[band] + cadence.scatter * rng.standard_normal(len(time))
        sky = fluxcal(limit - FLUX_ZERO_POINT) / DETECTION_SNR
        electrons = np.full(len(time), cadence.electrons)
        return History(survey.bands, np.array(survey.wavelengths), time, band.astype(np.int8), sky, electrons)

    def detection(self, signal_to_noise: Floats) -> Floats:
        return np.asarray((signal_to_noise >= DETECTION_SNR).astype(np.float64))


def measured_efficiency(signal: Floats, detected: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return |flux| / error at the middle of each bin that has points, and the share of its points that were
    detected."""
    edges = np.concatenate([[0.0, 1.0, 2.0, 3.0], np.arange(3.5, 8.0, 0.5), [8.0, 9.0, 10.0, 12.0, 15.0, 20.0]])
    cell = np.digitize(signal, edges) - 1
    size = np.bincount(cell, minlength=len(edges))
    found = np.bincount(cell[detected], minlength=len(edges))
    centre = np.append(0.5 * (edges[1:] + edges[:-1]), edges[-1] * 1.5)
    used = size > 0
    return centre[used], (found[used] / size[used]).astype(np.float64)
