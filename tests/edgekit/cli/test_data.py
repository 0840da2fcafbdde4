"""`edgekit data` writes files that `edgekit compress` reads."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alert_broker import plasticc
from edgekit.bundle.store import write_bundle
from edgekit.data.dataset import load
from tests.alert_broker.small import features_of, small_bundle, small_plasticc, write_plasticc

BUNDLE = small_bundle(name="t2-gr", data="plasticc-gr")


@pytest.fixture
def source(tmp_path) -> Path:
    return write_plasticc(tmp_path / "source", *small_plasticc())


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """zoo(bundle, ...): the models that are installed; data sets go to a folder of the test's own."""

    def install(*bundles):
        folders = {bundle.manifest.name: tmp_path / "zoo" / bundle.manifest.name for bundle in bundles}
        for bundle in bundles:
            write_bundle(bundle, folders[bundle.manifest.name], force=True)
        monkeypatch.setattr("edgekit.bundle.zoo.folders", lambda: folders)

    monkeypatch.setenv("EDGEKIT_DATA", str(tmp_path / "prepared"))
    install(BUNDLE)
    return install


def test_prepared_data_is_what_a_model_is_measured_on(edgekit, zoo, source, tmp_path):
    done = edgekit("data", "plasticc-gr", "--from", source, "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    path = tmp_path / "prepared" / "plasticc-gr.npz"
    assert told["path"] == str(path)
    train, test = load(path, BUNDLE.manifest)
    assert (len(train), len(test)) == (told["train"], told["test"]) == (2 * 42, 14)
    data = plasticc.load(source)
    inputs, labels, split = plasticc.examples(data, features_of())
    for name in ("light_curve", "context"):
        assert np.array_equal(train.inputs[name], inputs[name][split == 0])
        assert np.array_equal(test.inputs[name], inputs[name][split == 1])
    assert np.array_equal(test.labels, labels[split == 1])


def test_preparing_twice_is_said_and_cheap(edgekit, zoo, source, tmp_path):
    assert "not prepared" in edgekit("data").out
    assert edgekit("data", "plasticc-gr", "--from", source).status == 0
    before = (tmp_path / "prepared" / "plasticc-gr.npz").read_bytes()
    again = edgekit("data", "plasticc-gr", "--from", "nowhere")
    assert again.status == 0
    assert "prepared already; --force prepares it again" in " ".join(again.err.split())
    listed = json.loads(edgekit("data", "--json").out)
    assert [(row["name"], row["model"], row["state"]) for row in listed] == [("plasticc-gr", "t2-gr", "prepared")]
    assert edgekit("data", "plasticc-gr", "--from", source, "--force").status == 0
    assert (tmp_path / "prepared" / "plasticc-gr.npz").read_bytes() == before  # to the byte


def test_data_for_other_preprocessing_is_not_taken_for_current(edgekit, zoo, source):
    assert edgekit("data", "plasticc-gr", "--from", source).status == 0
    changed = features_of(margin_days=20.0).to_bundle()
    zoo(replace(BUNDLE, manifest=replace(BUNDLE.manifest, preprocessing=changed)))
    assert edgekit("data").out.splitlines()[1].split() == ["plasticc-gr", "t2-gr", "outdated"]
    assert edgekit("data", "plasticc-gr", "--from", source).failed_with(
        1, "another preprocessing than t2-gr", "--force"
    )
    assert edgekit("data", "plasticc-gr", "--from", source, "--force").status == 0


def test_two_models_may_share_data_only_with_one_preprocessing(edgekit, zoo):
    smaller = replace(BUNDLE, manifest=replace(BUNDLE.manifest, name="t2-gr-tiny"))
    zoo(BUNDLE, smaller)
    assert len(json.loads(edgekit("data", "--json").out)) == 1
    other = features_of(margin_days=20.0).to_bundle()
    zoo(BUNDLE, replace(smaller, manifest=replace(smaller.manifest, preprocessing=other)))
    assert edgekit("data").failed_with(1, "t2-gr", "t2-gr-tiny", "differ in their preprocessing")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plasticc-gt"], ["unknown data set 'plasticc-gt'", "did you mean 'plasticc-gr'"]),
        (
            ["plasticc-gr", "--from", "nowhere"],
            ["nowhere does not hold the training set; expected a folder with plasticc_train_"],
        ),
    ],
)
def test_mistakes_take_one_line(edgekit, zoo, tmp_path, arguments, words):
    done = edgekit("data", *arguments)
    assert done.status == 1
    assert all(word in done.err.splitlines()[-1] for word in words), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "prepared").exists()


def test_without_models_there_is_no_data_set(edgekit, zoo):
    zoo()
    for arguments in ([], ["plasticc-gr"]):
        assert edgekit("data", *arguments).failed_with(1, "no installed model names a data set")


def test_the_list_says_where_data_comes_from_and_what_from_accepts(edgekit, zoo):
    listed = " ".join(edgekit("data").out.split())
    assert "The PLAsTiCC training set" in listed
    assert "--from accepts a folder with plasticc_train_*.parquet, or the snmachine wheel." in listed


def test_without_the_extra_the_install_line_is_named(edgekit, zoo, source, monkeypatch):
    """Numba is in the extra `alerts`, and not in the core."""
    for module in [name for name in sys.modules if name.startswith("alert_broker.")]:
        if module.split(".")[1] in ("features", "gaussian_process", "vectors", "plasticc", "degrade", "lightcurve"):
            monkeypatch.delitem(sys.modules, module)
    for name in ("features", "gaussian_process", "vectors"):
        monkeypatch.delattr(f"alert_broker.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    done = edgekit("data", "plasticc-gr", "--from", source)
    assert done.failed_with(1, "preparing light curves needs numba", "pip install 'edgekit[alerts]'")
    assert edgekit("data").status == 0
