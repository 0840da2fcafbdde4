"""The measures against counting by hand, and `edgekit alerts evaluate` on a table of `classify`."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from alert_broker.evaluation import area_under_curve, by_detections, calibration_error, evaluate_table, summary
from edgekit.errors import EdgekitError

CLASSES = ("SNII", "SNIbc", "SNIa", "AGN")


def answers(count=4000, seed=0, sharpness=1.0):
    """Calibrated answers if sharpness is 1: labels are drawn from the probabilities."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(4, 0.5), size=count)
    labels = (rng.random((count, 1)) > np.cumsum(probabilities, axis=1)).sum(axis=1)
    sharper = probabilities**sharpness
    return sharper / sharper.sum(axis=1, keepdims=True), labels


def test_the_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    score, positive = rng.integers(0, 12, 200) / 12, rng.random(200) < 0.3
    yes, no = score[positive][:, None], score[~positive]
    pairs = np.mean((yes > no) + 0.5 * (yes == no))
    assert area_under_curve(score, positive) == pytest.approx(pairs)
    assert area_under_curve(-score, positive) == pytest.approx(1 - pairs)
    assert area_under_curve(positive.astype(float), positive) == 1.0
    assert abs(np.mean(yes > no) - pairs) > 0.01  # planted: ties not counted


def test_calibrated_answers_have_no_calibration_error_and_sharpened_ones_do():
    assert calibration_error(*answers()) < 0.03
    assert calibration_error(*answers(sharpness=3.0)) > 0.1
    sure = np.array([[0.9, 0.1], [0.9, 0.1]])
    assert calibration_error(sure, np.array([0, 1])) == pytest.approx(0.4)


def test_the_summary_counts_each_class_once():
    probabilities, labels = answers()
    found = summary(probabilities, labels, CLASSES, np.full(len(labels), 3))
    own = probabilities[np.arange(len(labels)), labels]
    by_class = [-np.log(own[labels == label]).mean() for label in range(4)]
    assert found["log_loss"]["value"] == pytest.approx(np.mean(by_class), rel=1e-6)
    assert found["supernovae"]["value"] == pytest.approx(np.mean(by_class[:3]), rel=1e-6)
    assert found["log_loss"]["low"] < found["log_loss"]["value"] < found["log_loss"]["high"]
    assert found["by_detections"][0]["log_loss"] == pytest.approx(np.mean(by_class), rel=1e-6)
    assert "auc_snia" not in summary(probabilities[labels == 1], labels[labels == 1], CLASSES)
    assert found["auc_snia"] == pytest.approx(area_under_curve(probabilities[:, 2], labels == 2))


def test_alerts_are_grouped_by_their_detections():
    probabilities, labels = answers(300)
    detections = np.repeat([1, 5, 6, 12], [19, 100, 100, 81])
    rows = by_detections(probabilities, labels, detections)
    assert [(row["from"], row["to"], row["alerts"]) for row in rows] == [(5, 6, 200), (11, 20, 81)]
    assert rows[0]["calibration_error"] == pytest.approx(calibration_error(probabilities[19:219], labels[19:219]))


def results(path, probabilities, detections):
    columns = {"alert_id": np.arange(len(probabilities)), "object_id": [f"o{n}" for n in range(len(probabilities))]}
    valid = np.arange(len(probabilities)) % 10 != 0
    columns |= {f"p_{name}": pa.array(probabilities[:, k], mask=~valid) for k, name in enumerate(CLASSES)}
    columns |= {"n_det_g": detections, "n_det_r": detections, "n_forced": detections}
    pq.write_table(pa.table(columns), path)
    return valid


@pytest.mark.parametrize(("key", "suffix"), [("alert_id", "parquet"), ("object_id", "csv")])
def test_a_table_is_joined_with_its_labels(tmp_path, edgekit, key, suffix):
    probabilities, labels = answers(500)
    valid = results(tmp_path / "out.parquet", probabilities, np.full(500, 2))
    names = [CLASSES[label] for label in labels]
    truth = pa.table({key: [f"o{n}" if key == "object_id" else n for n in range(500)][50:], "class": names[50:]})
    file = tmp_path / f"truth.{suffix}"
    csv.write_csv(truth, file) if suffix == "csv" else pq.write_table(truth, file)
    found = evaluate_table(tmp_path / "out.parquet", file)
    rows = np.flatnonzero(valid & (np.arange(500) >= 50))
    expected = summary(probabilities[rows], labels[rows], CLASSES)
    assert found["log_loss"]["value"] == pytest.approx(expected["log_loss"]["value"])
    assert (found["alerts"], found["unlabelled"], found["unclassified"]) == (len(rows), 50, 50)
    assert found["by_detections"][0]["from"] == 4
    done = edgekit("alerts", "evaluate", tmp_path / "out.parquet", "--labels", file)
    assert f"{expected['log_loss']['value']:.3f}" in done.out
    assert "AUC of SN Ia" in done.out
    assert json.loads(edgekit("alerts", "evaluate", tmp_path / "out.parquet", "--labels", file, "--json").out) == found
    shuffled = truth.set_column(1, "class", truth["class"].take(np.random.default_rng(0).permutation(450)))
    pq.write_table(shuffled, tmp_path / "wrong.parquet")
    assert evaluate_table(tmp_path / "out.parquet", tmp_path / "wrong.parquet")["error_rate"]["value"] > 0.6


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"id": [1], "class": ["AGN"]}, "expected 'class', and 'alert_id' or 'object_id'"),
        ({"alert_id": [1], "class": ["Nova"]}, "unknown class 'Nova'"),
        ({"alert_id": [1, 1], "class": ["AGN", "SNIa"]}, "has the classes AGN and SNIa"),
        ({"alert_id": [9_999], "class": ["AGN"]}, "check that they belong together"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, labels, said):
    probabilities, _ = answers(20)
    results(tmp_path / "out.parquet", probabilities, np.full(20, 2))
    pq.write_table(pa.table(labels), tmp_path / "truth.parquet")
    with pytest.raises(EdgekitError, match=said):
        evaluate_table(tmp_path / "out.parquet", tmp_path / "truth.parquet")
    with pytest.raises(EdgekitError, match="has no probabilities"):
        evaluate_table(tmp_path / "truth.parquet", tmp_path / "truth.parquet")
    (tmp_path / "text.parquet").write_text("x")
    with pytest.raises(EdgekitError, match="cannot be read"):
        evaluate_table(tmp_path / "text.parquet", tmp_path / "truth.parquet")
    with pytest.raises(EdgekitError, match="does not exist"):
        evaluate_table(tmp_path / "none.parquet", tmp_path / "truth.parquet")
