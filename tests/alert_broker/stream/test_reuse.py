"""Reuse of classifications is compared with a reference that keeps every alert's detections in a list."""

import numpy as np
import pyarrow as pa
import pytest

from alert_broker.lightcurve import LightCurves, concatenate
from alert_broker.packets import ALERT_COLUMNS, AlertBatch
from alert_broker.plasticc import CLASSES
from alert_broker.results import repeat, result_rows, result_schema, texts
from alert_broker.stream.reuse import Reuse, output_schema
from alert_broker.surveys.base import survey_named
from edgekit.errors import EdgekitError
from tests.alert_broker.small import features_of

ZTF = survey_named("ztf")
NAMES = tuple(CLASSES.values())


class FakeClassifier:
    """Returns probabilities that the points in g and r determine. It counts its calls, and fails on alerts without such
    a point."""

    features = features_of(("g", "r"))
    schema = result_schema(NAMES)

    def __init__(self, model="small"):
        self.model, self.classified = model, []

    def __call__(self, batch):
        count, alerts = len(batch.curves), batch.alerts["alert_id"].to_pylist()
        self.classified += alerts
        chosen = batch.curves.where(batch.curves.band < 2)
        sums = np.bincount(chosen.object_of_point, chosen.flux, minlength=count)
        best, null = (np.abs(sums) % len(NAMES)).astype(np.int64), chosen.points == 0
        columns = {f"p_{name}": pa.array((sums + k).astype(np.float32), mask=null) for k, name in enumerate(NAMES)}
        columns |= {
            "status": texts(null.astype(np.int64), ["classified", "no points in g, r"]),
            "best_class": texts(best, NAMES, null),
            "best_probability": columns["p_SNIa"],
            "model": repeat(self.model, count),
            "bundle": repeat("abc", count),
        }
        return result_rows(batch, self.schema, columns)


def curve(points, bands):
    """Return the light curve of rows (time, band, flux, detected)."""
    time, band, flux, detected = (np.array(values) for values in zip(*points, strict=True)) if points else [[]] * 4
    flux = np.asarray(flux, np.float64)
    return LightCurves(
        bands,
        np.array([0, len(flux)]),
        np.asarray(time, np.float64),
        np.asarray(band, np.int8),
        flux,
        np.full(len(flux), 2.0),
        np.asarray(detected, np.bool_),
    )


def batch_of(alerts, survey=ZTF):
    """Return a batch of (alert, object, points)."""
    rows = [
        {
            "alert_id": number,
            "object_id": name,
            "survey": survey.name,
            "file": "f",
            "offset": number,
            "n_detections": [len(points)] + [0] * (len(survey.bands) - 1),
            "n_forced": [0] * len(survey.bands),
            "n_upper_limits": number,
            "n_dropped": 0,
        }
        for number, name, points in alerts
    ]
    curves = concatenate(curve(points, survey.bands) for _, _, points in alerts)
    return AlertBatch(survey, curves, pa.RecordBatch.from_pylist(rows, schema=ALERT_COLUMNS))


def seen(rows):
    return list(
        zip(rows["alert_id"].to_pylist(), rows["fresh"].to_pylist(), rows["reused_from"].to_pylist(), strict=True)
    )


G, R, NEAR = ((61_000.0, 0, 10.0, True), (61_000.5, 1, 20.0, True), (61_001.0, 2, 99.0, True))
FORCED = (60_999.0, 0, 1.0, False)


def test_an_alert_without_a_new_detection_takes_the_last_ones_class():
    classifier = FakeClassifier()
    reuse = Reuse(classifier)
    rows = reuse(
        batch_of([(1, "a", [G]), (2, "a", [G, NEAR]), (3, "b", [G]), (4, "a", [G, R]), (5, "a", [G, R, NEAR])])
    )
    assert seen(rows) == [(1, True, None), (2, False, 1), (3, True, None), (4, True, None), (5, False, 4)]
    assert classifier.classified == [1, 3, 4]
    assert rows.schema.equals(output_schema(NAMES))
    again = reuse(batch_of([(6, "a", [G, R, NEAR]), (7, "b", [G, NEAR])]))  # in the next batch
    assert seen(again) == [(6, False, 4), (7, False, 3)]
    assert again["p_SNIa"].to_pylist() == rows["p_SNIa"].take(pa.array([3, 2])).to_pylist()
    assert again["best_class"].to_pylist() == rows["best_class"].take(pa.array([3, 2])).to_pylist()
    assert again["model"].to_pylist() == ["small"] * 2
    # the alert's own columns are not reused
    assert again["offset"].to_pylist() == again["n_upper_limits"].to_pylist() == [6, 7]
    assert again["n_det_g"].to_pylist() == [3, 2]


@pytest.mark.parametrize(
    "change", [(61_000.0, 0, 10.0000001, True), (61_000.0, 1, 10.0, True), (61_000.1, 0, 10.0, True)]
)
def test_a_detection_that_differs_in_the_last_bit_is_new(change):
    assert seen(Reuse(FakeClassifier())(batch_of([(1, "a", [G]), (2, "a", [change])])))[1] == (2, True, None)


def test_forced_photometry_counts_on_request():
    alerts = [(1, "a", [G]), (2, "a", [FORCED, G])]
    assert seen(Reuse(FakeClassifier())(batch_of(alerts)))[1] == (2, False, 1)
    assert seen(Reuse(FakeClassifier(), same="points")(batch_of(alerts)))[1] == (2, True, None)


