"""Finalists are compressed once, under the guard, and what is reported is what the written bundle does."""

from dataclasses import replace

import numpy as np
import pytest

from edgekit.bundle.pack import pack
from edgekit.bundle.store import open_bundle
from edgekit.errors import EdgekitError
from edgekit.nas import compressed
from edgekit.nas.bundles import bundle_of
from edgekit.nas.compressed import compress_finalists
from edgekit.nas.spec import compression_table, spec_of
from edgekit.nn.hiera_config import HieraConfig
from edgekit.session import open_session

CONFIG = HieraConfig((1, 1), ("rep", "global"), (1, 2), (True,), 8, 4, 2, "conv3x2", image=16, channels=1, classes=3)
CLUSTER = {"name": "cluster", "bits": 5, "epochs": 0}
TABLES = {
    "space": {"name": "hybrid2d", "image": 16, "channels": 1, "classes": 3},
    "compress": {"pass": [CLUSTER], "max_loss": 0.1, "objective": "size"},
}


def silent(what, done, total):
    """Show no progress."""


def accuracy(bundle, images, labels):
    found = open_session(bundle, "torch").run({"image": images})["probabilities"]
    return float((found.argmax(axis=1) == labels).mean())


@pytest.fixture
def study(tmp_path):
    """A network, and rows on which it is always right."""
    images = np.random.default_rng(0).normal(size=(160, 1, 16, 16)).astype(np.float32)
    bundle = bundle_of(CONFIG)
    labels = open_session(bundle, "torch").run({"image": images})["probabilities"].argmax(axis=1)
    split = (np.arange(160) % 2).astype(np.int64)
    np.savez(tmp_path / "rows.npz", image=images, labels=labels, split=split)
    spec = spec_of({**TABLES, "score": {"data": str(tmp_path / "rows.npz")}}, "spec.toml")
    return spec, bundle, images[split == 1], labels[split == 1]


def test_the_record_is_what_the_written_bundle_is(study, tmp_path):
    spec, bundle, *test = study
    row = compress_finalists(spec, {"k": bundle}, tmp_path, silent)["k"]
    written = open_bundle(tmp_path / row["bundle"])
    assert row["bytes"] == [len(pack(bundle)), pytest.approx(len(pack(written)), rel=0.1)]
    assert row["bytes"][1] < 0.6 * row["bytes"][0]
    assert row["accuracy"] == [pytest.approx(accuracy(item, *test)) for item in (bundle, written)]
    assert row["accuracy"][0] == 1
    assert all(time > 0 for time in row["milliseconds"])
    assert [(item["pass"], item["kept"]) for item in row["passes"]] == [("cluster", True)]


def test_a_pass_that_loses_too_much_is_rolled_back(study, tmp_path):
    spec, bundle, *_ = study
    coarse = spec_of({"space": TABLES["space"], "score": {"data": spec.score.data}, "compress": {
        "pass": [{**CLUSTER, "bits": 1}], "max_loss": 0.0, "objective": "size"}}, "spec.toml")  # fmt: skip
    row = compress_finalists(coarse, {"k": bundle}, tmp_path, silent)["k"]
    assert [item["kept"] for item in row["passes"]] == [False]
    assert row["accuracy"] == [1, 1]


def test_what_was_compressed_in_the_same_way_is_not_compressed_again(study, tmp_path, monkeypatch):
    spec, bundle, *_ = study
    calls, result = [], []

    def stopped_at_the_second(*arguments, **options):
        calls.append("")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result[0]

    def compress(spec):
        return compress_finalists(spec, {"first": bundle, "second": bundle}, tmp_path, silent)

    def real(*arguments, **options):
        result.append(carry_out(*arguments, **options))
        return result[0]

    carry_out = compressed.carry_out
    monkeypatch.setattr(compressed, "carry_out", real)
    compress_finalists(spec, {"k": bundle}, tmp_path, silent)
    monkeypatch.setattr(compressed, "carry_out", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compress(spec)
    found = compress(spec)
    assert len(calls) == 3
    assert found == compress(spec)
    assert len(calls) == 3
    (tmp_path / "compressed" / "first.json").write_text("{")  # damaged
    compress(spec)
    assert len(calls) == 4
    compress(replace(spec, compress=replace(spec.compress, max_loss=0.2)))
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"\[compress\]: expected either auto = true or the passes"),
        ({"auto": True, "pass": [CLUSTER]}, "expected either auto = true or the passes"),
        ({"recipe": "recipe.toml"}, "recipe"),
        ({"pass": [{"name": "clusters"}]}, "clusters"),
        ({"pass": [{"name": "cluster", "bit": 4}]}, "bit"),
        ({"auto": True, "max_loss": 1.0}, "max_loss = 1.0"),
        ({"auto": True, "trials": 0}, "trials = 0"),
        ({"auto": "yes"}, "auto = 'yes'; expected true or false"),
        ("auto", "expected a table"),
    ],
)
def test_a_bad_table_is_refused(table, message):
    with pytest.raises(EdgekitError, match=message):
        spec_of({**TABLES, "score": {"data": "rows.npz"}, "compress": table}, "spec.toml")


def test_without_rows_nothing_is_compressed():
    with pytest.raises(EdgekitError, match=r"\[compress\] needs \[score\] data"):
        spec_of(TABLES, "spec.toml")


def test_compression_does_not_make_it_another_study(tmp_path):
    (tmp_path / "recipe.toml").write_text('[[pass]]\nname = "cluster"\nbits = 5\nepochs = 0\n')
    assert compression_table(tmp_path / "recipe.toml") == {"pass": [CLUSTER]}
    assert compression_table("auto") == {"auto": True}
    plain = {"space": TABLES["space"], "score": {"data": "rows.npz"}}
    specs = [spec_of({**plain, **more}, "spec.toml") for more in ({}, {"compress": {"auto": True}})]
    assert specs[0].study("rows", "table") == specs[1].study("rows", "table")
