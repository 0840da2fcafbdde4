"""The classifier is compared with the network itself. In the run over files, every input packet becomes a row or a
reason."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from alert_broker import classify, plasticc
from alert_broker.classify import Classifier, classify_files, for_survey
from alert_broker.gaussian_process import Status
from alert_broker.packets import AlertBatch, batches, read_blocks
from alert_broker.results import ERRORS, ResultTable, all_bands, result_schema
from alert_broker.simulate import simulate, write
from alert_broker.surveys.base import survey_named
from edgekit.bundle.store import write_bundle
from edgekit.errors import EdgekitError
from tests.alert_broker.small import features_of, small_bundle
from tests.alert_broker.stream.waiting import wait_for

GR, SIX = small_bundle(), small_bundle(plasticc.BANDS, name="small-six", seed=1)
ALERTS = {"ztf": 23, "lsst": 11}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> dict[str, Path]:
    """One folder of packets for each survey: ZTF in containers of four packets, LSST as messages."""
    folder = tmp_path_factory.mktemp("simulated")
    for survey, count in ALERTS.items():
        write(folder / survey, simulate(survey, count, 2, cutouts=False), packets_per_file=4 if survey == "ztf" else 1)
    return {survey: folder / survey for survey in ALERTS}


@pytest.fixture(scope="module")
def ztf(simulated) -> AlertBatch:
    (batch,) = batches(read_blocks([simulated["ztf"]]))
    return batch


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(GR)


def probabilities(rows) -> np.ndarray:
    return np.stack([rows[f"p_{name}"].to_numpy(zero_copy_only=False) for name in plasticc.CLASSES.values()], axis=1)


# --- the stage


def by_torch(bundle, features, curves) -> np.ndarray:
    import torch

    with torch.no_grad():
        inputs = features(curves).inputs().values()
        return torch.softmax(bundle.model()(*map(torch.from_numpy, inputs)), dim=1).numpy()


def test_rows_are_the_networks_answers_in_order(classifier, ztf):
    rows = classifier(ztf)
    assert rows.schema.equals(result_schema(GR.manifest.classes))
    expected = by_torch(GR, for_survey(classifier.features, ztf.survey), ztf.curves)
    np.testing.assert_allclose(probabilities(rows), expected, atol=1e-5)
    assert rows["best_class"].to_pylist() == [GR.manifest.classes[k] for k in expected.argmax(axis=1)]
    np.testing.assert_allclose(rows["best_probability"], expected.max(axis=1), atol=1e-5)
    for name in ("alert_id", "object_id", "survey", "file", "offset", "n_upper_limits", "n_dropped"):
        assert rows[name].equals(ztf.alerts[name])
    assert set(rows["status"].to_pylist()) == {"classified"}
    assert rows["bundle"][0].as_py() == GR.digest[:12]
    assert rows["model"][0].as_py() == "small"
    # the training survey's filters, or other alerts' rows, would give other numbers
    skewed = by_torch(GR, classifier.features, ztf.curves)
    assert np.abs(probabilities(rows) - skewed).max() > 1e-4
    assert np.abs(probabilities(rows) - expected[::-1]).max() > 1e-2


def test_detections_are_counted_per_band(classifier, ztf):
    rows = classifier(ztf).to_pylist()
    assert all_bands() == ("u", "g", "r", "i", "z", "y")
    for number, row in enumerate(rows):
        curve = ztf.curves.take([number])
        for index, band in enumerate(ztf.survey.bands):
            assert row[f"n_det_{band}"] == (curve.detected & (curve.band == index)).sum()
        assert row["n_det_u"] == row["n_det_z"] == 0
        assert row["n_forced"] == (~curve.detected).sum()


def test_wavelengths_are_the_surveys_own_by_band_name():
    features = features_of(("r", "g"))
    assert for_survey(features, survey_named("ztf")).wavelengths == (6436.92, 4804.79)
    assert for_survey(features, survey_named("lsst")) == features


def test_a_batch_of_one_and_the_batch_together_agree(classifier, ztf):
    alone = [classifier(AlertBatch(ztf.survey, ztf.curves.take([k]), ztf.alerts.slice(k, 1))) for k in (0, 7, 22)]
    together = probabilities(classifier(ztf))[[0, 7, 22]]
    np.testing.assert_allclose(np.concatenate([probabilities(rows) for rows in alone]), together, atol=1e-6)


def test_what_cannot_be_classified_says_why_and_has_no_class(classifier, ztf):
    owner = ztf.curves.object_of_point
    flux = np.where(owner == 1, 0.0, ztf.curves.flux)
    band = np.where(owner == 2, 2, ztf.curves.band).astype(np.int8)
    spoiled = replace(ztf.curves, flux=flux, band=band).where(owner != 0)
    rows = classifier(AlertBatch(ztf.survey, spoiled, ztf.alerts)).to_pylist()
    statuses = [row["status"] for row in rows]
    assert statuses[:3] == ["no points in g, r", "no flux in g, r", "no points in g, r"]
    assert set(statuses[3:]) == {"classified"}
    for row in rows[:3]:
        assert row["best_class"] is row["best_probability"] is row["p_SNIa"] is None
        assert row["model"] == "small"
    untouched = probabilities(classifier(ztf))[3:]
    np.testing.assert_allclose(
        np.array([[r[f"p_{c}"] for c in GR.manifest.classes] for r in rows[3:]]), untouched, atol=1e-6
    )


class Constant:
    """A runtime that always returns the same numbers, with NaN in the first row."""

    provider = device = "constant"

    def __init__(self, bundle, *, threads=None, chunk=None):
        self.inputs, self.outputs = bundle.manifest.inputs, bundle.manifest.outputs

    def run(self, arrays):
        rows = len(arrays["light_curve"])
        answer = np.full((rows, 14), 1 / 14, np.float32)
        answer[0] = np.nan
        return {"probabilities": answer}

    def warmup(self, batch):
        pass


def test_numbers_out_of_range_cost_one_row(register, ztf, monkeypatch):
    register("edgekit.sessions", "constant", Constant)
    stage = Classifier(GR, "constant")
    real = classify.LightCurveFeatures.__call__

    def overflowing(self, curves, **options):
        found = real(self, curves, **options)
        found.status[4], found.context[5] = Status.OVERFLOW, np.inf
        return found

    monkeypatch.setattr(classify.LightCurveFeatures, "__call__", overflowing)
    statuses = stage(ztf)["status"].to_pylist()
    assert statuses[0] == statuses[5] == "the numbers grew out of range"
    assert statuses[4] == "flux out of range in g, r"
    assert Counter(statuses)["classified"] == ALERTS["ztf"] - 3


def test_a_survey_without_the_models_bands_is_skipped_row_by_row(ztf):
    rows = Classifier(SIX)(ztf)
    reason = "skipped: small-six needs u, z, y, which ztf does not observe"
    assert set(rows["status"].to_pylist()) == {reason}
    assert rows["best_class"].null_count == len(ztf.curves)
    assert rows["alert_id"].equals(ztf.alerts["alert_id"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"preprocessing": None}, "small: the preprocessing is None; alerts need"),
        ({"preprocessing": {"id": "light-curve-gp/9"}}, "'light-curve-gp/9'"),
        ({"preprocessing": features_of(("g", "r", "i")).to_bundle()}, r"expected \(batch, 20, 2\)"),
        ({"preprocessing": features_of(context=()).to_bundle()}, "input 'context' is missing"),
        ({"classes": ("a", "b")}, "expected one, with a column for each class"),
        (
            {"features": features_of(context=("redshift", "redshift_error"))},
            "the model takes the redshift of the host",
        ),
    ],
)
def test_models_that_cannot_classify_alerts(options, reason):
    bundle = small_bundle(**options)
    with pytest.raises(EdgekitError, match=reason):
        Classifier(bundle)


def test_an_unknown_runtime_names_the_known_ones():
    with pytest.raises(EdgekitError, match=r"unknown runtime 'onnxruntim'.* did you mean 'onnxruntime'"):
        Classifier(GR, "onnxruntim")


# --- the run over files


@pytest.fixture(scope="module")
def mixed(simulated, tmp_path_factory) -> Path:
    """Packets of both surveys, with a container that is cut, one without packets, and one of another survey."""
    folder = tmp_path_factory.mktemp("mixed")
    for survey, source in simulated.items():
        (folder / survey).symlink_to(source)
    bad = folder / "bad"
    bad.mkdir()  # the walk does not follow links to folders, so the test gives the three folders one by one
    whole = sorted(simulated["ztf"].glob("*.avro"))[0].read_bytes()
    (bad / "cut.avro").write_bytes(whole[:-100])  # the last of four packets
    (bad / "none").write_bytes(b"")
    (bad / "text.txt").write_text("not a packet")
    (bad / "foreign.avro").write_bytes(whole.replace(b"ztf.alert", b"xyz.alert").replace(b'"ztf"', b'"xyz"'))
    return folder


def run(mixed, out, **options):
    return classify_files([mixed / "ztf", mixed / "lsst", mixed / "bad"], out, **({"bundle": GR} | options))


def test_every_packet_is_a_row_or_a_reason(mixed, tmp_path):
    account = run(mixed, tmp_path / "out.parquet")
    account.check(account.surveys.total())
    rows = pq.read_table(tmp_path / "out.parquet")
    errors = pq.read_table(tmp_path / "out.errors.parquet")
    assert errors.schema.equals(ERRORS)
    assert account.surveys == {"ztf": 23 + 3, "lsst": 11}
    assert (len(rows), account.classified) == (37, 37)
    bad = Counter()
    for row in errors.to_pylist():
        bad[Path(row["file"]).name, row["status"]] += row["packets"]
    damaged = {("cut.avro", "error"): 1, ("text.txt", "error"): 1, ("none", "error"): 0}
    assert bad == {("foreign.avro", "skipped"): 4, **damaged}
    assert (account.packets, account.corrupt, account.skipped.total()) == (37 + 6, 2, 4)
    assert account.skipped == {"unsupported survey": 4}
    assert account.classes == Counter(rows["best_class"].to_pylist())
    assert len(set(rows["alert_id"].to_pylist())) == 23 + 11  # the cut file repeats three alerts


def test_the_file_says_what_made_it(mixed, tmp_path):
    account = run(mixed, tmp_path / "out.parquet")
    told = json.loads(pq.read_metadata(tmp_path / "out.parquet").metadata[b"edgekit"])
    assert told["models"] == {"small": GR.digest}
    assert told["runtime"].startswith("onnxruntime, CPUExecutionProvider, cpu")
    assert (told["in"], told["corrupt"], told["stopped"]) == (account.packets, account.corrupt, False)
    assert told | {"edgekit": 0} == account.to_json() | {"edgekit": 0}


def test_pandas_reads_it(mixed, tmp_path):
    pandas = pytest.importorskip("pandas")
    run(mixed, tmp_path / "out.parquet")
    frame = pandas.read_parquet(tmp_path / "out.parquet")
    assert frame.n_det_g.dtype == np.int32
    sums = frame.filter(like="p_").sum(axis=1)
    np.testing.assert_allclose(sums[frame.status == "classified"], 1, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 5, 1024])
def test_batches_do_not_change_the_result(mixed, tmp_path, batch):
    run(mixed, tmp_path / "a.parquet")
    run(mixed, tmp_path / "b.parquet", batch=batch)
    order = [("file", "ascending"), ("offset", "ascending")]
    first, second = (pq.read_table(tmp_path / f"{name}.parquet").sort_by(order) for name in "ab")
    np.testing.assert_allclose(probabilities(first), probabilities(second), atol=1e-5)
    assert first.select(["alert_id", "status", "n_forced"]).equals(second.select(["alert_id", "status", "n_forced"]))


def test_each_survey_has_its_model_by_default(mixed, tmp_path, monkeypatch):
    for name, bundle in (("t2-gr", GR), ("t2-ugrizy", SIX)):
        write_bundle(replace(bundle, manifest=replace(bundle.manifest, name=name)), tmp_path / "zoo" / name)
    monkeypatch.setattr("edgekit.bundle.zoo.folders", lambda: {p.name: p for p in (tmp_path / "zoo").iterdir()})
    account = run(mixed, tmp_path / "out.parquet", bundle=None)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert {(row["survey"], row["model"]) for row in rows} == {("ztf", "t2-gr"), ("lsst", "t2-ugrizy")}
    assert set(account.models) == {"t2-gr", "t2-ugrizy"}
    assert account.classified == 37


def test_a_survey_without_a_default_is_explained(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "default_models", lambda: {"lsst": SIX})
    account = run(mixed, tmp_path / "out.parquet", bundle=None)
    assert account.skipped["skipped: ztf has no default model, name one with --model"] == 26
    assert account.classified == 11


def test_an_account_that_does_not_add_up_is_an_error_and_no_file(mixed, tmp_path, monkeypatch):
    def losing(packets, size, **options):
        items = list(batches(packets, size, **options))
        return iter(items[:-1])

    monkeypatch.setattr(classify, "batches", losing)
    with pytest.raises(EdgekitError, match="the account does not add up: 43 packets read"):
        run(mixed, tmp_path / "out.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", [0, 1, 9, 30])
def test_stopped_runs_keep_what_was_read(mixed, tmp_path, after):
    asked = iter(range(1000))
    account = run(mixed, tmp_path / "out.parquet", batch=4, stop=lambda: next(asked) >= after)
    assert account.stopped
    assert account.packets == after
    rows, errors = (pq.read_table(tmp_path / f"out{kind}.parquet") for kind in ("", ".errors"))
    assert len(rows) + sum(errors["packets"].to_pylist()) == after
    assert json.loads(pq.read_metadata(tmp_path / "out.parquet").metadata[b"edgekit"])["stopped"]
    assert len(list(tmp_path.iterdir())) == 2


def test_progress_never_goes_back_and_arrives(mixed, tmp_path):
    seen = []
    run(mixed, tmp_path / "out.parquet", progress=lambda *numbers: seen.append(numbers))
    done, totals, packets = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert list(packets) == sorted(packets)
    assert done[-1] == totals[-1] == sum(f.stat().st_size for part in mixed.iterdir() for f in part.iterdir())


def test_results_are_never_overwritten_unasked(mixed, tmp_path):
    for name in ("out.parquet", "out.errors.parquet"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(EdgekitError, match=f"{name} already exists; choose another name or pass --force"):
            run(mixed, tmp_path / "out.parquet")
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()
    (tmp_path / "out.parquet").write_text("worthless")
    run(mixed, tmp_path / "out.parquet", force=True)
    assert len(pq.read_table(tmp_path / "out.parquet")) == 37


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output": "out.csv"}, "does not end in .parquet"),
        ({"errors": "e.json"}, "does not end in .parquet"),
        ({"errors": "out.parquet"}, "cannot hold both"),
        ({"output": "a-folder.parquet"}, "is a directory"),
        ({"output": "a-file/out.parquet"}, "cannot be written"),
        ({"batch": 0}, "batch size is 0"),
    ],
)
def test_targets_are_checked(mixed, tmp_path, options, reason):
    (tmp_path / "a-folder.parquet").mkdir()
    (tmp_path / "a-file").write_text("")
    options = {name: value if name == "batch" else tmp_path / value for name, value in options.items()}
    with pytest.raises(EdgekitError, match=reason):
        run(mixed, options.pop("output", tmp_path / "out.parquet"), **options)


def test_the_input_is_not_written_over(tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    with pytest.raises(EdgekitError, match="among the files to be read"):
        classify_files([tmp_path], tmp_path / "in.parquet", bundle=GR, force=True)


def test_a_table_is_whole_or_not_there(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(RuntimeError), ResultTable(path, ERRORS):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with ResultTable(path, ERRORS) as table:
        table.describe({"a": 1})
    assert len(pq.read_table(path)) == 0
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), ResultTable(path, ERRORS):
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_slow_compilation_is_said(monkeypatch):
    kernels = (classify.avro, classify.gaussian_process)
    for kernel in kernels:
        monkeypatch.setattr(kernel, "is_compiled", lambda: False)
        monkeypatch.setattr(kernel, "warm_up", lambda: wait_for(lambda: said))  # it takes until that is said
    monkeypatch.setattr(classify, "NOTE_AFTER_SECONDS", 0.01)
    said: list[str] = []
    classify.load_kernels(said.append)
    assert "the first run on a machine compiles them" in said[0]
    monkeypatch.setattr(classify, "NOTE_AFTER_SECONDS", 60.0)
    called = []
    for kernel in kernels:
        monkeypatch.setattr(kernel, "warm_up", lambda kernel=kernel: called.append(kernel))
    classify.load_kernels(said.append)
    assert len(said) == 1
    assert called == list(kernels)
    monkeypatch.setattr(classify.avro, "is_compiled", lambda: True)
    classify.load_kernels(said.append)
    assert called[2:] == [classify.gaussian_process]


# The content of the real folders, and the results of a two-band and a six-band model. The poison files hold 39 packets.
REAL = {
    "small": {"classified": 703, "no points in g, r": 53},
    "small-six": {
        "classified": 552,
        "skipped: small-six needs u, z, y, which ztf does not observe": 203,
        "skipped: small-six needs u, y, which decam does not observe": 1,
    },
}


@pytest.mark.realdata
@pytest.mark.parametrize("bundle", [GR, SIX], ids=list(REAL))
def test_every_real_packet_is_accounted_for(shared_data, tmp_path, bundle):
    account = classify_files([shared_data / "alerts"], tmp_path / "out.parquet", bundle=bundle)
    expected = Counter(REAL[bundle.manifest.name])
    assert account.surveys == {"ztf": 203, "lsst": 74, "elasticc": 449, "elasticc-v0": 29, "decam": 1}
    assert (account.packets, account.corrupt) == (796, 39)
    assert account.classified == expected.pop("classified")
    assert account.skipped == expected + Counter({"unsupported survey": 1})
    assert account.packets == account.classified + account.skipped.total() + account.corrupt
    assert len(pq.read_table(tmp_path / "out.parquet")) == 756
    assert len(pq.read_table(tmp_path / "out.errors.parquet")) == 10
