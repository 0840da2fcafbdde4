"""The tool that sets models beside the published weights, which get their own preprocessing, and SPCC its filters."""

import numpy as np
import pytest

from alert_broker import plasticc
from alert_broker.surveys.base import survey_named
from edgekit.data.dataset import Dataset
from edgekit.nn.t2_weights import from_published
from edgekit.nn.training import probabilities
from tools import evaluate_t2

pytestmark = pytest.mark.realdata
WEIGHTS = "weights_t2_GR_noZ.npz"


def scaling_of(folder):
    with np.load(folder / "reference_io.npz") as saved:
        names = ("scaler_center_ugrizy_order_g_i_r_u_y_z", "scaler_scale")
        return {"center": saved[names[0]].astype(np.float64), "scale": saved[names[1]].astype(np.float64)}


def test_published_weights_answer_as_behind_their_own_preprocessing(shared_data):
    """The stored output of the published preprocessing (george), scaled and run, against what the tool computes."""
    reference, scaling = shared_data / "t2_reference", scaling_of(shared_data / "t2_reference")
    chosen = np.arange(0, 7848, 60)
    data = plasticc.load(shared_data / "train").take(chosen)
    with np.load(shared_data / "train" / "plasticc_train_gp100_original.npz") as saved:
        rows = np.searchsorted(saved["object_id"], data.object_id)
        assert (saved["object_id"][rows] == data.object_id).all()
        stored = saved["X"][rows].astype(np.float64)
    with np.load(reference / WEIGHTS) as saved:
        model = from_published(dict(saved), context=0)

    def answer(channels):
        scaled = (stored - scaling["center"]) / scaling["scale"]
        inputs = {"light_curve": scaled[:, :, channels].astype(np.float32)}
        return probabilities(model, Dataset(inputs, np.zeros(len(chosen), np.int64)))

    population = evaluate_t2.Population("x", data.curves, data.label, survey_named("lsst").wavelengths)
    found = evaluate_t2.published(reference / WEIGHTS, scaling, population)
    apart = np.abs(found - answer([0, 2])).max(axis=1)  # channels g, i, r, u, y, z
    assert np.quantile(apart, 0.9) < 0.02
    assert np.quantile(np.abs(found - answer([2, 0])).max(axis=1), 0.5) > 0.1  # planted: g and r swapped


def test_spcc_has_its_types_filters_and_magnitudes(shared_data):
    found = evaluate_t2.spcc(shared_data / "train")
    assert found.curves.bands == tuple("griz")
    assert len(found.labels) == len(found.curves) == 5330
    share = np.bincount(found.labels, minlength=14) / len(found.labels)
    names = evaluate_t2.CLASSES
    assert share[names.index("SNIa")] == pytest.approx(5088 / 21319, abs=0.02)
    assert share[names.index("SNII")] == pytest.approx((12027 + 789 + 425 + 189) / 21319, abs=0.02)
    assert share[names.index("SNIbc")] == pytest.approx((1438 + 1104 + 259) / 21319, abs=0.02)
    assert (np.diff(found.curves.time)[np.diff(found.curves.object_of_point) == 0] >= 0).all()
    assert found.detections.max() > 50
    best = np.quantile(found.curves.flux[found.curves.detected], 0.5)
    assert 21 < 27.5 - 2.5 * np.log10(best) < 25  # DES's supernovae
