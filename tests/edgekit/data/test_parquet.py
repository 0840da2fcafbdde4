"""Parquet files that expand: what they declare is compared with the limit before they are read."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgekit.bundle import bounded
from edgekit.data.dataset import load
from edgekit.data.parquet import declared_bytes, open_bounded, text_bytes, without_dictionaries
from edgekit.data.parquet_pages import page_sizes
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
    with (tmp_path / "t.parquet").open("rb") as stream:
        (declared,) = declared_bytes(stream, metadata, paths)
        assert declared >= size
        assert declared_bytes(stream, metadata, set()) == [0]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_declare_what_the_footer_declares(version, codec, dictionary, tmp_path):
    rng = np.random.default_rng(0)
    table = pa.table({"x": rng.normal(size=50_000), "t": [f"text {number}" for number in range(50_000)]})
    options = {"compression": codec, "use_dictionary": dictionary, "data_page_version": version, "data_page_size": 9000}
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20_000, write_page_index=True, **options)
    metadata, content = pq.read_metadata(tmp_path / "t.parquet"), (tmp_path / "t.parquet").read_bytes()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            values, size = page_sizes(content, chunk, "x")
            assert values == chunk.num_values
            assert 0.8 * chunk.total_uncompressed_size < size <= chunk.total_uncompressed_size


def test_pages_that_contradict_the_footer_count(tmp_path, tiny_bundle, monkeypatch):
    """The footer declares 120,000 values, and the pages behind it hold five million."""
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    small, large = tmp_path / "small.parquet", tmp_path / "large.parquet"
    rows = {"light_curve": np.random.default_rng(0).normal(size=(5000, 24)).astype(np.float32).tolist()}
    pq.write_table(pa.table(rows | {"labels": [0, 1] * 2500, "split": [0, 1] * 2500}), small, **options)
    pq.write_table(pa.table({"x": np.zeros(5_000_000)}), large, row_group_size=5_000_000, **options)
    page, chunk = (pq.read_metadata(path).row_group(0).column(0) for path in (large, small))
    at, size = page.data_page_offset, page.total_compressed_size
    assert size < chunk.total_compressed_size
    assert at == chunk.data_page_offset
    content = bytearray(small.read_bytes())
    content[at : at + size] = large.read_bytes()[at : at + size]
    values, taken = page_sizes(content, page, "x")
    assert (values, chunk.num_values, chunk.total_uncompressed_size < 1_000_000) == (5_000_000, 120_000, True)
    assert 40_000_000 <= taken <= page.total_uncompressed_size
    small.write_bytes(content)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *arguments: pytest.fail("it is read"))
    with pytest.raises(EdgekitError, match=r"small.parquet: .*pages of column 'light_curve.*' contradict the footer"):
        load(small, tiny_bundle.manifest)
    monkeypatch.setattr("edgekit.data.parquet.page_sizes", lambda *arguments: (0, 0))  # the twin: the footer alone
    with pytest.raises(pytest.fail.Exception, match="it is read"):
        load(small, tiny_bundle.manifest)


@pytest.mark.parametrize(
    "head", [b"", b"\x15", b"\x15" + b"\xff" * 20, b"\x1c" * 400, b"\x19\xf5\xff\xff\xff\x7f", b"\0", b"\x1d"]
)
def test_headers_that_cannot_be_read_are_an_error(head):
    chunk = SimpleNamespace(data_page_offset=0, has_dictionary_page=False, total_compressed_size=1 << 40)
    if head == b"":
        assert page_sizes(head, chunk, "x") == (0, 0)
        return
    with pytest.raises(ValueError, match="the pages of column 'x' contradict the footer"):
        page_sizes(head, chunk, "x")


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


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_texts_whose_size_is_not_declared_are_refused(tmp_path, version):
    """471 bytes stand for 2 GB: each text is a length of the text before it, and nothing more."""
    text = pa.chunked_array([pa.array(["x" * 500_000] * 100)] * 40)
    options = {"use_dictionary": False, "compression": "zstd", "data_page_version": version}
    path, twin = tmp_path / "t.parquet", tmp_path / "plain.parquet"
    pq.write_table(pa.table({"x": text}), path, column_encoding={"x": "DELTA_BYTE_ARRAY"}, **options)
    pq.write_table(pa.table({"x": text[:100]}), twin, column_encoding={"x": "PLAIN"}, **options)
    assert path.stat().st_size < 2000
    with path.open("rb") as stream, pytest.raises(ValueError, match="column 'x' have the encoding DELTA_BYTE_ARRAY"):
        declared_bytes(stream, pq.read_metadata(path), {"x"})
    assert declared_bytes(path.read_bytes(), pq.read_metadata(path), set()) == [0]  # a column that nobody reads
    assert declared_bytes(twin.read_bytes(), pq.read_metadata(twin), {"x"})[0] >= 50_000_000
