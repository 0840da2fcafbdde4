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


def cut_at_detection(
    curves: LightCurves, rng: np.random.Generator, *, window_days: float = 365.0
) -> tuple[LightCurves, npt.NDArray[np.int64]]:
    """Return light curves as the packet of one of their detections shows them, and which detection of its light curve
    that is, from 1 on: no point after it, and none from more than `window_days` before it. Every detection is equally
    likely; a light curve without detections stays whole, and its number is 0."""
    owner, count = curves.object_of_point, len(curves)
    found = np.bincount(owner[curves.detected], minlength=count)
    chosen = np.where(found > 0, rng.integers(0, np.maximum(found, 1)) + 1, 0)
    return at_detection(curves, chosen, window_days=window_days), chosen


def at_detection(curves: LightCurves, number: npt.NDArray[np.int64], *, window_days: float = 365.0) -> LightCurves:
    """Return light curves as the packets of these detections, (objects,) from 1 on, show them; 0 leaves a light curve
    whole. A light curve with fewer detections is shown as at its last one."""
    owner, count = curves.object_of_point, len(curves)
    found = np.bincount(owner[curves.detected], minlength=count)
    before = np.cumsum(found) - found
    times = curves.time[curves.detected]
    last = np.full(count, np.inf)
    cut = (number > 0) & (found > 0)
    last[cut] = times[(before + np.minimum(number, found) - 1)[cut]]
    inside = (curves.time <= last[owner]) & ((curves.time >= (last - window_days)[owner]) | ~cut[owner])
    return curves.where(inside)


def in_bands(curves: LightCurves, bands: tuple[str, ...]) -> LightCurves:
    """Return the points in these bands, as a survey with only these bands sees them."""
    return curves.where(np.isin(curves.band, [curves.bands.index(band) for band in bands]))
