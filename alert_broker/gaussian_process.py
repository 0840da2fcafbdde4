"""Light curves interpolated by a Gaussian process over time and wavelength: a compiled fit of every object in a batch.

The model is the one that the published preprocessing of t2 (astronet, after avocado) builds with george and scipy. Here
one alert takes tens of microseconds: covariances, their Cholesky factors and inverses are computed in 4 x 8 tiles that
stay in vector registers, and a Newton method needs six evaluations of the likelihood where L-BFGS-B needs eleven.

The work on one object is bounded. The fit is exact up to `max_points` points; an object that has more is reduced by
`merge_points` first. A `Budget` gives up an object that takes too long, and stops the work on request.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from alert_broker.lightcurve import LightCurves
from alert_broker.merge_points import merge_points
from alert_broker.vectors import LANES, exp, inlined, lane_sum, load, splat, spread, sqrt, store
from alert_broker.work_budget import AT, COMMAND, STOP, Budget, Shared
from edgekit.errors import EdgekitError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ROWS = 4  # rows of a tile: 4 x 8 sums, a row and a factor fill the sixteen registers of AVX2
WHITE_NOISE = 1.25e-12  # variance that george adds to every point
KERNEL_DIMENSIONS = 2.0  # george stores ln(constant / dimensions): half the kernel's amplitude
JITTER = 1e-8  # added to the relative variance of a singular covariance: an error of 1e-4 of the brightest point
FIRST_RADIUS = 2.0  # of the trust region: a factor of 2.7 in the time scale
SMALLEST_RADIUS = 1e-6
POINTS_PER_THREAD = 2048  # a thread is not worth its start for a smaller share
MAX_POINTS = 512  # 60 ms in a usual fit on one core of a server; PLAsTiCC's longest light curve has 352
UNWATCHED_POINTS = 128  # so many points in all take a third of a second at worst: no thread watches the work on them


class Status(IntEnum):
    """The outcome of an object's fit. The mean is always finite; it is zero if nothing could be fitted."""

    OK = 0
    NO_POINTS = 1  # no point is usable: the mean is zero
    NO_FLUX = 2  # every flux is zero, so that there is no amplitude to fit: the mean is zero
    NOT_CONVERGED = 3  # the best parameters after `max_evaluations` are used
    REGULARISED = 4  # the errors are too small for the covariance to be factored: `JITTER` was added
    OVERFLOW = 5  # the squares of the fluxes leave the range of doubles: the mean is zero
    OVER_TIME = 6  # the fit took longer than its budget allows: the mean is zero


_OK, _NO_POINTS, _NO_FLUX, _NOT_CONVERGED, _REGULARISED, _OVERFLOW, _OVER_TIME = (int(status) for status in Status)

_compiled: Callable[..., Any] = njit(cache=True, error_model="numpy")

# ----------------------------------------------------------------------------------------------------------------------
# One object: points in time order, fluxes relative to the brightest, a = ln amplitude and m = ln metric to be found.
#
# `points` holds vectors over the points, `matrix` strips of eight columns in which element (row, column) stands at
# strip + row * 8 + column % 8, so that every tile is read front to back:
#
#                 tiles on and above the diagonal     tiles on and below it
#   left strips   K, then U of K = U^T U, then -K^-1
#   right strips  dK/dm (diagonal tiles: see corner)  V = U^-T
#   corner strip  dK/dm, diagonal tiles
#   target strip  the fluxes y, then z = V y

TIME, COLOUR, FLUX, NOISE, PIVOT, ALPHA, BY_A, BY_M, SCRATCH, VECTORS = range(10)


@inlined
def _padded(count: int, multiple: int) -> int:
    return (count + multiple - 1) // multiple * multiple


@inlined
def _layout(count: int) -> tuple[int, int, int, int, int, int]:
    """Return the numbers of rows and strips, the size of a strip, and the starts of the right, corner and target
    strips."""
    rows, strips = _padded(count, ROWS), _padded(count, LANES) // LANES
    size = rows * LANES
    return rows, strips, size, strips * size, 2 * strips * size, (2 * strips + 1) * size


