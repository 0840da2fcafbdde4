"""cutout-rb: it runs by its name, its card says what its log holds, and its log is of the real triplets."""

import csv
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from alert_broker.cutouts.braai import from_published
from alert_broker.cutouts.tensors import CutoutTensors
from alert_broker.simulate import simulate, write
from alert_broker.stream import config as configuration
from alert_broker.stream.classifiers import open_all_classifiers
from alert_broker.work_budget import Budget
from edgekit.bundle.tensors import read_arrays
from edgekit.importers.files import resolve
from tests.alert_broker.cutouts.test_scorer import expected_of
from tests.conftest import ROOT
from tools import make_cutout_card

MODEL = ROOT / "models" / "cutout-rb"


@pytest.fixture(scope="module")
def bundle():
    return resolve("cutout-rb")


@pytest.fixture(scope="module")
def held_out():
    rows = list(csv.DictReader((MODEL / "held_out.csv").open()))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def scores(model, tensors, images):
    with torch.no_grad():
        return model(torch.from_numpy(tensors(images))).softmax(-1)[:, 1].numpy()


def test_classify_takes_it_by_name(bundle, edgekit, tmp_path):
    write(tmp_path / "night", simulate("ztf", 6, 4), packets_per_file=3)
    done = edgekit("alerts", "classify", tmp_path / "night", "-o", tmp_path / "out.parquet", "--cutouts", "cutout-rb")
    assert done.status == 0, done.err
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    expected = expected_of(bundle, "ztf", 6)
    assert {row["alert_id"]: row["drb"] for row in rows} == pytest.approx(expected, abs=1e-5)
    assert {row["drb_model"] for row in rows} == {bundle.digest[:12]}


def test_a_stream_takes_it_by_name(bundle):
    settings = configuration.Config(
        model=configuration.Model(runtime="torch"), cutouts=configuration.Cutouts(model="cutout-rb")
    )
    assert open_all_classifiers(settings, Budget(), print).cutouts.bundle.digest == bundle.digest


def test_the_card_is_made_of_the_stored_numbers(held_out):
    text = (MODEL / "README.md").read_text()
    assert text == make_cutout_card.stored_card()
    # the same numbers by the definitions
    real, called, other = (held_out[name] >= 0.5 for name in ("drb", "cutout_rb", "d6_m9"))
    for label, ours, theirs, of in (
        ("same verdict", called == real, other == real, np.ones(len(real), bool)),
        ("missed", ~called & real, ~other & real, real),
        ("false positives", called & ~real, other & ~real, ~real),
    ):
        row = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
        stated = re.findall(r"\((\d+) of (\d+)\)", row)
        assert stated == [(str(kind.sum()), str(of.sum())) for kind in (ours, theirs)]
    # the twin: another score gives another card
    facts, times = (json.loads(path.read_text()) for path in (MODEL / "training.json", make_cutout_card.TIMES))
    changed = {**held_out, "cutout_rb": np.where(np.arange(len(real)) == 0, 1 - held_out["cutout_rb"], 0.0)}
    assert make_cutout_card.card(resolve("cutout-rb"), changed, facts, times) != text


def test_the_training_log_is_complete(bundle):
    facts = json.loads((MODEL / "training.json").read_text())
    epochs = [int(row["epoch"]) for row in csv.DictReader((MODEL / "training_log.csv").open())]
    assert epochs == list(range(1, facts["schedule"]["epochs"] + 1))
    assert bundle.manifest.seed == 0
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 400_000


@pytest.mark.realdata
def test_the_log_is_of_the_real_triplets(bundle, held_out, shared_data):
    known = np.load(shared_data / "braai" / "ztf_triplets.npz")
    assert held_out["drb"] == pytest.approx(known["drb"], abs=1e-5)
    d6_m9 = from_published(read_arrays(shared_data / "braai" / "weights_d6_m9.npz"))
    assert held_out["d6_m9"] == pytest.approx(scores(d6_m9, CutoutTensors(63, "image"), known["images"]), abs=1e-4)
    folds = [set(known["object_id"][held_out["fold"] == fold]) for fold in np.unique(held_out["fold"])]
    assert sum(map(len, folds)) == len(set.union(*folds)), "an object is in two folds"


@pytest.mark.realdata
def test_the_stored_network_has_learned_these_triplets(bundle, shared_data):
    """It was trained on copies of all of them, so this says that training and preprocessing fit, and nothing about
    other objects."""
    known = np.load(shared_data / "braai" / "ztf_triplets.npz")
    real = known["drb"] >= 0.5
    tensors = CutoutTensors.from_bundle(bundle.manifest.preprocessing, "cutout-rb")
    assert ((scores(bundle.model(), tensors, known["images"]) >= 0.5) == real).mean() >= 0.95
    # the twin has the other norm
    wrong = CutoutTensors(63, "image", channels="first")
    assert ((scores(bundle.model(), wrong, known["images"]) >= 0.5) == real).mean() < 0.95
