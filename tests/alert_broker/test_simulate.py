"""Simulated packets follow the surveys' schemas, are repeatable, read back as they were made, and have the shapes of
their classes."""

import gzip
import itertools
from collections import Counter

import fastavro
import numpy as np
import pyarrow.parquet as pq
import pytest
from fastavro.schema import parse_schema

from alert_broker.packets import AlertBatch, batches, read_blocks
from alert_broker.simulate import CLASSES, simulate, write
from alert_broker.surveys import lsst
from alert_broker.ztf_schema import ztf_schema
from edgekit.errors import EdgekitError

SURVEYS = ("ztf", "lsst")
FLOAT32 = 2e-6  # relative: two roundings to 24 bits, and a magnitude near 20 that is converted to a flux


def schema_of(survey):
    return parse_schema(ztf_schema()) if survey == "ztf" else lsst.schema(max(lsst.schema_versions()))


@pytest.fixture(scope="module")
def crowd() -> dict[str, list]:
    return {survey: list(simulate(survey, 400, 7, cutouts=False)) for survey in SURVEYS}


@pytest.mark.parametrize("survey", SURVEYS)
def test_packets_are_valid(survey, crowd):
    schema = schema_of(survey)
    alerts = [*crowd[survey][:30], *simulate(survey, 3, 1)]
    for alert in alerts:
        assert fastavro.validate(alert.packet, schema, strict=True)
    broken = alerts[0].packet | {"candid" if survey == "ztf" else "diaSourceId": "one"}
    assert not fastavro.validate(broken, schema, raise_errors=False)