@inlined
def _subtract_product(matrix: Floats, tile: int, left: int, above: int, depth: int, overwrite: bool) -> None:
    """Subtract left^T above, each of `depth` rows, from the tile, or from zero if `overwrite`. All the n^3
    work is here."""
    s0 = s1 = s2 = s3 = splat(0.0)
    for _ in range(depth):
        row = load(matrix, above)
        s0 = s0 + spread(matrix, left) * row
        s1 = s1 + spread(matrix, left + 1) * row
        s2 = s2 + spread(matrix, left + 2) * row
        s3 = s3 + spread(matrix, left + 3) * row
        left += LANES
        above += LANES
    t0 = t1 = t2 = t3 = splat(0.0)
    if not overwrite:
        t0 = load(matrix, tile)
        t1 = load(matrix, tile + LANES)
        t2 = load(matrix, tile + 2 * LANES)
        t3 = load(matrix, tile + 3 * LANES)
    store(matrix, tile, t0 - s0)
    store(matrix, tile + LANES, t1 - s1)
    store(matrix, tile + 2 * LANES, t2 - s2)
    store(matrix, tile + 3 * LANES, t3 - s3)


@inlined
def _substitute(matrix: Floats, tile: int, triangle: Floats, first: int, pivot: Floats, row: int) -> None:
    """Solve U^T x = tile for the 4 x 4 triangle U that starts at `first` and has 1 / `pivot` on its diagonal."""
    second, third = first + LANES, first + 2 * LANES
    x0 = load(matrix, tile) * spread(pivot, row)
    x1 = (load(matrix, tile + LANES) - spread(triangle, first + 1) * x0) * spread(pivot, row + 1)
    x2 = load(matrix, tile + 2 * LANES) - spread(triangle, first + 2) * x0
    x2 = (x2 - spread(triangle, second + 2) * x1) * spread(pivot, row + 2)
    x3 = load(matrix, tile + 3 * LANES) - spread(triangle, first + 3) * x0
    x3 = (x3 - spread(triangle, second + 3) * x1 - spread(triangle, third + 3) * x2) * spread(pivot, row + 3)
    store(matrix, tile, x0)
    store(matrix, tile + LANES, x1)
    store(matrix, tile + 2 * LANES, x2)
    store(matrix, tile + 3 * LANES, x3)


@inlined
def _factor_corner(matrix: Floats, corner: int, triangle: Floats, pivot: Floats, row: int) -> bool:
    """Factor a 4 x 4 block by Cholesky: U above its diagonal goes to `triangle`, 1 / its diagonal to `pivot`. Return
    False if the block is not positive definite."""
    for i in range(ROWS):
        for j in range(i, ROWS):
            value = matrix[corner + i * LANES + j]
            for k in range(i):
                value -= triangle[k * LANES + i] * triangle[k * LANES + j]
            if i < j:
                triangle[i * LANES + j] = value * pivot[row + i]
            elif value > 0.0:
                pivot[row + i] = 1.0 / math.sqrt(value)
            else:
                return False
    return True


@inlined
def _covariance(
    matrix: Floats, tile: int, slope: int, row: int, column: int, points: Floats, amplitude: float, rate: float
) -> None:
    """Write a tile of K and one of dK/dm: Rasmussen & Williams 2006, eq. 4.17 with nu = 3/2. The coordinates are
    multiplied by sqrt 3."""
    times, colours = points[TIME], points[COLOUR]
    for i in range(ROWS):
        time = load(times, column) - spread(times, row + i)
        colour = load(colours, column) - spread(colours, row + i)
        square = time * time * splat(rate)
        distance = sqrt(square + colour * colour)
        decay = exp(splat(0.0) - distance) * splat(amplitude)
        store(matrix, tile + i * LANES, decay + distance * decay)
        store(matrix, slope + i * LANES, square * decay * splat(0.5))


