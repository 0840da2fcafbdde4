"""The second model in the stream: scores beside the classes, in filters, with an account of its own; images that cannot
be read cost a score and no alert."""

import json
from collections import Counter

import numpy as np
import pytest

from alert_broker import simulated_packets
from alert_broker.classify import classify_files
from alert_broker.cutouts.fits import NO_FITS
from alert_broker.cutouts.reader import MISSING
from alert_broker.simulate import simulate
from alert_broker.stream import metrics
from alert_broker.stream.stats import STAGES, Stats
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.errors import EdgekitError
from tests.alert_broker.conftest import REAL
from tests.alert_broker.small import small_cutout_bundle
from tests.alert_broker.stream.rig import Rig
from tests.apache_kafka import missing

needs_kafka = pytest.mark.skipif(bool(missing()), reason=missing() or "-")
BROKEN = b"Obj\x01 and then nothing that Avro knows"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A small network of images on disk."""
    return write_bundle(small_cutout_bundle(), tmp_path_factory.mktemp("cutouts") / "small-braai.edge").path


@pytest.fixture(scope="module")
def night(tmp_path_factory, scorer):
    """Messages of ten ZTF alerts and one that does not decode; the scores by alert as the run over files gives them;
    the images of two alerts are damaged."""
    import pyarrow.parquet as pq

    packets = [alert.packet for alert in simulate("ztf", 10, 6)]
    packets[2]["cutoutTemplate"]["stampData"] = b"no image"
    packets[5]["cutoutDifference"] = None
    messages = [simulated_packets.message("ztf", packet) for packet in packets]
    folder = tmp_path_factory.mktemp("night")
    for number, message in enumerate(messages):
        (folder / f"{number:02}.avro").write_bytes(message)
    output = tmp_path_factory.mktemp("results") / "out.parquet"
    classify_files([folder], output, cutouts=open_bundle(scorer), runtime="onnxruntime")
    scores = {row["alert_id"]: row["drb"] for row in pq.read_table(output).to_pylist()}
    assert [scores[packet["candid"]] is None for packet in packets] == [k in (2, 5) for k in range(10)]
    return [*messages, BROKEN], scores


def rows_of(rig, topic=""):
    return [json.loads(message.value()) for message in rig.read(topic or rig.results)]


def check_every_alert_has_its_score(rig, night, scorer, **changes):
    messages, scores = night
    rig.send(messages)
    stats = rig.consume(cutouts={"model": str(scorer)}, **changes)
    total = stats.ledger.total()
    assert (total.consumed, total.published, total.dead_lettered, total.in_flight) == (11, 10, 1, 0)
    rows = rows_of(rig)
    assert Counter(row["alert_id"] for row in rows) == Counter(scores.keys())
    for row in rows:
        expected = scores[row["alert_id"]]
        assert row["drb"] == (expected if expected is None else pytest.approx(expected, abs=1e-5))
        assert row["drb_model"] == open_bundle(scorer).digest[:12]
        assert row["status"] == "classified"
    assert stats.cutouts == {"scored": 8, NO_FITS: 1, MISSING: 1}
    return stats


def test_every_alert_has_the_score_of_its_images(rig, night, scorer):
    stats = check_every_alert_has_its_score(rig, night, scorer)
    now = stats.snapshot()
    assert list(now.stages) == [*STAGES[:3], "cutouts", "cutout-inference", *STAGES[3:]]
    assert now.stages["cutouts"].count == now.stages["inference"].count > 0
    assert now.models["small-braai"] == open_bundle(scorer).digest
    page = metrics.page(now).decode()
    assert 'edgekit_cutouts_total{outcome="scored"} 8.0' in page
    assert f'edgekit_cutouts_total{{outcome="{MISSING}"}} 1.0' in page
    assert 'edgekit_stage_seconds_count{stage="cutout-inference"}' in page


@needs_kafka
@pytest.mark.kafka
@pytest.mark.parametrize("mode", ["at-least-once", "exactly-once"])
def test_every_alert_has_the_score_of_its_images_on_a_real_kafka(apache_kafka, bundle, tmp_path, night, scorer, mode):
    rig = Rig(apache_kafka.address, REAL, tmp_path, bundle)
    publish = {"mode": mode, "transactional_id": rig.name, "seconds": 30.0}
    check_every_alert_has_its_score(rig, night, scorer, publish=publish)


def test_filters_use_the_score(rig, night, scorer):
    messages, scores = night
    middle = float(np.median([score for score in scores.values() if score is not None]))
    rig.send(messages[:10])
    outputs = [{"topic": rig.results, "where": f"drb >= {middle!r}", "format": "json"}]
    total = rig.consume(cutouts={"model": str(scorer)}, output=outputs).ledger.total()
    chosen = {alert for alert, score in scores.items() if score is not None and score >= middle}
    assert 0 < len(chosen) < 8
    assert {row["alert_id"] for row in rows_of(rig)} == chosen
    assert (total.published, total.filtered) == (len(chosen), 10 - len(chosen))


def test_without_the_model_there_is_no_column_and_a_filter_says_so(rig, night):
    messages, _ = night
    rig.send(messages[:10])
    with pytest.raises(EdgekitError, match="drb"):
        rig.consume(output=[{"topic": rig.results, "where": "drb > 0.5"}])
    stats = rig.consume()
    assert not {"drb", "drb_model"} & set(rows_of(rig)[0])
    assert stats.cutouts == {}
    assert "edgekit_cutouts_total{" not in metrics.page(stats.snapshot()).decode()


def test_a_reused_class_comes_with_a_score_of_its_own(rig, night, scorer):
    """The second alert of an object repeats its points and has other images."""
    packets = [alert.packet for alert in simulate("ztf", 3, 6)]
    again = [
        {**packet, "candid": packet["candid"] + 1_000_000, "candidate": packet["candidate"] | {"candid": 1}}
        | {name: other[name] for name in ("cutoutScience", "cutoutTemplate", "cutoutDifference")}
        for packet, other in zip(packets, reversed(packets), strict=True)
    ]
    rig.partitions = 1
    rig.send(simulated_packets.message("ztf", packet) for packet in [*packets, *again])
    rig.consume(cutouts={"model": str(scorer)}, model={"reuse": "points"})
    rows = {row["alert_id"]: row for row in rows_of(rig)}
    for packet, other in zip(again, reversed(packets), strict=True):
        row = rows[packet["candid"]]
        assert row["fresh"] is False
        assert row["drb"] == pytest.approx(rows[other["candid"]]["drb"], abs=1e-6)


def test_a_model_that_scores_no_images_stops_the_start(rig, bundle):
    with pytest.raises(EdgekitError, match="a model of cutouts has 'cutouts'"):
        rig.consume(cutouts={"model": str(bundle)})


def test_stages_are_added_before_the_routes_and_keep_their_counts():
    stats = Stats()
    stats.observe("route", 1.0)
    stats.time_also(["a", "b"])
    assert list(stats.snapshot().stages) == [*STAGES[:3], "a", "b", *STAGES[3:]]
    assert stats.snapshot().stages["route"].count == 1