@pytest.mark.parametrize("survey", SURVEYS)
@pytest.mark.parametrize("packets_per_file", [1, 4])
def test_what_is_written_is_read_back(survey, packets_per_file, tmp_path):
    alerts = {alert.curve.alert_id: alert for alert in simulate(survey, 10, 5)}
    files = write(tmp_path / "night", alerts.values(), packets_per_file)
    assert len(files) == -(-10 // packets_per_file)
    assert {path.suffix for path in files} == {".bin" if survey == "lsst" and packets_per_file == 1 else ".avro"}
    (batch,) = batches(read_blocks([tmp_path / "night"]))  # truth.parquet is in the same folder and is no packet file
    assert batch.survey.name == survey
    for number, row in enumerate(batch.alerts.to_pylist()):
        alert, curve = alerts.pop(row["alert_id"]), batch.curves.take([number])
        assert (row["object_id"], row["n_upper_limits"], row["n_dropped"]) == (
            alert.curve.object_id,
            alert.curve.upper_limits,
            alert.curve.dropped,
        )
        # a Julian date has a resolution of 4e-10 d
        np.testing.assert_allclose(curve.time, alert.curve.time, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(curve.band, alert.curve.band)
        np.testing.assert_array_equal(curve.detected, alert.curve.detected)
        np.testing.assert_allclose(curve.flux, alert.curve.flux, rtol=FLOAT32)
        np.testing.assert_allclose(curve.flux_error, alert.curve.flux_error, rtol=FLOAT32)
    assert not alerts


def test_truth_names_every_alert(tmp_path):
    alerts = list(simulate("ztf", 12, 2, cutouts=False))
    write(tmp_path / "night", alerts, 5)
    truth = pq.read_table(tmp_path / "night" / "truth.parquet").to_pylist()
    expected = [(a.curve.alert_id, a.curve.object_id, a.class_name, a.class_id) for a in alerts]
    assert [tuple(row.values()) for row in truth] == expected
    (batch,) = batches(read_blocks([tmp_path / "night"]))
    assert isinstance(batch, AlertBatch)
    assert batch.alerts["alert_id"].to_pylist() == [row["alert_id"] for row in truth]


@pytest.mark.parametrize("survey", SURVEYS)
def test_a_seed_fixes_every_byte_and_the_nth_alert(survey, tmp_path):
    once, again, other = (
        [path.read_bytes() for path in write(tmp_path / name, simulate(survey, 3, seed))]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert once == again != other
    few, many = simulate(survey, 2, 1, cutouts=False), simulate(survey, 9, 1, cutouts=False)
    assert [a.packet for a in few] == [a.packet for a in itertools.islice(many, 2)]


@pytest.mark.parametrize("survey", SURVEYS)
def test_identifiers_are_unique(survey, crowd):
    assert len({alert.curve.alert_id for alert in crowd[survey]}) == 400
    assert len({alert.curve.object_id for alert in crowd[survey]}) == 400


@pytest.mark.parametrize("survey", SURVEYS)
def test_an_alert_is_its_newest_exposure_and_detections_pass_the_threshold(survey, crowd):
    window = 30.0 if survey == "ztf" else np.inf
    for alert in crowd[survey]:
        curve = alert.curve
        assert curve.detected[-1]
        assert np.ptp(curve.time) < window
        significance = np.abs(curve.flux) / curve.flux_error
        assert (significance[curve.detected] >= 5).all()
        assert (significance[~curve.detected] < 5).all()


@pytest.mark.parametrize("survey", SURVEYS)
def test_classes_have_their_shapes(survey, crowd):
    count = Counter((alert.class_name, alert.class_id) for alert in crowd[survey])
    assert set(count) == {(item.name, item.identifier) for item in CLASSES}
    by_class = {item.name: [a.curve for a in crowd[survey] if a.class_name == item.name] for item in CLASSES}

    def median_over(name, statistic):
        return np.median([statistic(curve) for curve in by_class[name]])

    def negative(curve):
        return (curve.flux[curve.detected] < 0).mean()

    def detected_days(curve):
        return np.ptp(curve.time[curve.detected])

    assert median_over("EB", negative) == 1.0  # it only becomes fainter than its reference
    assert all(max(map(negative, by_class[name])) == 0.0 for name in ("SNIa", "SNII", "SNIbc", "TDE", "KN"))
    assert 0.05 < np.mean([negative(curve) for curve in by_class["AGN"]]) < 0.95
    assert 0.05 < np.mean([negative(curve) for curve in by_class["RRL"]]) < 0.95
    assert median_over("KN", detected_days) < 8 < median_over("SNIa", detected_days)


def test_cutouts_are_fits_of_the_real_sizes():
    ztf = next(simulate("ztf", 1, 1)).packet
    for name in ("cutoutScience", "cutoutTemplate", "cutoutDifference"):
        image = gzip.decompress(ztf[name]["stampData"])
        assert len(image) == 20_160  # the size in the survey's packets
        assert pixels(image, 63).shape == (63, 63)
        assert 8_000 < len(ztf[name]["stampData"]) < 20_000
    difference = pixels(gzip.decompress(ztf["cutoutDifference"]["stampData"]), 63)
    assert np.isfinite(difference).all()
    rubin = next(simulate("lsst", 1, 1)).packet
    assert {len(rubin[name]) for name in ("cutoutScience", "cutoutTemplate", "cutoutDifference")} == {34_560}
    assert b"XTENSION= 'IMAGE   '" in rubin["cutoutScience"]
    assert next(simulate("ztf", 1, 1, cutouts=False)).packet["cutoutScience"] is None


def pixels(fits: bytes, size: int):
    cards = [fits[start : start + 80].decode() for start in range(0, 2880, 80)]
    assert cards[0] == f"{'SIMPLE  =                    T':80}"
    keys = {card[:8].strip(): card[10:30].strip() for card in cards if card[8:9] == "="}
    assert (keys["BITPIX"], keys["NAXIS"], keys["NAXIS1"], keys["NAXIS2"]) == ("-32", "2", str(size), str(size))
    assert any(card.strip() == "END" for card in cards)
    return np.frombuffer(fits, ">f4", size * size, 2880).reshape(size, size)


def test_what_cannot_be_simulated_says_so(tmp_path):
    with pytest.raises(EdgekitError, match="did you mean 'lsst'"):
        simulate("lsts", 1, 1)
    with pytest.raises(EdgekitError, match="0 alerts with seed 1; expected 1 alert or more"):
        simulate("ztf", 0, 1)
    with pytest.raises(EdgekitError, match="packets per file is 0"):
        write(tmp_path, [], 0)
    (tmp_path / "mine").write_text("keep me")
    with pytest.raises(EdgekitError, match="not an empty folder"):
        write(tmp_path, simulate("ztf", 1, 1))
    mixed = itertools.chain(simulate("ztf", 1, 1), simulate("lsst", 1, 1))
    with pytest.raises(EdgekitError, match="two surveys"):
        write(tmp_path / "night", mixed)