@_compiled
def _factor(matrix: Floats, points: Floats, count: int, a: float, m: float) -> float:
    """Return the negative log-likelihood without n/2 ln 2 pi, or infinity if K is singular; write U, dK/dm and z.

    Rasmussen & Williams 2006, algorithm 2.1, by rows of tiles: each row first subtracts the contributions of the rows
    above, and is then factored.
    """
    rows, strips, size, right, corner, target = _layout(count)
    amplitude, rate = math.exp(a), math.exp(-m)
    flux, noise, pivot, triangle = points[FLUX], points[NOISE], points[PIVOT], points[SCRATCH]
    log_determinant = 0.0
    square = 0.0
    for row in range(0, rows, ROWS):
        first, down, left = row // LANES, row * LANES, row // LANES * size + row % LANES
        for s in range(first, strips):
            slope = corner if s == first else right + s * size
            _covariance(matrix, s * size + down, slope + down, row, s * LANES, points, amplitude, rate)
        for i in range(ROWS):
            diagonal = left + down + i * (LANES + 1)
            matrix[diagonal] = matrix[diagonal] + noise[row + i] if row + i < count else 1.0
            store(matrix, target + down + i * LANES, spread(flux, row + i))
        for s in range(first, strips):
            _subtract_product(matrix, s * size + down, left, s * size, row, False)
        _subtract_product(matrix, target + down, left, target, row, False)
        if not _factor_corner(matrix, left + down, triangle, pivot, row):
            return np.inf
        for s in range(first, strips):
            _substitute(matrix, s * size + down, triangle, 0, pivot, row)
        _substitute(matrix, target + down, triangle, 0, pivot, row)
        log_determinant -= math.log(pivot[row] * pivot[row + 1] * pivot[row + 2] * pivot[row + 3])
        for i in range(ROWS):
            square += matrix[target + down + i * LANES] ** 2
    value = 0.5 * square + log_determinant
    return value if math.isfinite(value) else np.inf


