"""Data files: a file that fits the model is read; for every other file, the error says what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from edgekit.data import dataset
from edgekit.data.dataset import Dataset, load, locate, save
from edgekit.errors import EdgekitError


def test_what_is_saved_comes_back_split(data_file, tiny_bundle, tiny_data):
    for got, wanted in zip(load(data_file, tiny_bundle.manifest), tiny_data, strict=True):
        assert len(got) == len(wanted)
        assert got.labels.dtype == np.int64
        assert np.array_equal(got.labels, wanted.labels)
        assert np.array_equal(got.inputs["light_curve"], wanted.inputs["light_curve"])


def test_inputs_come_in_the_order_in_which_the_network_takes_them(tmp_path, tiny_bundle):
    from edgekit.bundle.tensors import TensorSpec

    specs = (TensorSpec("z", ("batch", 1)), TensorSpec("a", ("batch", 1)))
    one = np.ones((2, 1), np.float32)
    save(tmp_path / "x.npz", {"a": one, "z": 2 * one}, np.array([0, 1]), np.array([0, 1]))
    train, _ = load(tmp_path / "x.npz", replace(tiny_bundle.manifest, inputs=specs))
    assert list(train.inputs) == ["z", "a"]
    assert train.inputs["z"].tolist() == [[2.0]]


def test_labels_of_many_classes_come_back(tmp_path):
    labels = np.array([0, 40_000, 2**31 - 1])
    save(tmp_path / "x.npz", {"a": np.ones((3, 1), np.float32)}, labels, np.array([0, 1, 1]))
    assert np.load(tmp_path / "x.npz")["labels"].tolist() == labels.tolist()


def test_take_keeps_rows_together(tiny_data):
    part = tiny_data[0].take(np.array([5, 2, 5]))
    assert len(part) == 3
    assert np.array_equal(part.inputs["light_curve"], tiny_data[0].inputs["light_curve"][[5, 2, 5]])
    assert np.array_equal(part.labels, tiny_data[0].labels[[5, 2, 5]])


BAD = {
    "no input": (lambda a: a.pop("light_curve"), "no array 'light_curve'"),
    "no labels": (lambda a: a.pop("labels"), "no array 'labels'"),
    "no split": (lambda a: a.pop("split"), "no array 'split'"),
    "NaN": (lambda a: a["light_curve"].__setitem__((0, 0, 0), np.nan), "NaN"),
    "other shape": (lambda a: a.update(light_curve=np.zeros((6, 9, 2), np.float32)), r"\(batch, 12, 2\)"),
    "other dtype": (lambda a: a.update(light_curve=np.zeros((6, 12, 2))), "float64"),
    "fewer labels": (lambda a: a.update(labels=np.zeros(5, np.int64)), "5 labels"),
    "a class too many": (lambda a: a.update(labels=np.full(6, 3)), "3"),
    "a negative class": (lambda a: a.update(labels=np.full(6, -1)), "-1"),
    "labels are numbers with fractions": (lambda a: a.update(labels=np.zeros(6)), "labels.*float64"),
    "labels are names": (lambda a: a.update(labels=np.array(["SNIa"] * 6)), "labels"),
    "labels are one-hot": (lambda a: a.update(labels=np.zeros((6, 3), np.int64)), "labels"),
    "nothing to test on": (lambda a: a.update(split=np.zeros(6, np.int8)), "0 test"),
    "nothing to train on": (lambda a: a.update(split=np.ones(6, np.int8)), "0 training"),
    "a third part": (lambda a: a.update(split=np.array([0, 0, 1, 1, 2, 2])), "split holds 2"),
    "no rows": (lambda a: a.update({name: value[:0] for name, value in a.items()}), "0 training"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_an_error_that_says_why(change, words, tmp_path, tiny_bundle):
    arrays = {
        "light_curve": np.zeros((6, 12, 2), np.float32),
        "labels": np.array([0, 1, 2, 0, 1, 2]),
        "split": np.array([0, 0, 0, 1, 1, 1]),
    }
    np.savez(tmp_path / "good.npz", **arrays)
    load(tmp_path / "good.npz", tiny_bundle.manifest)
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(EdgekitError, match=words) as caught:
        load(tmp_path / "bad.npz", tiny_bundle.manifest)
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_file(tmp_path, tiny_bundle):
    (tmp_path / "text.npz").write_text("hello")
    for name in ("none.npz", "text.npz"):
        with pytest.raises(EdgekitError, match=name):
            load(tmp_path / name, tiny_bundle.manifest)


def test_where_data_sets_live(monkeypatch, tmp_path):
    monkeypatch.delenv("EDGEKIT_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert dataset.folder() == tmp_path / "xdg" / "edgekit"
    monkeypatch.setenv("EDGEKIT_DATA", str(tmp_path / "mine"))
    assert dataset.folder() == tmp_path / "mine"


def test_which_file_is_used(monkeypatch, tmp_path, tiny_bundle):
    monkeypatch.setenv("EDGEKIT_DATA", str(tmp_path))
    named = replace(tiny_bundle.manifest, data="toys")
    assert locate(tiny_bundle.manifest, "mine.npz") == "mine.npz"
    with pytest.raises(EdgekitError, match="pass --data"):
        locate(tiny_bundle.manifest, None)
    with pytest.raises(EdgekitError, match="edgekit data toys"):
        locate(named, None)
    (tmp_path / "toys.npz").touch()
    assert locate(named, None) == tmp_path / "toys.npz"


def test_a_data_set_has_as_many_samples_as_labels():
    assert len(Dataset({}, np.zeros(3, np.int64))) == 3
