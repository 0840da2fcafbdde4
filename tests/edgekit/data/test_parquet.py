"""Parquet files that expand: what they declare is compared with the limit before they are read."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgekit.bundle import bounded
from edgekit.data.dataset import load
from edgekit.data.parquet import declared_bytes, open_bounded, text_bytes, without_dictionaries
from edgekit.errors import EdgekitError

ROWS = 2_000_000  # 24 numbers of 4 bytes each: 192 MB in memory


@pytest.fixture
def bomb(tmp_path):
    """A table of equal rows, as the tiny model takes them: 192 MB in a few hundred kB."""
    schema = pa.schema([("light_curve", pa.list_(pa.float32())), ("labels", pa.int64()), ("split", pa.int64())])
    path = tmp_path / "bomb.parquet"
    step = ROWS // 10
    flat = pa.array(np.zeros(24 * step, np.float32))
    lists = pa.ListArray.from_arrays(pa.array(np.arange(0, 24 * step + 1, 24, dtype=np.int32)), flat)
    zeros = pa.array(np.zeros(step, np.int64))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for _ in range(10):
            writer.write_table(pa.table([lists, zeros, zeros], schema=schema))
    return path


def test_a_table_that_expands_is_refused_before_it_is_read(bomb, tiny_bundle, monkeypatch):
    assert bomb.stat().st_size < 400_000
    monkeypatch.setenv(bounded.VARIABLE, "100MB")
    read = pq.ParquetFile.read
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *arguments: pytest.fail("it is read"))
    with pytest.raises(
        EdgekitError, match=r"bomb.parquet: .* bytes declare 224,000,000 bytes .*--read-limit"
    ) as caught:
        load(bomb, tiny_bundle.manifest)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(pq.ParquetFile, "read", read)
    monkeypatch.setenv(bounded.VARIABLE, "1GB")
    with pytest.raises(EdgekitError, match="2000000 training and 0 test samples"):  # it is read, and has no test rows
        load(bomb, tiny_bundle.manifest)


def test_only_the_columns_that_are_read_count(tmp_path, tiny_bundle, monkeypatch):
    rows = {"light_curve": np.ones((6, 24), np.float32).tolist(), "labels": [0, 1, 2] * 2, "split": [0, 1] * 3}
    pq.write_table(pa.table(rows | {"notes": ["x" * 1_000_000] * 6}), tmp_path / "t.parquet")
    monkeypatch.setenv(bounded.VARIABLE, "50KB")
    assert len(load(tmp_path / "t.parquet", tiny_bundle.manifest)[0]) == 3


@pytest.mark.parametrize(
    ("values", "kind", "size"),
    [
        ([1.0] * 10, pa.float64(), 80),
        ([True] * 10, pa.bool_(), 10),
        ([b"12345"] * 10, pa.binary(5), 50),
        ([[1, 2], None, [3]], pa.list_(pa.int32()), 16),
        ([{"a": 1, "b": 2.0}] * 10, pa.struct([("a", pa.int64()), ("b", pa.float32())]), 120),
    ],
)
def test_declared_bytes_are_at_least_those_in_memory(values, kind, size, tmp_path):
    table = pa.table({"x": pa.array(values, kind)})
    pq.write_table(table, tmp_path / "t.parquet", compression="none")
    metadata = pq.read_metadata(tmp_path / "t.parquet")
    paths = {metadata.schema.column(index).path for index in range(metadata.num_columns)}
    (declared,) = declared_bytes(metadata, paths)
    assert declared >= size
    assert declared_bytes(metadata, set()) == [0]


def test_texts_are_measured_before_they_take_memory(tmp_path):
    """A thousand texts of a million letters are one text and a count."""
    nested = [[{"flag": "t" * 1000}] * 3, [], None] * 10
    table = pa.table({"name": ["x" * 1_000_000] * 30, "history": nested, "number": np.arange(30)})
    pq.write_table(table, tmp_path / "t.parquet")
    with open_bounded(tmp_path / "t.parquet") as parquet:
        batch = next(parquet.iter_batches(30))
    found = {name: text_bytes(batch[name]) for name in batch.schema.names}
    assert found["name"] == 30_000_000
    assert found["history"] >= 30_000
    assert found["number"] == 0
    assert batch["name"].nbytes < 2_000_000, "one text, and its numbers"
    assert without_dictionaries(batch).to_pylist() == table.to_pylist()