@_compiled
def _solve(matrix: Floats, points: Floats, count: int) -> None:
    """Compute alpha = K^-1 y, after `_factor`."""
    rows, strips, size, _, _, target = _layout(count)
    pivot, alpha = points[PIVOT], points[ALPHA]
    for s in range(strips):
        store(alpha, s * LANES, splat(0.0))
    for row in range(rows - 1, -1, -1):  # U alpha = z, from the last row up; unknown elements still are zero
        known = splat(0.0)
        for s in range(row // LANES, strips):
            known = known + load(matrix, s * size + row * LANES) * load(alpha, s * LANES)
        alpha[row] = (matrix[target + row * LANES] - lane_sum(known)) * pivot[row]


@_compiled
def _invert(matrix: Floats, points: Floats, count: int) -> None:
    """Compute V = U^-T, and then -K^-1 = -V^T V, which replaces U."""
    rows, strips, size, right, _, _ = _layout(count)
    for row in range(0, rows, ROWS):
        first, down, left = row // LANES, row * LANES, row // LANES * size + row % LANES
        for s in range(first + 1):
            strip, start = right + s * size, s * LANES
            _subtract_product(matrix, strip + down, left + start * LANES, strip + start * LANES, row - start, True)
            if s == first:
                for i in range(ROWS):
                    matrix[strip + down + row % LANES + i * (LANES + 1)] = 1.0
            _substitute(matrix, strip + down, matrix, left + down, points[PIVOT], row)
    for first in range(strips):
        for s in range(first, strips):
            for row in range(first * LANES, min((first + 1) * LANES, rows), ROWS):
                start = max(row, s * LANES)  # V is zero above its diagonal
                left, above = right + first * size + row % LANES, right + s * size
                _subtract_product(
                    matrix, s * size + row * LANES, left + start * LANES, above + start * LANES, rows - start, True
                )


@_compiled
def _differentiate(matrix: Floats, points: Floats, count: int, m: float) -> tuple[float, ...]:
    """Return derivatives of the two terms of the negative log-likelihood, y^T K^-1 y / 2 and ln |K| / 2, after
    `_factor`.

    With v = dK alpha, the result is (ya, ym, vaa, vam, vmm, ymm, la, lm, laa). ya and ym are half of alpha^T v; the
    first term falls by them. vaa, vam and vmm are v^T K^-1 v, and ymm is half of alpha^T d2K/dm2 alpha; they make up
    the first term's Hessian. la, lm and laa are derivatives of the second term; its other second derivatives would need
    products of matrices. Rasmussen & Williams 2006, eq. 5.9; dK/da is K without the noise.
    """
    _solve(matrix, points, count)
    _invert(matrix, points, count)
    rows, strips, size, right, corner, _ = _layout(count)
    rate = math.exp(-m)
    times, colours, flux, noise = points[TIME], points[COLOUR], points[FLUX], points[NOISE]
    alpha, by_a, by_m = points[ALPHA], points[BY_A], points[BY_M]
    for s in range(0, strips * LANES, LANES):
        store(by_a, s, load(flux, s) - load(noise, s) * load(alpha, s))
        store(by_m, s, splat(0.0))
    trace = curve = splat(0.0)
    noise_trace = 0.0
    for row in range(rows):
        first, down = row // LANES, row * LANES
        noise_trace -= noise[row] * matrix[first * size + down + row % LANES]
        own, along = spread(alpha, row), splat(0.0)
        for s in range(first, strips):
            slope = load(matrix, (corner if s == first else right + s * size) + down)
            time = load(times, s * LANES) - spread(times, row)
            colour = load(colours, s * LANES) - spread(colours, row)
            square = time * time * splat(rate)
            distance = sqrt(square + colour * colour + splat(1e-300))  # never 0 / 0
            weighted = slope * load(alpha, s * LANES)
            bend = weighted * (square / (distance + distance) - splat(1.0)) * own
            inner = load(matrix, s * size + down) * slope
            along = along + weighted
            if s > first:  # a tile off the diagonal also counts for its mirror image
                store(by_m, s * LANES, load(by_m, s * LANES) + slope * own)
                bend = bend + bend
                inner = inner + inner
            curve = curve + bend
            trace = trace - inner
        by_m[row] += lane_sum(along)

    noise_square = vaa = vam = vmm = ya = ym = 0.0
    for row in range(rows):
        first, down = row // LANES, row * LANES
        along_a = along_m = along_noise = splat(0.0)
        for s in range(first, strips):
            inverse = load(matrix, s * size + down)
            squared = inverse * inverse
            if s > first:
                inverse = inverse + inverse
                squared = squared + squared
            along_a = along_a + inverse * load(by_a, s * LANES)
            along_m = along_m + inverse * load(by_m, s * LANES)
            along_noise = along_noise + squared * load(noise, s * LANES)
        total_a, total_m = lane_sum(along_a), lane_sum(along_m)
        noise_square += noise[row] * lane_sum(along_noise)
        vaa -= by_a[row] * total_a
        vam -= 0.5 * (by_a[row] * total_m + by_m[row] * total_a)
        vmm -= by_m[row] * total_m
        ya += alpha[row] * by_a[row]
        ym += alpha[row] * by_m[row]
    la, laa = 0.5 * (count - noise_trace), 0.5 * (noise_trace - noise_square)
    return 0.5 * ya, 0.5 * ym, vaa, vam, vmm, 0.5 * lane_sum(curve), la, 0.5 * lane_sum(trace), laa


@_compiled
def _box_step(
    da: float, dm: float, daa: float, dam: float, dmm: float, low_a: float, high_a: float, low_m: float, high_m: float
) -> tuple[float, float, float]:
    """Return the minimum of a convex quadratic within a box around zero, and the decrease that it promises."""
    daa += 1e-9  # a single epoch has no slope in m
    dmm += 1e-9
    determinant = daa * dmm - dam * dam
    if determinant > 1e-12 * daa * dmm:
        a = (dam * dm - dmm * da) / determinant
        m = (dam * da - daa * dm) / determinant
        if low_a <= a <= high_a and low_m <= m <= high_m:
            return a, m, -0.5 * (da * a + dm * m)
    best_a, best_m, best = 0.0, 0.0, 0.0
    for edge in range(4):  # the quadratic is flat or lowest outside the box: the minimum is on an edge
        if edge < 2:
            a = low_a if edge == 0 else high_a
            m = min(max(-(dm + dam * a) / dmm, low_m), high_m)
        else:
            m = low_m if edge == 2 else high_m
            a = min(max(-(da + dam * m) / daa, low_a), high_a)
        decrease = -(da * a + dm * m + 0.5 * (daa * a * a + 2.0 * dam * a * m + dmm * m * m))
        if decrease > best:
            best_a, best_m, best = a, m, decrease
    return best_a, best_m, best


@inlined
def _given_up(shared: Shared) -> bool:
    """Whether the calling thread wants no more work on the object at hand."""
    return shared[COMMAND] == STOP or shared[COMMAND] == shared[AT]


@_compiled
def _climb(
    matrix: Floats,
    points: Floats,
    count: int,
    constant: float,
    settings: tuple[float, ...],
    most: int,
    a: float,
    m: float,
    shared: Shared,
) -> tuple[float, float, float, int, int]:
    """Climb from (a, m) to a maximum of the likelihood by Newton steps in a trust region.

    The two second derivatives of ln |K| that `_differentiate` leaves out are estimated from the change of its gradient
    over the last step. Before the first step, and if the result is not convex, average information is used (Gilmour,
    Thompson & Cullis 1995). `constant` is the part of the negative log-likelihood that `_factor` leaves out.
    """
    start_a, a_reach, _, low_m, high_m, tolerance = settings
    value = constant + _factor(matrix, points, count, a, m)
    evaluations = 1
    if not math.isfinite(value):
        return a, m, value, evaluations, _OVERFLOW
    ya, ym, vaa, vam, vmm, ymm, la, lm, laa = _differentiate(matrix, points, count, m)
    lam = lmm = np.nan
    radius = FIRST_RADIUS
    status = _NOT_CONVERGED
    while evaluations < most:
        if _given_up(shared):
            return a, m, np.inf, evaluations, _OVER_TIME
        daa, dam, dmm = vaa - ya + laa, vam - ym + lam, vmm - ymm + lmm
        if not daa * dmm - dam * dam > 1e-4 * (daa + dmm) ** 2:
            daa, dam, dmm = 0.5 * vaa, 0.5 * vam, 0.5 * vmm
        step_a, step_m, promised = _box_step(
            la - ya,
            lm - ym,
            daa,
            dam,
            dmm,
            max(start_a - a_reach - a, -radius),
            min(start_a + a_reach - a, radius),
            max(low_m - m, -radius),
            min(high_m - m, radius),
        )
        goal = tolerance * max(abs(value), 1.0)
        if promised <= 0.01 * goal:
            status = _OK
            break
        trial = constant + _factor(matrix, points, count, a + step_a, m + step_m)
        evaluations += 1
        ratio = (value - trial) / promised
        if trial < value:
            a, m, value = a + step_a, m + step_m, trial
            if promised <= goal and 0.5 < ratio < 1.5:  # the model holds: the next step would gain far less
                status = _OK
                break
            la_before, lm_before, laa_before = la, lm, laa
            ya, ym, vaa, vam, vmm, ymm, la, lm, laa = _differentiate(matrix, points, count, m)
            if abs(step_m) > 1e-3:  # for a smaller step, rounding dominates the difference
                lam = (la - la_before - 0.5 * (laa_before + laa) * step_a) / step_m
                lmm = (lm - lm_before - lam * step_a) / step_m
        length = max(abs(step_a), abs(step_m))
        if ratio < 0.25:
            radius = 0.25 * length
        elif ratio > 0.75:
            radius = max(radius, 2.0 * length)
        if radius < SMALLEST_RADIUS:
            status = _OK
            break
    return a, m, value, evaluations, status


@_compiled
def _maximise(
    matrix: Floats, points: Floats, count: int, constant: float, settings: tuple[float, ...], most: int, shared: Shared
) -> tuple[float, float, float, int, int]:
    """Return (a, m, negative log-likelihood, evaluations, status) of the best maximum found, and leave it factored.

    A second maximum is common if points a night apart are nearly independent, and a corner of the bounds can be higher
    still (contradicting points at one time). This function also climbs from these two places. L-BFGS-B finds such a
    maximum only if its first trial step happens to lead there.
    """
    start_a, a_reach, start_m, low_m = settings[0], settings[1], settings[2], settings[3]
    a, m, value, evaluations, status = _climb(matrix, points, count, constant, settings, most, start_a, start_m, shared)
    if not math.isfinite(value):
        return a, m, value, evaluations, status
    for corner in range(2):
        from_a = start_a + a_reach if corner else a
        if corner:
            evaluations += 1
            if not constant + _factor(matrix, points, count, from_a, low_m) < value:
                continue
        other_a, other_m, other, more, other_status = _climb(
            matrix, points, count, constant, settings, most, from_a, low_m, shared
        )
        evaluations += more
        if other_status == _OVER_TIME:
            return a, m, np.inf, evaluations, _OVER_TIME
        if other < value:
            a, m, value, status = other_a, other_m, other, other_status
    _factor(matrix, points, count, a, m)
    return a, m, value, evaluations, status


@_compiled
def _predict(
    points: Floats, count: int, amplitude: float, rate: float, colours: Floats, span: float, mean: Floats
) -> None:
    """Compute the mean k(x*, X) alpha (Rasmussen & Williams 2006, eq. 2.25) at even times over the span, in every
    band."""
    times, positions, alpha, scratch = points[TIME], points[COLOUR], points[ALPHA], points[SCRATCH]
    grid = len(mean)
    step = span / (grid - 1) if grid > 1 else 0.0
    for first in range(0, grid, LANES):
        for i in range(LANES):
            scratch[i] = (first + i) * step
        when = load(scratch, 0)
        for band in range(len(colours)):
            where, total = spread(colours, band), splat(0.0)
            for j in range(count):
                time = when - spread(times, j)
                colour = where - spread(positions, j)
                distance = sqrt(time * time * splat(rate) + colour * colour)
                decay = exp(splat(0.0) - distance) * spread(alpha, j)
                total = total + decay + distance * decay
            store(scratch, 0, total * splat(amplitude))
            for i in range(min(LANES, grid - first)):
                mean[first + i, band] = scratch[i]


@_compiled
def _gather(
    points: Floats,
    begin: int,
    end: int,
    time: Floats,
    band: npt.NDArray[np.int8],
    flux: Floats,
    flux_error: Floats,
    colours: Floats,
) -> tuple[int, float, float, float]:
    """Copy an object's usable points. Return their number, the first and last time, and the |flux| of the most
    significant point."""
    count, peak, first, last = 0, -np.inf, np.inf, -np.inf
    for k in range(begin, end):
        finite = math.isfinite(time[k]) and math.isfinite(flux[k]) and math.isfinite(flux_error[k])
        if finite and flux_error[k] > 0.0 and 0 <= band[k] < len(colours):
            points[TIME, count], points[COLOUR, count] = time[k], colours[band[k]]
            points[FLUX, count], points[NOISE, count] = flux[k], flux_error[k]
            peak, first, last = max(peak, flux[k]), min(first, time[k]), max(last, time[k])
            count += 1
    scale, most = 0.0, -1.0
    for k in range(count):  # 1 % of the highest flux is the floor of the error, so that the brightest point wins
        significance = abs(points[FLUX, k]) / math.sqrt(points[NOISE, k] ** 2 + (0.01 * peak) ** 2)
        if significance > most:
            scale, most = abs(points[FLUX, k]), significance
    return count, first, last, scale


@njit(cache=True, error_model="numpy", nogil=True)
def _run(
    offsets: Integers,
    time: Floats,
    band: npt.NDArray[np.int8],
    flux: Floats,
    flux_error: Floats,
    colours: Floats,
    shown: Floats,
    settings: tuple[float, ...],
    most: int,
    given: bool,
    first_object: int,
    stride: int,
    largest: int,
    numbers: Floats,
    counts: Integers,
    mean: Floats,
    shared: Shared,
) -> None:
    """Process every stride-th object: fit it unless its parameters are `given`, and predict if `mean` has a grid."""
    size = _padded(largest, LANES)
    matrix = np.zeros(_padded(largest, ROWS) * (2 * size + 2 * LANES))
    points = np.zeros((VECTORS, max(size, ROWS * LANES)))
    log_amplitude, log_metric, log_likelihood = numbers[0], numbers[1], numbers[2]
    evaluations, status, used = counts[0], counts[1], counts[2]
    root = math.sqrt(3.0)
    for item in range(first_object, len(offsets) - 1, stride):
        mean[item] = 0.0
        log_likelihood[item] = np.nan
        if not given:
            log_amplitude[item] = log_metric[item] = np.nan
        evaluations[item] = 0
        shared[AT] = item + 1
        if _given_up(shared):
            return
        count, first, last, scale = _gather(
            points, offsets[item], offsets[item + 1], time, band, flux, flux_error, colours
        )
        used[item] = count
        if scale == 0.0:
            status[item] = _NO_FLUX if count else _NO_POINTS
            continue

        for k in range(count):
            points[TIME, k] = (points[TIME, k] - first) * root
            points[FLUX, k] /= scale
            points[NOISE, k] = (points[NOISE, k] / scale) ** 2 + WHITE_NOISE / scale / scale
        # the padding has a colour so far away that it correlates with nothing
        for k in range(count, _padded(count, LANES)):
            points[TIME, k] = points[FLUX, k] = points[NOISE, k] = 0.0
            points[COLOUR, k] = 1e6 * (1 + k - count)
        constant = count * (0.5 * math.log(2.0 * math.pi) + math.log(scale))
        unit = 2.0 * math.log(scale) - math.log(KERNEL_DIMENSIONS)
        if given:
            a, m = log_amplitude[item] - unit, log_metric[item]
            value = constant + _factor(matrix, points, count, a, m)
            evaluations[item], status[item] = 1, _OK if math.isfinite(value) else _OVERFLOW
        else:
            a, m, value, evaluations[item], status[item] = _maximise(
                matrix, points, count, constant, settings, most, shared
            )
            if not math.isfinite(value) and status[item] != _OVER_TIME:
                for k in range(count):
                    points[NOISE, k] += JITTER
                a, m, value, evaluations[item], status[item] = _maximise(
                    matrix, points, count, constant, settings, most, shared
                )
                if status[item] == _OK:
                    status[item] = _REGULARISED
        if math.isfinite(value):
            log_amplitude[item], log_metric[item], log_likelihood[item] = a + unit, m, -value
            _solve(matrix, points, count)
            _predict(points, count, math.exp(a) * scale, math.exp(-m), shown, (last - first) * root, mean[item])


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fit:
    """The result of the fit, (objects,) each; the numbers are NaN for an object that could not be fitted.

    log_amplitude: ln of half the kernel's amplitude in flux squared, george's `k1:log_constant`; log_metric: ln of the
    squared time scale in days, `k2:metric:log_M_0_0`; log_likelihood: natural logarithm of the likelihood;
    evaluations: of the likelihood; status: a `Status`; points: the number that was fitted. A point whose time, flux or
    error is not finite, or whose error is not positive, is not used; merged points count as one.
    """

    log_amplitude: Floats
    log_metric: Floats
    log_likelihood: Floats
    evaluations: Integers
    status: Integers
    points: Integers


@dataclass(frozen=True, slots=True)
class Interpolation:
    """mean: (objects, grid_points, bands) flux at even times from an object's first used point to its last."""

    mean: Floats
    fit: Fit


@dataclass(frozen=True, slots=True)
class GaussianProcess:
    """A Matern-3/2 process over time and wavelength for each light curve, as in the published t2 preprocessing.

    Results do not depend on the number of threads, nor on the other objects of the batch. The work is done in Python
    threads and not with numba's prange, whose pool aborts if two threads call it at once, as a server may, or after a
    fork.
    """

    wavelengths: tuple[float, ...]  # angstrom, in the order of LightCurves.bands
    grid_points: int = 100  # the sequence length that t2 was trained on
    length_scale_days: float = 20.0  # start: about the width of a supernova's peak
    length_scale_angstrom: float = 6000.0  # fixed: two to six bands cannot constrain it
    amplitude: float = 0.5  # start, in units of the brightest significant flux
    log_amplitude_reach: float = 10.0  # how far ln of the squared amplitude may move from its start
    length_scale_bounds_days: tuple[float, float] = (1.0, 1000.0)  # a night to three years
    tolerance: float = 1e-6  # relative, of the log-likelihood: what the reference asks of its optimizer
    max_evaluations: int = 100  # of one climb; the slowest of 7,848 PLAsTiCC objects takes 77, the mean 6
    max_points: int = MAX_POINTS  # objects with more are reduced by `merge_points`; benchmarks/gp_long.json: the error

    def __post_init__(self) -> None:
        low, high = self.length_scale_bounds_days
        if not 0.0 < low <= self.length_scale_days <= high < math.inf:
            raise EdgekitError(f"length_scale_days {self.length_scale_days}: expected within {low} to {high}, above 0")
        for name in ("grid_points", "max_evaluations", "max_points"):
            if getattr(self, name) < 1:
                raise EdgekitError(f"{name} is {getattr(self, name)}; expected 1 or more")

    def fit(self, curves: LightCurves, *, threads: int | None = None) -> Fit:
        """Return the parameters of highest likelihood for each object. threads: None for one thread per core."""
        return self._run(curves, threads, 0, None).fit

    def interpolate(
        self,
        curves: LightCurves,
        *,
        bands: Sequence[int] | None = None,
        threads: int | None = None,
        budget: Budget | None = None,
    ) -> Interpolation:
        """Fit each object, and predict the mean on its grid in the bands at these positions, whether or not the object
        was observed in them; by default in every band. budget: limits the time for each object."""
        return self._run(curves, threads, self.grid_points, None, bands, budget)

    def predict(
        self, curves: LightCurves, log_amplitude: Floats, log_metric: Floats, *, threads: int | None = None
    ) -> Interpolation:
        """Return the mean and the likelihood at given parameters, (objects,) in the units of `Fit`."""
        return self._run(curves, threads, self.grid_points, (log_amplitude, log_metric))

    def _run(
        self,
        curves: LightCurves,
        threads: int | None,
        grid: int,
        given: tuple[Floats, Floats] | None,
        bands: Sequence[int] | None = None,
        budget: Budget | None = None,
    ) -> Interpolation:
        if len(curves.bands) != len(self.wavelengths):
            raise EdgekitError(
                f"{len(self.wavelengths)} wavelengths for the bands {', '.join(curves.bands)}; expected one for each"
            )
        objects, budget = len(curves), budget or Budget()
        curves = merge_points(curves, self.max_points)
        numbers = np.full((3, objects), np.nan)
        if given is not None:
            numbers[0], numbers[1] = given
        counts = np.zeros((3, objects), dtype=np.int64)
        shown = np.arange(len(self.wavelengths)) if bands is None else np.array(bands, dtype=np.int64)
        mean = np.empty((objects, grid, len(shown)))
        low, high = self.length_scale_bounds_days
        settings = (
            2.0 * math.log(self.amplitude), self.log_amplitude_reach,
            2.0 * math.log(self.length_scale_days), 2.0 * math.log(low), 2.0 * math.log(high), self.tolerance,
        )  # fmt: skip
        # always one layout: numba would compile the kernel again for another
        columns = [np.require(curves.offsets, np.int64, "CAW")]
        columns += [np.require(curves.time, np.float64, "CAW"), np.require(curves.band, np.int8, "CAW")]
        columns += [np.require(values, np.float64, "CAW") for values in (curves.flux, curves.flux_error)]
        colours = np.array(self.wavelengths, dtype=np.float64) * (math.sqrt(3.0) / self.length_scale_angstrom)
        largest = int(curves.points.max(initial=0))
        workers = max(1, min(threads or cores(), objects, 1 + len(curves.time) // POINTS_PER_THREAD))

        def work(first: int, shared: Shared) -> None:
            _run(
                *columns,
                colours,
                colours[shown],
                settings,
                self.max_evaluations,
                given is not None,
                first,
                workers,
                largest,
                numbers,
                counts,
                mean,
                shared,
            )

        if workers == 1 and len(curves.time) <= UNWATCHED_POINTS:
            budget.check()
            work(0, np.zeros(2, np.int64))
        else:
            budget.run(work, workers)
        return Interpolation(mean, Fit(numbers[0], numbers[1], numbers[2], counts[0], counts[1], counts[2]))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_compiled() -> bool:
    """Return whether this process has the kernel. If not, the first call loads it from numba's cache or compiles it."""
    return bool(_run.signatures)


def warm_up() -> None:
    """Compile the kernels, some fifteen seconds, or load them from numba's cache on disk."""
    nothing = np.empty(0)
    empty = LightCurves(("g",), np.zeros(1, np.int64), nothing, nothing.astype(np.int8), nothing, nothing, nothing > 0)
    GaussianProcess((5000.0,)).fit(empty, threads=1)
    times = np.zeros(3)
    curve = LightCurves(("g",), np.array([0, 3]), times, times.astype(np.int8), times, times + 1.0, times > 0)
    merge_points(curve, 2)
