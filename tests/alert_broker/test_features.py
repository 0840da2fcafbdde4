"""Training and serving compute the same features, and no input of a survey breaks them."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from alert_broker import plasticc
from alert_broker.features import ID, LightCurveFeatures
from alert_broker.gaussian_process import Status
from alert_broker.lightcurve import FLUX_ZERO_POINT, LightCurves, concatenate
from alert_broker.simulate import simulate
from alert_broker.surveys.base import join, survey_named
from edgekit.errors import EdgekitError
from tests.alert_broker.small import features_of, light_curve

LSST, ZTF = survey_named("lsst"), survey_named("ztf")
SIX = features_of(plasticc.BANDS)
GR = features_of()


def curve(time, band, flux, error=None, detected=None, bands=("g", "r")) -> LightCurves:
    """Return a light curve of one object."""
    time, flux = np.asarray(time, np.float64), np.asarray(flux, np.float64)
    error = np.ones(len(time)) if error is None else np.asarray(error, np.float64)
    detected = np.ones(len(time), np.bool_) if detected is None else np.asarray(detected, np.bool_)
    return LightCurves(bands, np.array([0, len(time)]), time, np.asarray(band, np.int8), flux, error, detected)


def bump(count=12, seed=0, **options) -> LightCurves:
    rng = np.random.default_rng(seed)
    time = 60_000 + np.sort(rng.uniform(0, 60, count))
    flux = 200 * np.exp(-0.5 * ((time - 60_025) / 10) ** 2) + rng.normal(0, 5, count)
    return curve(time, np.arange(count) % 2, flux, np.full(count, 5.0), **options)


# --- training and serving


def as_trained(packet) -> LightCurves:
    """Return the photometry of an LSST packet in the form of a training set: FLUXCAL, one point per visit, sorted by
    time. It reads only the packet's own field names."""
    found = {}
    rows = [(row, True) for row in [packet["diaSource"], *(packet["prvDiaSources"] or [])]]
    rows += [(row, False) for row in packet["prvDiaForcedSources"] or []]
    for row, detected in rows:
        found.setdefault((row["midpointMjdTai"], row["band"]), (row["psfFlux"], row["psfFluxErr"], detected))
    points = sorted((time, plasticc.BANDS.index(band), *rest) for (time, band), rest in found.items())
    time, band, flux, error, detected = (list(column) for column in zip(*points, strict=True))
    nanojansky = 10 ** (-0.4 * (31.4 - FLUX_ZERO_POINT))
    scaled = [[nanojansky * value for value in values] for values in (flux, error)]
    return curve(time, band, *scaled, detected, bands=plasticc.BANDS)


@pytest.fixture(scope="module")
def packets():
    return [alert.packet for alert in simulate("lsst", 25, 5, cutouts=False)]


@pytest.fixture(scope="module")
def trained(packets) -> LightCurves:
    return concatenate(as_trained(packet) for packet in packets)


@pytest.mark.parametrize("features", [SIX, GR, features_of(("i", "g", "y"))])
def test_training_and_serving_give_the_same_tensor(packets, trained, features):
    served = join([light_curve(LSST, packet) for packet in packets], LSST.bands)
    first, second = features(trained), features(served)
    assert np.array_equal(first.light_curve, second.light_curve)
    assert np.array_equal(first.context, second.context)
    assert np.array_equal(first.status, second.status)
    assert np.abs(first.light_curve).max() > 1  # the features are not all zero


def scaled_per_object(curves: LightCurves) -> LightCurves:
    peak = np.maximum.reduceat(np.abs(curves.flux), curves.offsets[:-1])[curves.object_of_point]
    return replace(curves, flux=curves.flux / peak, flux_error=curves.flux_error / peak)


def time_reversed(curves: LightCurves) -> LightCurves:
    rows = np.concatenate([np.arange(stop - 1, start - 1, -1) for start, stop in pairwise(curves.offsets)])
    turned = {name: getattr(curves, name)[rows] for name in ("band", "flux", "flux_error", "detected")}
    return replace(curves, time=-curves.time[rows], **turned)


def bands_swapped(curves: LightCurves) -> LightCurves:
    return replace(curves, bands=("u", "r", "g", "i", "z", "y"))


