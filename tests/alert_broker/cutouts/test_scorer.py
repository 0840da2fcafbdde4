"""Alerts get the score of their own images; what cannot be read costs one score, with a counted reason."""

import gzip
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from alert_broker import containers, simulated_packets
from alert_broker.classify import Classifiers, classify_files
from alert_broker.cutouts import reader as module
from alert_broker.cutouts.fits import CUT_SHORT, NO_FITS, NO_IMAGE, TOO_LARGE
from alert_broker.cutouts.inflate import BOMB, DAMAGED
from alert_broker.cutouts.reader import MISSING, READ, REASONS, SHARE, UNEXPECTED, CutoutReader
from alert_broker.cutouts.scorer import NOT_FINITE, CutoutScorer
from alert_broker.cutouts.tensors import CutoutTensors
from alert_broker.packets import batches, read_blocks
from alert_broker.simulate import simulate, write
from edgekit.errors import EdgekitError
from tests.alert_broker.small import fits, small_bundle, small_cutout_bundle

NAMES = ("cutoutScience", "cutoutTemplate", "cutoutDifference")
PLAIN = fits(np.random.default_rng(0).normal(size=(63, 63)).astype(np.float32))
GOOD = gzip.compress(PLAIN, mtime=0)


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Simulated packets of ZTF (containers of four) and LSST (messages), with images."""
    folder = tmp_path_factory.mktemp("night")
    write(folder / "ztf", simulate("ztf", 9, 4), packets_per_file=4)
    write(folder / "lsst", simulate("lsst", 5, 4), packets_per_file=1)
    return folder


@pytest.fixture(scope="module")
def bundle():
    return small_cutout_bundle()


def stamp(file):
    """The first image of a simulated FITS file, whose header is one block."""
    content = gzip.decompress(file) if file[:2] == b"\x1f\x8b" else file
    side = int(content[:2880].split(b"NAXIS1  =")[1][:21])
    return np.frombuffer(content, ">f4", side * side, 2880).reshape(side, side).astype(np.float32)


def expected_of(bundle, survey, count):
    """The score of each alert by its id, from the simulated images themselves and by torch."""
    model, tensors = bundle.model(), CutoutTensors.from_bundle(bundle.manifest.preprocessing, "x")
    scores = {}
    for alert in simulate(survey, count, 4):
        packet = alert.packet
        images = [stamp(packet[name]["stampData"] if survey == "ztf" else packet[name]) for name in NAMES]
        with torch.no_grad():
            score = model(torch.from_numpy(tensors(np.stack(images)[None]))).softmax(-1)[0, 1].item()
        scores[packet["candid"] if survey == "ztf" else packet["diaSource"]["diaSourceId"]] = score
    return scores


def test_files_have_the_scores_of_their_own_images(night, bundle, tmp_path):
    account = classify_files([night], tmp_path / "out.parquet", bundle=small_bundle(), cutouts=bundle, batch=4)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    expected = expected_of(bundle, "ztf", 9) | expected_of(bundle, "lsst", 5)
    assert {row["alert_id"] for row in rows} == set(expected)
    for row in rows:
        assert row["drb"] == pytest.approx(expected[row["alert_id"]], abs=1e-5)
        assert row["drb_model"] == bundle.digest[:12]
    assert len({round(value, 5) for value in expected.values()}) > 5  # a score of another alert would show
    assert account.cutouts.scored == 14
    assert account.to_json()["cutouts"]["unscored"] == {}
    assert account.seconds["cutouts"] > 0


def test_without_the_option_nothing_changes(night, bundle, tmp_path):
    tables = {}
    for name, cutouts in (("without", None), ("with", bundle)):
        account = classify_files([night], tmp_path / f"{name}.parquet", bundle=small_bundle(), cutouts=cutouts)
        tables[name] = pq.read_table(tmp_path / f"{name}.parquet")
        assert ("cutouts" in account.to_json()) == (cutouts is not None)
        assert ("cutouts" in account.seconds) == (cutouts is not None)
    assert tables["with"].drop_columns(["drb", "drb_model"]).equals(tables["without"])
    assert tables["with"].schema.names[-2:] == ["drb", "drb_model"]


def test_tables_have_the_same_scores_as_packets(night, bundle, tmp_path):
    """Parquet with ZTF's layout, as archives store it."""
    import pyarrow as pa

    rows = [alert.packet for alert in simulate("ztf", 9, 4)]
    (tmp_path / "table").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table" / "a.parquet")
    classify_files([tmp_path / "table"], tmp_path / "out.parquet", bundle=small_bundle(), cutouts=bundle)
    found = {row["alert_id"]: row["drb"] for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    expected = expected_of(bundle, "ztf", 9)
    assert set(found) == set(expected)
    assert all(found[alert] == pytest.approx(score, abs=1e-5) for alert, score in expected.items())


BAD = {
    "none": (None, MISSING),
    "text": (b"hello", NO_FITS),
    "empty gzip": (gzip.compress(b""), NO_FITS),
    "damaged": (GOOD[:-20], DAMAGED),
    "bomb": (gzip.compress(bytes(1 << 22)), BOMB),
    "short": (gzip.compress(PLAIN[:9000]), CUT_SHORT),
    "table": (gzip.compress(fits(np.zeros((3, 3), np.float32), {"NAXIS": 3, "NAXIS3": 1})), NO_IMAGE),
    "large": (gzip.compress(fits(np.zeros((63, 64), np.float32))), TOO_LARGE),
}


@pytest.mark.parametrize("threads", [1, 3])
def test_every_reason(threads):
    assert {reason for _, reason in BAD.values()} | {UNEXPECTED} == set(REASONS)
    triplets, expected = [], []
    for place in range(3):
        for data, reason in BAD.values():
            triplet = [GOOD, memoryview(GOOD), PLAIN]
            triplet[place] = data
            triplets += [tuple(triplet), (GOOD, GOOD, GOOD)]
            expected += [REASONS.index(reason), READ]
    triplets, expected = triplets * 3, expected * 3
    assert len(triplets) > SHARE
    inputs, codes = CutoutReader(CutoutTensors(), threads=threads)(triplets)
    assert codes.tolist() == expected
    good = inputs[codes == READ]
    assert np.isfinite(good).all()
    assert (good == good[0]).all()


def test_an_exception_of_the_program_costs_one_score(monkeypatch):
    real = module.read_image

    def failing(data):
        if len(data) == 7:
            raise ZeroDivisionError("of the test")
        return real(data)

    monkeypatch.setattr(module, "read_image", failing)
    codes = CutoutReader(CutoutTensors())([(GOOD,) * 3, (GOOD, b"seven..", GOOD), (GOOD,) * 3])[1]
    assert codes.tolist() == [READ, REASONS.index(UNEXPECTED), READ]


def batch_of(packets):
    (batch,) = batches(
        (containers.message(packet, index) for index, packet in enumerate(packets)), len(packets), images=True
    )
    return batch


def test_damaged_images_cost_their_alert_the_score_and_no_more(bundle):
    packets = [alert.packet for alert in simulate("ztf", 6, 4)]
    packets[1]["cutoutDifference"]["stampData"] = b"no image"
    packets[3]["cutoutScience"] = None
    scorer = CutoutScorer(bundle)
    classifiers = Classifiers(small_bundle(), "onnxruntime", cutouts=scorer)
    rows = classifiers(batch_of([simulated_packets.message("ztf", packet) for packet in packets]))
    assert rows.schema.equals(classifiers.schema)
    assert rows["drb"].is_null().to_pylist() == [False, True, False, True, False, False]
    assert rows["status"].to_pylist() == ["classified"] * 6
    assert scorer.outcomes() == {"scored": 4, NO_FITS: 1, MISSING: 1}
    assert classifiers.seconds["cutout-inference"] > 0


def test_an_answer_that_is_no_number_is_null(bundle, monkeypatch):
    scorer = CutoutScorer(bundle)
    real = scorer.session.run

    def run(inputs):
        (name, values), *_ = real(inputs).items()
        values[1] = np.nan
        return {name: values}

    monkeypatch.setattr(scorer.session, "run", run)
    packets = [simulated_packets.message("ztf", alert.packet) for alert in simulate("ztf", 3, 4)]
    columns = scorer(batch_of(packets))
    assert columns["drb"].is_null().to_pylist() == [False, True, False]
    assert scorer.outcomes() == {"scored": 2, NOT_FINITE: 1}


def test_the_parts_of_a_large_batch_are_joined_in_order(bundle, monkeypatch):
    packets = [simulated_packets.message("ztf", alert.packet) for alert in simulate("ztf", 7, 4)]
    whole = CutoutScorer(bundle)(batch_of(packets))["drb"].to_pylist()
    monkeypatch.setattr("alert_broker.cutouts.scorer.AT_ONCE", 3)
    parts = CutoutScorer(bundle)(batch_of(packets))["drb"].to_pylist()
    assert parts == pytest.approx(whole, abs=1e-6)
    assert len(set(whole)) == 7


@pytest.mark.parametrize("images", [False, True])
def test_images_are_views_and_only_read_if_wanted(night, images):
    for batch in batches(read_blocks([night / "lsst"], images=images), 3, images=images):
        assert (batch.images is not None) == images
        if images:
            assert all(isinstance(image, memoryview) for triplet in batch.images for image in triplet)
            again = batch.take([1, 0])
            assert again.images == [batch.images[1], batch.images[0]]
            assert again.alerts["alert_id"].to_pylist() == batch.alerts["alert_id"].to_pylist()[1::-1]


def test_models_that_score_no_images_are_refused(bundle):
    with pytest.raises(EdgekitError, match="its preprocessing is"):
        CutoutScorer(small_bundle())
    manifest = bundle.manifest
    other = replace(bundle, manifest=replace(manifest, classes=("false", "true")))
    with pytest.raises(EdgekitError, match="a class 'real'"):
        CutoutScorer(other)
    smaller = manifest.preprocessing | {"size": 60}
    with pytest.raises(EdgekitError, match=r"makes one input \(batch, 60, 60, 3\)"):
        CutoutScorer(replace(bundle, manifest=replace(manifest, preprocessing=smaller)))


def test_the_command(night, bundle, edgekit, tmp_path):
    from edgekit.bundle.store import write_bundle

    write_bundle(bundle, tmp_path / "small.edge")
    command = ["alerts", "classify", night, "-o", tmp_path / "a.parquet", "--cutouts", tmp_path / "small.edge"]
    done = edgekit(*command)
    assert done.status == 0, done.err
    assert "14 with a drb, small-braai" in done.out
    assert pq.read_schema(tmp_path / "a.parquet").field("drb").nullable
    assert edgekit(*command[:-1], tmp_path / "no.edge", "--force").failed_with(1, "no.edge")
