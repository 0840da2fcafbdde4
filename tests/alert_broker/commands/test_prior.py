"""`edgekit alerts classify --prior`: the probabilities are for the class shares, which are recorded."""

import json

import numpy as np
import pyarrow.parquet as pq

from alert_broker import plasticc
from alert_broker.results import METADATA

CLASSES = tuple(plasticc.CLASSES.values())


def test_classify_applies_and_records_the_prior(edgekit, model, tmp_path):
    folder, shares = tmp_path / "alerts", tmp_path / "shares.toml"
    edgekit("alerts", "simulate", "-o", folder, "--survey", "ztf", "--count", 20, "--no-cutouts")
    shares.write_text("\n".join(f'"{name}" = {1 + number}' for number, name in enumerate(CLASSES)))
    tables = {}
    for prior in ("uniform", "lsst", str(shares)):
        target = tmp_path / f"{len(tables)}.parquet"
        done = edgekit("alerts", "classify", folder, "-o", target, "--model", model, "--prior", prior, "--json")
        assert json.loads(done.out)["prior"] == prior
        table = pq.read_table(target)
        assert set(table["prior"].to_pylist()) == {prior}
        assert json.loads(pq.ParquetFile(target).metadata.metadata[METADATA])["prior"] == prior
        tables[prior] = np.stack([table[f"p_{name}"].to_numpy() for name in CLASSES], axis=1)
        assert table["best_class"].to_pylist() == [CLASSES[k] for k in tables[prior].argmax(axis=1)]
    expected = tables["uniform"] * np.arange(1, 15)
    np.testing.assert_allclose(tables[str(shares)], expected / expected.sum(axis=1, keepdims=True), atol=1e-5)
    assert np.abs(tables["lsst"] - tables["uniform"]).max() > 0.05
    assert edgekit("alerts", "classify", folder, "-o", tmp_path / "x.parquet", "--prior", "moon").failed_with(1, "moon")