@pytest.mark.parametrize("fault", [scaled_per_object, time_reversed, bands_swapped])
def test_the_published_serving_faults_would_be_seen(trained, fault):
    """The published broker module differed from its own training in these three ways."""
    right, wrong = GR(trained).light_curve, GR(fault(trained)).light_curve
    assert (np.abs(right - wrong).max(axis=(1, 2)) > 0.1).mean() > 0.8


def test_amplitude_survives():
    faint, bright = bump(), bump()
    bright = replace(bright, flux=10 * bright.flux, flux_error=10 * bright.flux_error)
    assert np.abs(GR(bright).light_curve).max() > np.abs(GR(faint).light_curve).max() + 1.5


# --- parameters


def test_parameters_travel_through_a_manifest():
    features = features_of(("g", "r"), context=("log_span", "redshift"), margin_days=30.0)
    stored = json.loads(json.dumps(features.to_bundle()))
    assert stored["id"] == ID
    assert LightCurveFeatures.from_bundle(stored, "x") == features


@pytest.mark.parametrize(
    ("preprocessing", "reason"),
    [
        (None, "the preprocessing is None; alerts need"),
        ({"id": "other/1"}, "'other/1'"),
        (GR.to_bundle() | {"margin_dayz": 3}, "'margin_dayz' in x; .* did you mean 'margin_days'"),
        (GR.to_bundle() | {"context": ["log_spam"]}, "did you mean 'log_span'"),
        (GR.to_bundle() | {"wavelengths": [1.0]}, "1 wavelengths for the bands g, r"),
        (GR.to_bundle() | {"channels": ["x"]}, "unknown channel 'x'"),
        (GR.to_bundle() | {"scale": [1.0]}, "1 scales for the channels g, r"),
    ],
)
def test_parameters_that_cannot_be_used(preprocessing, reason):
    with pytest.raises(EdgekitError, match=reason):
        LightCurveFeatures.from_bundle(preprocessing, "x")


def test_redshift_is_given_or_refused():
    features = features_of(context=("log_span", "redshift", "redshift_error"))
    context = features(bump(), redshift=np.array([[0.5, 0.1]])).context
    np.testing.assert_allclose(context[0, 1:], [np.log(1.5), 0.1], rtol=1e-6)
    with pytest.raises(EdgekitError, match="needs redshift, which"):
        features(bump())


# --- what surveys send


def test_an_object_does_not_depend_on_its_batch():
    curves = [bump(count, seed) for seed, count in enumerate([5, 40, 1, 12])]
    together = GR(concatenate(curves))
    for number, one in enumerate(curves):
        assert np.array_equal(GR(one).light_curve[0], together.light_curve[number])
        assert np.array_equal(GR(one).context[0], together.context[number])


def test_bands_that_the_model_lacks_are_ignored():
    points = bump(30)
    mixed = replace(points, bands=("g", "r", "i"), band=(np.arange(30) % 3).astype(np.int8))
    known = mixed.where(mixed.band < 2)
    assert np.array_equal(GR(mixed).light_curve, GR(replace(known, bands=("g", "r"))).light_curve)
    only_i = replace(points, bands=("g", "r", "i"), band=np.full(30, 2, np.int8))
    assert GR(only_i).status.tolist() == [Status.NO_POINTS]


def test_bands_without_points_are_interpolated_from_the_others():
    found = GR(bump().where(bump().band == 1))
    assert found.status.tolist() == [Status.OK]
    assert np.isfinite(found.light_curve).all()
    assert np.abs(found.light_curve[0, :, 0]).max() > 0.5


def test_one_detection():
    found = GR(curve([60_000.0], [0], [100.0]))
    assert found.status.tolist() == [Status.OK]
    assert np.isfinite(found.light_curve).all()
    np.testing.assert_allclose(found.light_curve[0, :, 0], np.arcsinh(100 / 20), rtol=1e-2)
    np.testing.assert_allclose(found.context, [[-2.0]], atol=1e-6)  # 0 days: log10(1 / 100)


def test_no_points_and_no_flux_are_zeros_with_their_status():
    empty, flat = curve([], [], []), curve([1.0, 2.0], [0, 1], [0.0, 0.0])
    found = GR(concatenate([empty, bump(), flat]))
    assert found.status.tolist() == [Status.NO_POINTS, Status.OK, Status.NO_FLUX]
    assert not found.light_curve[[0, 2]].any()
    assert found.light_curve[1].any()
    assert np.isfinite(found.context).all()
    assert GR(concatenate([empty])).light_curve.shape == (1, 20, 2)
    assert GR(empty.take([])).light_curve.shape == (0, 20, 2)


