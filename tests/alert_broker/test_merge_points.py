"""Merged light curves: exact for points at one time, close for others, and never more points than allowed."""

from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from alert_broker.gaussian_process import MAX_POINTS, GaussianProcess
from alert_broker.lightcurve import LightCurves, concatenate
from alert_broker.merge_points import merge_points
from alert_broker.packets import batches, read_blocks
from tests.alert_broker.test_gaussian_process import PROCESS, curve, difference, supernova


def test_short_objects_are_left_as_they_are():
    curves = concatenate([supernova(20), supernova(30)])
    assert merge_points(curves, 30) is curves


def test_only_long_objects_are_merged():
    curves = concatenate([supernova(20), supernova(90), supernova(5), supernova(60)])
    merged = merge_points(curves, 30)
    assert merged.points[[0, 2]].tolist() == [20, 5]
    assert (merged.points <= 30).all()
    np.testing.assert_array_equal(merged.take([0, 2]).flux, curves.take([0, 2]).flux)


@pytest.mark.parametrize("most", [20, 100, 300])
def test_the_limit_holds_and_the_span_stays(most):
    one = supernova(400)
    merged = merge_points(one, most)
    assert most // 2 < merged.points[0] <= most
    assert (merged.time[0], merged.time[-1]) == (one.time[0], one.time[-1])
    assert (np.diff(merged.time) >= 0).all()
    for band in range(6):  # the weights of a band add up
        expected = (one.flux_error[one.band == band] ** -2.0).sum()
        assert (merged.flux_error[merged.band == band] ** -2.0).sum() == pytest.approx(expected, rel=1e-9)


def repeated_exposures(seed: int) -> LightCurves:
    """Sixty visits of five exposures each, in two bands."""
    rng = np.random.default_rng(seed)
    time = np.repeat(np.sort(rng.uniform(0.0, 100.0, 60)), 5)
    error = rng.uniform(2.0, 8.0, 300)
    flux = 200.0 * np.exp(-0.5 * ((time - 40.0) / 15.0) ** 2) + error * rng.normal(size=300)
    return curve(time, np.repeat(np.arange(60) % 2 + 1, 5), flux, error)


def test_exposures_of_one_time_lose_nothing():
    one = repeated_exposures(1)
    full = PROCESS.interpolate(one)
    # the first and the last exposure stay alone, so that 62 points are left
    merged = replace(PROCESS, max_points=62).interpolate(one)
    assert merged.fit.points[0] == 62
    assert difference(merged.mean, full.mean) < 1e-4  # both fits end within the tolerance of the likelihood
    fixed = full.fit.log_amplitude, full.fit.log_metric
    same = replace(PROCESS, max_points=62).predict(one, *fixed).mean
    assert difference(same, full.mean) < 1e-9
    # planted: every fifth point instead, as plain decimation does
    fifth = one.where(np.arange(300) % 5 == 0)
    assert difference(PROCESS.predict(fifth, *fixed).mean, full.mean) > 0.02


@pytest.mark.parametrize("points", [700, 1200])
def test_long_light_curves_are_close_to_the_full_solution(points):
    one = supernova(points, seed=5)
    full = replace(PROCESS, max_points=points).interpolate(one).mean
    merged = difference(PROCESS.interpolate(one).mean, full)
    assert merged < 0.01
    chosen = np.zeros(points, np.bool_)  # planted: as many points, chosen evenly
    chosen[np.linspace(0, points - 1, 512).round().astype(int)] = True
    assert difference(PROCESS.interpolate(one.where(chosen)).mean, full) > 3.0 * merged


finite = st.floats(-1e6, 1e6)


@hypothesis.given(
    st.lists(
        st.tuples(finite, st.integers(-2, 7), st.floats(allow_nan=True), st.floats(allow_nan=True)),
        min_size=9,
        max_size=40,
    )
)
@hypothesis.settings(deadline=None)
def test_any_points_can_be_merged(points):
    points.sort()
    one = curve(*zip(*points, strict=True))
    merged = merge_points(one, 8)
    assert merged.points[0] <= 8
    assert np.isfinite(merged.time).all()
    assert (merged.flux_error > 0).all()
    usable = [item for item in points if 0 <= item[1] < 6 and np.isfinite(item[2]) and 0 < item[3] < np.inf]
    assert (merged.points[0] == 0) == (not usable)
    assert PROCESS.interpolate(one).fit.points[0] == len(usable)  # the twin: 8 is not its limit


@pytest.mark.realdata
def test_published_light_curves_are_not_merged(shared_data):
    """The longest of 7,848 has fewer points than the limit: what reproduces the published features is exact."""
    from alert_broker.plasticc import load

    points = load(shared_data / "train").curves.points
    assert 300 < points.max() <= MAX_POINTS


@pytest.mark.realdata
def test_real_light_curves_of_half_the_points_are_close(shared_data):
    """ZTF's packets hold 30 days, too short for the limit: those with most points are merged to a half."""
    files = sorted((shared_data / "alerts" / "ztf").glob("*.avro"))
    errors, decimation = [], []
    for item in batches(read_blocks(files)):
        for k in np.argsort(item.curves.points)[-20:].tolist():
            one = item.curves.take([k])
            points = int(one.points[0])
            process = GaussianProcess(item.survey.wavelengths, max_points=points)
            full = process.interpolate(one).mean
            if points < 16 or not full.any():
                continue
            errors.append(difference(replace(process, max_points=points // 2).interpolate(one).mean, full))
            every_other = one.where(np.arange(points) % 2 == 0)
            decimation.append(difference(process.interpolate(every_other).mean, full))
    assert len(errors) > 10
    assert np.median(errors) < 0.5 * np.median(decimation), (np.median(errors), np.median(decimation))
    assert np.median(errors) < 0.1
