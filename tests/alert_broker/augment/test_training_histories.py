"""What a network sees in training with augmented light curves: whole ones and histories cut at detections."""

import numpy as np
import pytest

from alert_broker.lightcurve import LightCurves

pytest.importorskip("torch")
from tools import train_t2


def curves(count=50) -> LightCurves:
    """Light curves of 30 points in six bands; those of every fifth object are in i and z alone."""
    rng = np.random.default_rng(0)
    band = rng.integers(0, 6, (count, 30))
    band[::5] = 3 + band[::5] % 2
    time = np.sort(rng.uniform(0, 300, (count, 30)), axis=1)
    flux = rng.normal(50, 10, count * 30)
    detected = rng.random(count * 30) < 0.4
    return LightCurves(
        tuple("ugrizy"), np.arange(count + 1) * 30, time.ravel(), band.ravel().astype(np.int8), flux,
        np.full(count * 30, 5.0), detected,
    )  # fmt: skip


def test_variants_are_whole_light_curves_and_histories_of_their_detections():
    whole = curves()
    variants = train_t2.alert_variants(whole, ("g", "r"), np.random.default_rng(1))
    assert len(variants) == 3 * (1 + train_t2.CUTS)
    for variant in variants:
        assert len(variant) == len(whole)
        assert variant.points.min() > 0
    everything, own, detections = variants[:3]
    assert everything.flux.tolist() == whole.flux.tolist()
    rows = np.isin(whole.object_of_point, np.flatnonzero(np.arange(50) % 5 != 0))
    assert set(own.where(np.isin(own.object_of_point, np.flatnonzero(np.arange(50) % 5 != 0))).band) == {1, 2}
    assert rows.any()
    assert own.take([5]).flux.tolist() == whole.take([5]).flux.tolist()  # no point in g or r: the light curve stays
    assert detections.points.sum() < own.points.sum()
    cut = variants[3].take([1])
    full = whole.take([1])
    assert cut.time[-1] in full.time[full.detected]
    assert cut.flux.tolist() == full.flux[: len(cut.flux)].tolist()
    six = train_t2.alert_variants(whole, tuple("ugrizy"), np.random.default_rng(1))
    assert len(six) == 1 + train_t2.CUTS


def test_an_empty_light_curve_is_replaced_and_others_are_not():
    whole = curves(10)
    few = whole.where(whole.object_of_point % 2 == 0)
    found = train_t2.not_empty(few, whole)
    assert found.flux.tolist() == whole.flux.tolist()
    other = LightCurves(*(getattr(whole, name) for name in ("bands", "offsets", "time", "band")), -whole.flux,
                        whole.flux_error, whole.detected)  # fmt: skip
    mixed = train_t2.not_empty(few, other)
    assert (mixed.take([0]).flux > 0).all()
    assert (mixed.take([1]).flux < 0).all()
