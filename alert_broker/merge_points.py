"""Merge neighbouring points of long light curves, so that the work on one alert is bounded.

The cost of the Gaussian process grows with the cube of the number of points. An object with more points than the limit
keeps its first and its last point. Of the others, consecutive points of one band become one point: the mean of their
times and fluxes, weighted by the inverse variances, with the error of that mean. A point joins the group before it if

    (1 - k(t)) (1 + d^2)

is at most a threshold. k(t) is the correlation of the process over the days t since the group began, and d the
difference of the fluxes in units of its error. The threshold is the smallest for which the limit holds. So points of
one visit are merged first, which loses nothing (their mean is a sufficient statistic), then neighbours that agree, and
last those between which the flux changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from alert_broker.lightcurve import LightCurves, concatenate

Floats = npt.NDArray[np.float64]
Bands = npt.NDArray[np.int8]
Integers = npt.NDArray[np.int64]

BANDS = 128  # values of a band's index: it is an int8
TIME_SCALE_DAYS = 20.0  # of k: where the fit of the process starts, too
SMALLEST, LARGEST, BISECTIONS = -46.0, 709.0, 30  # ln of thresholds, from rounding to the range of doubles

_compiled: Callable[..., Any] = njit(cache=True, error_model="numpy", nogil=True)


def merge_points(curves: LightCurves, most: int) -> LightCurves:
    """Return the same objects. An object with more than `most` points is reduced to at most `most` points, or to its
    number of bands plus two if that is more. Unusable points do not count, and a reduced object does not contain
    them."""
    long = np.flatnonzero(curves.points > most)
    if len(long) == 0:
        return curves
    merged = {item: _merged(curves.take([item]), most) for item in long.tolist()}
    parts, start = [], 0
    for item, part in merged.items():
        parts += [curves.take(np.arange(start, item)), part]
        start = item + 1
    return concatenate([*parts, curves.take(np.arange(start, len(curves)))])


def _merged(one: LightCurves, most: int) -> LightCurves:
    """Return one object, reduced to at most `most` usable points."""
    usable = np.isfinite(one.time) & np.isfinite(one.flux) & np.isfinite(one.flux_error)
    one = one.where(usable & (one.flux_error > 0) & (one.band >= 0) & (one.band < len(one.bands)))
    if len(one.time) <= most:
        return one
    order = np.argsort(one.time, kind="stable")
    points = one.time[order], one.band[order], one.flux[order], one.flux_error[order]
    group = np.empty(len(order), np.int64)
    count = _smallest_groups(*points, most, group)
    columns = np.zeros((4, count))
    detected, bands = np.zeros(count, np.bool_), np.zeros(count, np.int8)
    _average(*points, group, columns, bands)
    np.logical_or.at(detected, group, one.detected[order])
    order = np.argsort(columns[0], kind="stable")
    time, flux, flux_error = columns[:3, order]
    return LightCurves(one.bands, np.array([0, count], np.int64), time, bands[order], flux, flux_error, detected[order])


@_compiled
def _group(time: Floats, band: Bands, flux: Floats, error: Floats, threshold: float, group: Integers) -> int:
    """Number the groups of points; return how many there are."""
    last = len(time) - 1
    # for each band: its current group, the time at which the group began, its mean flux and the error of the mean
    current = np.full(BANDS, -1, np.int64)
    start, mean, spread = np.zeros(BANDS), np.zeros(BANDS), np.zeros(BANDS)
    count = 0
    for k in range(len(time)):
        b = band[k]
        alone = k in (0, last)
        if not alone and current[b] >= 0:
            days = math.sqrt(3.0) * (time[k] - start[b]) / TIME_SCALE_DAYS
            scale = math.hypot(spread[b], error[k])
            difference = (flux[k] - mean[b]) / scale
            cost = (1.0 - (1.0 + days) * math.exp(-days)) * (1.0 + difference * difference)
            if not cost > threshold:  # a NaN joins as well: the limit must hold for all numbers
                group[k] = current[b]
                mean[b] += (spread[b] / scale) ** 2 * (flux[k] - mean[b])
                spread[b] *= error[k] / scale
                continue
        group[k] = count
        if not alone:
            current[b], start[b], mean[b], spread[b] = count, time[k], flux[k], error[k]
        count += 1
    return count


@_compiled
def _smallest_groups(time: Floats, band: Bands, flux: Floats, error: Floats, most: int, group: Integers) -> int:
    """Number the groups for the smallest threshold that leaves at most `most` groups; return how many there are."""
    count = _group(time, band, flux, error, 0.0, group)
    if count <= most:
        return int(count)
    low, high = SMALLEST, LARGEST
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        if _group(time, band, flux, error, math.exp(middle), group) <= most:
            high = middle
        else:
            low = middle
    return int(_group(time, band, flux, error, math.exp(high) if high < LARGEST else math.inf, group))


@_compiled
def _average(
    time: Floats, band: Bands, flux: Floats, error: Floats, group: Integers, columns: Floats, bands: Bands
) -> None:
    """Write the time, flux and error of each group to the first rows of `columns`, and its band to `bands`. Weights are
    relative to the smallest error of the group, so that their squares stay in the range of doubles."""
    means, fluxes, errors, total = columns[0], columns[1], columns[2], columns[3]
    for k in range(len(time)):
        g = group[k]
        bands[g] = band[k]
        if errors[g] == 0.0 or error[k] < errors[g]:
            errors[g] = error[k]
    for k in range(len(time)):
        total[group[k]] += (errors[group[k]] / error[k]) ** 2
    for k in range(len(time)):
        g = group[k]
        share = (errors[g] / error[k]) ** 2 / total[g]
        means[g] += share * time[k]
        fluxes[g] += share * flux[k]
    for g in range(len(total)):
        errors[g] /= np.sqrt(total[g])