def test_the_same_epoch_twice():
    points = bump()
    twice = points.where(np.ones(12, np.bool_)).take([0])
    rows = np.repeat(np.arange(12), 2)
    doubled = LightCurves(
        points.bands,
        np.array([0, 24]),
        points.time[rows],
        points.band[rows],
        points.flux[rows],
        points.flux_error[rows],
        points.detected[rows],
    )
    assert np.isfinite(GR(doubled).light_curve).all()
    # Two equal measurements act as one with a smaller error, so the interpolation stays close.
    np.testing.assert_allclose(GR(doubled).light_curve, GR(twice).light_curve, atol=0.15)


BAD = [("flux", np.nan), ("flux", np.inf), ("time", np.nan)]
BAD += [("flux_error", value) for value in (np.nan, 0.0, -1.0)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_what_is_not_a_measurement_changes_nothing(name, value):
    """The bad point is the last one, and even the span of the grid must not include it."""
    points = bump()
    values = getattr(points, name).copy()
    values[-1] = value
    bad, without = replace(points, **{name: values}), points.where(np.arange(12) < 11)
    assert np.array_equal(GR(bad).light_curve, GR(without).light_curve)
    assert np.array_equal(GR(bad).context, GR(without).context)
    # without the damage, the point does count
    assert not np.array_equal(GR(points).light_curve, GR(without).light_curve)


def test_negative_fluxes_stay_negative():
    points = bump()
    faded = replace(points, flux=-points.flux)
    np.testing.assert_allclose(GR(faded).light_curve, -GR(points).light_curve, atol=0.05)


@pytest.mark.parametrize("factor", [1e-30, 1e30, 1e200, 1e300])
def test_absurd_fluxes_are_finite_and_say_so(factor):
    points = bump()
    found = GR(replace(points, flux=points.flux * factor, flux_error=points.flux_error * factor))
    assert np.isfinite(found.light_curve).all()
    assert found.status[0] in (Status.OK, Status.OVERFLOW)
    assert found.light_curve.any() == (found.status[0] == Status.OK and factor > 1)


def test_upper_limits_are_not_points():
    def row(days, magnitude):
        return {
            "jd": 2_460_000.5 + days,
            "fid": 1,
            "magpsf": magnitude,
            "sigmapsf": magnitude and 0.1,
            "isdiffpos": "t",
        }

    def packet(history):
        return {"objectId": "ZTF24aaaaaaa", "candid": 1, "candidate": row(20, 18.0), "prv_candidates": history}

    found, limits = [row(5, 19.0), row(12, 18.5)], [row(1, None), row(7, None)]
    one, two = (join([light_curve(ZTF, packet(rows))], ZTF.bands) for rows in (found, found + limits))
    assert np.array_equal(GR(one).light_curve, GR(two).light_curve)
    assert np.array_equal(GR(one).context, GR(two).context)


def test_a_thousand_epochs():
    found = GR(bump(1200))
    assert found.status.tolist() in ([Status.OK], [Status.NOT_CONVERGED])
    peak = np.sinh(found.light_curve[0, :, 0].max()) * GR.scale[0]
    assert 180 < peak < 220  # the bump's height is 200


def test_points_far_from_every_detection_say_nothing():
    points = bump()
    far = curve([59_000.0, 61_000.0], [0, 1], [500.0, -500.0], detected=[False, False])
    order = np.argsort(np.concatenate([points.time, far.time]))
    mixed = LightCurves(
        points.bands,
        np.array([0, 14]),
        *(np.concatenate([getattr(points, name), getattr(far, name)])[order] for name in ("time", "band", "flux")),
        np.concatenate([points.flux_error, far.flux_error])[order],
        np.concatenate([points.detected, far.detected])[order],
    )
    assert np.array_equal(GR(mixed).light_curve, GR(points).light_curve)
    near = replace(GR, margin_days=2000.0)
    assert not np.array_equal(near(mixed).light_curve, near(points).light_curve)
    assert len(GR.select(far).time) == 2  # a light curve without any detection is not cut