def test_a_detection_that_fell_out_of_the_history_is_a_change():
    assert seen(Reuse(FakeClassifier())(batch_of([(1, "a", [G, R]), (2, "a", [R])])))[1] == (2, True, None)


def test_an_alert_that_comes_again_is_fresh_again():
    reuse = Reuse(FakeClassifier())
    alerts = batch_of([(1, "a", [G]), (2, "a", [G, NEAR])])
    first = reuse(alerts)
    assert seen(first) == [(1, True, None), (2, False, 1)]
    assert reuse(alerts).equals(first)  # a replay; the same holds within one batch:
    assert seen(reuse(batch_of([(9, "c", [G]), (9, "c", [G])]))) == [(9, True, None), (9, True, None)]


def test_what_could_not_be_classified_is_not_reused_but_has_its_reason():
    reuse = Reuse(FakeClassifier())
    rows = reuse(batch_of([(1, "a", [NEAR]), (2, "a", [NEAR]), (3, "b", [])]))
    assert seen(rows) == [(1, True, None), (2, True, None), (3, True, None)]
    assert rows["status"].to_pylist() == ["no points in g, r"] * 3
    assert rows["best_class"].null_count == rows["p_SNIa"].null_count == 3


def test_a_survey_that_the_model_cannot_see_goes_through():
    classifier = FakeClassifier()
    classifier.features = features_of(("u", "g"))  # ZTF has no u
    assert seen(Reuse(classifier)(batch_of([(1, "a", [G]), (2, "a", [G])]))) == [(1, True, None), (2, True, None)]
    assert classifier.classified == [1, 2]


def test_surveys_do_not_share_names():
    reuse = Reuse(FakeClassifier())
    reuse(batch_of([(1, "a", [G])]))
    batch = batch_of([(2, "a", [G])], survey_named("lsst"))
    assert seen(reuse(batch)) == [(2, True, None)]


def random_stream(seed, count=300):
    rng = np.random.default_rng(seed)
    histories = {}
    for number in range(count):
        name = f"o{rng.integers(25)}"
        history = histories.setdefault(name, [])
        if not history or rng.random() < 0.6:
            history = histories[name] = [*history, (61_000.0 + number, int(rng.integers(3)), float(number), True)]
        yield number, name, list(history)


@pytest.mark.parametrize("capacity", [1, 7, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_every_alert_has_its_row_however_batches_fall(capacity, seed):
    """The reference is a list of the last objects, oldest first, with the classified alert of each."""
    alerts = list(random_stream(seed))
    known, expected = {}, []
    for number, name, points in alerts:
        detections = [point for point in points if point[1] < 2]
        before = known.pop(name, None)
        reused = before is not None and before[1] == detections
        known[name] = before if reused else (number, detections)
        while len(known) > capacity:
            known.pop(next(iter(known)))
        expected.append((number, not (reused and detections), before[0] if reused and detections else None))
    truth = FakeClassifier()(batch_of(alerts))
    for size in (1, 13, 300):
        reuse = Reuse(FakeClassifier(), capacity)
        parts = [reuse(batch_of(alerts[start : start + size])) for start in range(0, len(alerts), size)]
        rows = pa.Table.from_batches(parts).combine_chunks()
        assert seen(rows) == expected
        assert len(reuse) == len(known)
        # If fluxes determine the class, reuse must give the result of classifying each alert.
        assert rows.select(truth.schema.names).equals(pa.Table.from_batches([truth]))
    assert any(reused for _, _, reused in expected) or capacity == 1


def test_the_comparison_has_teeth():
    """Planted: a cache that compares only the object's name gives classes that classifying would not give."""

    class Careless(Reuse):
        def _keys(self, batch):
            return [b""] * len(batch.curves)

    alerts = list(random_stream(0))
    truth = FakeClassifier()(batch_of(alerts))
    assert not Careless(FakeClassifier())(batch_of(alerts)).select(truth.schema.names).equals(truth)


def test_a_failure_leaves_nothing_half_known():
    classifier = FakeClassifier()
    reuse = Reuse(classifier)
    reuse(batch_of([(1, "a", [G])]))

    class Broken(FakeClassifier):
        def __call__(self, batch):
            raise RuntimeError("out of memory")

    reuse.classifier = Broken()
    with pytest.raises(RuntimeError):
        reuse(batch_of([(2, "a", [G]), (3, "b", [G])]))
    assert len(reuse) == 0
    reuse.classifier = classifier
    assert seen(reuse(batch_of([(2, "a", [G]), (3, "b", [G])]))) == [(2, True, None), (3, True, None)]


def test_another_model_has_a_cache_of_its_own():
    first, second = Reuse(FakeClassifier("one")), Reuse(FakeClassifier("two"))
    first(batch_of([(1, "a", [G])]))
    assert seen(second(batch_of([(2, "a", [G])]))) == [(2, True, None)]


def test_settings_that_cannot_be():
    with pytest.raises(EdgekitError, match="capacity of the cache of objects is 0; expected 1 or more"):
        Reuse(FakeClassifier(), 0)
    with pytest.raises(EdgekitError, match=r"unknown value of same 'point'.*did you mean 'points'"):
        Reuse(FakeClassifier(), same="point")
