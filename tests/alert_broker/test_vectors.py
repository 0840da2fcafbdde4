"""Vectors of eight doubles are bitwise equal to NumPy, and the exponential is compared with one of higher precision."""

import math

import numpy as np
import pytest
from numba import njit

from alert_broker.vectors import LANES, exp, lane_sum, load, maximum, splat, spread, sqrt, store


@njit(error_model="numpy")  # not cached: numba would not see a change of alert_broker.vectors
def arithmetic(a, b, at, number, out):
    """Write one row of `out` for each operation on the elements from `at` on."""
    x, y = load(a, at), load(b, at)
    store(out, 0, x + y)
    store(out, LANES, x - y)
    store(out, 2 * LANES, x * y)
    store(out, 3 * LANES, x / y)
    store(out, 4 * LANES, maximum(x, y))
    store(out, 5 * LANES, sqrt(y))
    store(out, 6 * LANES, spread(a, at))
    store(out, 7 * LANES, splat(number))


@njit(error_model="numpy")  # not cached: numba would not see a change of alert_broker.vectors
def sums(values, out):
    for k in range(len(out)):
        out[k] = lane_sum(load(values, k * LANES))


@njit(error_model="numpy")  # not cached: numba would not see a change of alert_broker.vectors
def exponentials(values, out):
    for k in range(0, len(values), LANES):
        store(out, k, exp(load(values, k)))


def by_halves(values):
    """Return the sum in the order that the module promises."""
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]


@pytest.mark.parametrize("at", [0, 1, 3, 8])
def test_operations_are_numpys_lane_by_lane(at):
    """Elements may be unaligned, and the elements around them are neither read nor written."""
    rng = np.random.default_rng(at)
    a, b = rng.normal(size=24) * 10.0 ** rng.integers(-9, 9, 24), rng.uniform(0.1, 9, 24)
    a[at + 2], b[at + 3] = -0.0, 1e-300
    out = np.full(8 * LANES + 1, 7.0)
    arithmetic(a, b, at, math.pi, out)
    x, y = a[at : at + LANES], b[at : at + LANES]
    expected = [x + y, x - y, x * y, x / y, np.maximum(x, y), np.sqrt(y), np.full(8, a[at]), np.full(8, math.pi)]
    np.testing.assert_array_equal(out[:-1].reshape(8, LANES), expected)
    assert out[-1] == 7.0


def test_only_eight_elements_are_stored():
    values, out = np.full(LANES, -1.0), np.full(3 * LANES, 7.0)
    exponentials(values, out[LANES : 2 * LANES])
    assert (out[:LANES] == 7.0).all()
    assert (out[2 * LANES :] == 7.0).all()
    assert (out[LANES : 2 * LANES] != 7.0).all()


def test_lanes_are_summed_by_halves_always_in_the_same_order():
    """The sum of these numbers depends on the order; from left to right it would be another one."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(50, LANES)) * 10.0 ** rng.integers(-12, 12, (50, LANES))
    out = np.empty(50)
    sums(values.ravel(), out)
    assert out.tolist() == [by_halves(row) for row in values]
    assert out.tolist() != [sum(row.tolist()) for row in values]


def exponential(values):
    padded = np.concatenate([values, np.zeros(-len(values) % LANES)])
    out = np.empty_like(padded)
    exponentials(padded, out)
    return out[: len(values)]


def ulps(found, values):
    """Return the error in units of the last place, measured with an exponential with 64 bits of mantissa."""
    exact = np.exp(values.astype(np.longdouble))
    return np.abs(found - exact) / np.spacing(exact.astype(np.float64))


def test_the_exponential_to_three_units_of_the_last_place():
    """The values are near zero, near every border at which the power of two changes, and spread over the whole
    range."""
    rng = np.random.default_rng(2)
    borders = -(np.arange(400) + 0.5) * math.log(2)
    borders = np.concatenate([np.nextafter(borders, 0), borders, np.nextafter(borders, -1e9)])
    values = np.concatenate([-np.logspace(-320, 0, 500), borders[borders > -300], -rng.uniform(0, 300, 20_000)])
    worst = ulps(exponential(values), values).max()
    assert worst <= 3
    planted = np.exp(values.astype(np.float32)).astype(np.float64)  # planted: single precision
    with np.errstate(over="ignore"):
        assert ulps(planted, values).max() > 1000


@pytest.mark.parametrize("value", [-300.0, np.nextafter(-300.0, -301.0), -1e4, -1e308, -math.inf])
def test_the_exponential_ends_before_its_squares_are_denormal(value):
    (found,) = exponential(np.array([value]))
    assert found == exponential(np.array([-300.0]))[0]
    assert found**2 > np.finfo(np.float64).tiny


def test_the_exponential_of_nothing_is_one_exactly():
    assert exponential(np.array([0.0, -0.0])).tolist() == [1.0, 1.0]
