"""Long light curves with neighbouring points merged, so that the work on one alert is bounded.

The cost of the Gaussian process grows with the cube of the number of points. An object with more points than the limit
keeps its first and its last point. Of the others, those of one band that lie within one width in time become one point:
the mean of their times and fluxes, weighted by the inverse variances, with the error of that mean. The width is the
smallest for which the limit holds. For points at one time this loses nothing (the mean is a sufficient statistic); for
others the weighted time removes the error of first order in width / time scale.
"""

from __future__ import annotations

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
WIDTH_PRECISION = 1e-6  # of the width, relative to the object's span

_compiled: Callable[..., Any] = njit(cache=True, error_model="numpy", nogil=True)


def merge_points(curves: LightCurves, most: int) -> LightCurves:
    """The same objects; each one with more than `most` points has at most `most` points left, or two more than it has
    bands. Points that are not usable do not count and are left out of the objects that are merged."""
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
    """One object with at most `most` usable points."""
    usable = np.isfinite(one.time) & np.isfinite(one.flux) & np.isfinite(one.flux_error)
    one = one.where(usable & (one.flux_error > 0) & (one.band >= 0) & (one.band < len(one.bands)))
    if len(one.time) <= most:
        return one
    order = np.argsort(one.time, kind="stable")
    time, band = one.time[order], one.band[order]
    group = np.empty(len(time), np.int64)
    count = _narrowest_groups(time, band, most, group)
    columns = np.zeros((4, count))
    detected, bands = np.zeros(count, np.bool_), np.zeros(count, np.int8)
    _average(time, band, one.flux[order], one.flux_error[order], group, columns, bands)
    np.logical_or.at(detected, group, one.detected[order])
    order = np.argsort(columns[0], kind="stable")
    time, flux, flux_error = columns[:3, order]
    return LightCurves(one.bands, np.array([0, count], np.int64), time, bands[order], flux, flux_error, detected[order])


@_compiled
def _group(time: Floats, band: Bands, width: float, group: Integers) -> int:
    """Number the groups of points; return how many there are. A group of a band begins with its earliest point and
    takes those up to `width` later: no other grouping of this width has fewer groups."""
    last = len(time) - 1
    current = np.full(BANDS, -1, np.int64)
    start = np.zeros(BANDS)
    count = 0
    for k in range(len(time)):
        alone = k in (0, last)
        if alone or current[band[k]] < 0 or time[k] - start[band[k]] > width:
            group[k] = count
            if not alone:
                current[band[k]], start[band[k]] = count, time[k]
            count += 1
        else:
            group[k] = current[band[k]]
    return count


@_compiled
def _narrowest_groups(time: Floats, band: Bands, most: int, group: Integers) -> int:
    """Number the groups of the smallest width that leaves at most `most`: a bisection, as fewer groups are left the
    larger the width is."""
    count = _group(time, band, 0.0, group)
    if count <= most:
        return int(count)
    low, high = 0.0, time[-1] - time[0]
    while high - low > WIDTH_PRECISION * (time[-1] - time[0]):
        middle = 0.5 * (low + high)
        if _group(time, band, middle, group) <= most:
            high = middle
        else:
            low = middle
    return int(_group(time, band, high, group))


@_compiled
def _average(
    time: Floats, band: Bands, flux: Floats, error: Floats, group: Integers, columns: Floats, bands: Bands
) -> None:
    """Time, flux and error of each group into the first rows of `columns`, and its band. Weights are relative to the
    smallest error of the group, so that their squares stay in the range of doubles."""
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
