"""Degraded light curves are never empty, have only points of the original, and lose them in the documented shares."""

import numpy as np
import pytest

from alert_broker.degrade import as_seen_after, at_detection, cut_at_detection, degraded, first_detection
from alert_broker.lightcurve import LightCurves


@pytest.fixture(scope="module")
def curves() -> LightCurves:
    rng = np.random.default_rng(0)
    count, length = 2000, 40
    time = np.sort(rng.uniform(0, 400, (count, length)), axis=1).ravel()
    return LightCurves(
        ("g", "r"),
        np.arange(count + 1) * length,
        time,
        rng.integers(0, 2, len(time)).astype(np.int8),
        np.arange(len(time), dtype=np.float64),
        np.ones(len(time)),
        rng.random(len(time)) < 0.5,
    )


def test_points_are_dropped_never_changed_and_no_object_is_empty(curves):
    fewer = degraded(curves, np.random.default_rng(1))
    assert len(fewer) == len(curves)
    assert fewer.points.min() >= 1
    rows = fewer.flux.astype(np.int64)  # the flux is the point's number
    assert (np.diff(rows) > 0).all()
    for name in ("time", "band", "flux_error", "detected"):
        assert np.array_equal(getattr(curves, name)[rows], getattr(fewer, name))
    assert np.array_equal(curves.object_of_point[rows], fewer.object_of_point)


def test_the_shares_that_are_cut(curves):
    fewer = degraded(curves, np.random.default_rng(1))
    last, cut = (batch.time[batch.offsets[1:] - 1] for batch in (curves, fewer))
    forced = np.add.reduceat((~fewer.detected).astype(int), fewer.offsets[:-1])
    # a third lose their forced photometry, and the light curves that are cut earliest have none either
    assert 0.3 < (forced == 0).mean() < 0.65
    assert 0.35 < (cut < last - 30).mean() < 0.55  # half are cut early


def test_the_same_seed_gives_the_same_points(curves):
    one, two, other = (degraded(curves, np.random.default_rng(seed)).flux for seed in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_as_seen_after_some_days(curves):
    early = as_seen_after(curves, 10.0)
    assert (early.time <= (first_detection(curves) + 10.0)[early.object_of_point]).all()
    seen = np.isin(curves.flux, early.flux)
    assert (curves.time[~seen] > (first_detection(curves) + 10.0)[curves.object_of_point[~seen]]).all()


def test_without_a_detection_the_first_point_counts():
    curves = LightCurves(
        ("g",),
        np.array([0, 2, 4]),
        np.array([5.0, 6.0, 7.0, 8.0]),
        np.zeros(4, np.int8),
        np.ones(4),
        np.ones(4),
        np.array([False, True, False, False]),
    )
    assert first_detection(curves).tolist() == [6.0, 7.0]


def test_a_history_ends_at_one_of_its_detections(curves):
    cut, number = cut_at_detection(curves, np.random.default_rng(3), window_days=100.0)
    for item in range(0, 2000, 97):
        whole, part = curves.take([item]), cut.take([item])
        times = whole.time[whole.detected]
        assert part.time[-1] == times[number[item] - 1]
        assert part.detected[-1]
        assert part.detected.sum() == (times[: number[item]] >= part.time[-1] - 100.0).sum()
        assert part.time[0] >= part.time[-1] - 100.0
    found = np.bincount(curves.object_of_point[curves.detected], minlength=len(curves))
    assert abs(np.mean((number - 0.5) / found) - 0.5) < 0.02  # every detection is equally likely
    every = at_detection(curves, np.full(len(curves), 10_000))
    assert np.array_equal(every.detected.sum(), at_detection(curves, found).detected.sum())
    none = curves.where(~curves.detected)
    assert np.array_equal(cut_at_detection(none, np.random.default_rng(0))[0].time, none.time)
