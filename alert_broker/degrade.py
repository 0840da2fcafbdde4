"""Incomplete light curves, as an alert shows them: for training beside complete ones, and for measuring early
classification."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from alert_broker.lightcurve import LightCurves


def degraded(curves: LightCurves, rng: np.random.Generator) -> LightCurves:
    """Return light curves as alerts show them: half are cut early, a third lack forced photometry, and some are thinned
    out."""
    owner, count = curves.object_of_point, len(curves)
    first = first_detection(curves)
    days = np.where(rng.random(count) < 0.5, 10 ** rng.uniform(-0.5, 2.3, count), np.inf)
    keep = curves.time <= (first + days)[owner]
    keep &= curves.detected | (rng.random(count) > 1 / 3)[owner]
    keep &= rng.random(len(owner)) >= (rng.random(count) * 0.4 * (rng.random(count) < 0.5))[owner]
    kept = np.bincount(owner[keep], minlength=count)
    return curves.where(keep | (kept == 0)[owner])  # no light curve becomes empty


def first_detection(curves: LightCurves) -> npt.NDArray[np.float64]:
    """Return (objects,) the time of the first detection, or of the first point if nothing was detected."""
    first = np.full(len(curves), np.inf)
    np.minimum.at(first, curves.object_of_point[curves.detected], curves.time[curves.detected])
    starts = curves.time[np.minimum(curves.offsets[:-1], len(curves.time) - 1)]
    return np.where(np.isfinite(first), first, starts)


def as_seen_after(curves: LightCurves, days: float) -> LightCurves:
    """Return the points that an alert would have shown this long after the first detection."""
    return curves.where(curves.time <= (first_detection(curves) + days)[curves.object_of_point])


def in_bands(curves: LightCurves, bands: tuple[str, ...]) -> LightCurves:
    """Return the points in these bands, as a survey with only these bands sees them."""
    return curves.where(np.isin(curves.band, [curves.bands.index(band) for band in bands]))
