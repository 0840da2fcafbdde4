"""Replays of Parquet: packets in a column stay equal byte by byte, and rows keep all their values and their light
curves."""

import io
import tarfile
from dataclasses import fields

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alert_broker import containers, simulated_packets
from alert_broker.packets import batches, read_blocks
from alert_broker.simulate import simulate, write
from alert_broker.stream.archive import Archive, Positions
from alert_broker.stream.replay import packets
from edgekit.bundle import bounded
from edgekit.errors import EdgekitError

PACKETS = [b"Obj\x01 one", b"\x00two", b""]


def curves(blocks):
    """Return all light curves that are read, by the alerts' ids."""
    found = {}
    for batch in batches(blocks):
        assert not isinstance(batch, containers.BadPacket), batch
        rows = batch.alerts.drop_columns(["file", "offset"]).to_pylist()
        for number, row in enumerate(rows):
            curve = batch.curves.take(np.array([number]))
            found[row["alert_id"]] = (batch.survey.name, row, curve)
    return found


def same(one, other):
    """Return whether two sets of alerts have bitwise equal light curves."""
    if one.keys() != other.keys():
        return False
    for key, (survey, row, curve) in one.items():
        survey2, row2, curve2 = other[key]
        if (survey, row) != (survey2, row2):
            return False
        for item in fields(curve):
            if not np.array_equal(getattr(curve, item.name), getattr(curve2, item.name), equal_nan=item.name == "flux"):
                return False
    return True


def messages(path):
    return list(packets([path]))


def as_blocks(values):
    return [containers.message(value, index) for index, value in enumerate(values)]


@pytest.mark.parametrize(("name", "column"), [("packet", ""), ("value", ""), ("raw", "raw")])
def test_packets_in_a_column_are_sent_as_they_are(tmp_path, name, column):
    table = pa.table({"x": [1, 2, 3], name: pa.array(PACKETS, pa.binary()), "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "night.parquet")
    assert list(packets([tmp_path], column)) == PACKETS
    with tarfile.open(tmp_path / "night.tar", "w") as archive:
        archive.add(tmp_path / "night.parquet", "night.parquet")
    assert list(packets([tmp_path / "night.tar"], column)) == PACKETS


@pytest.fixture
def sent_by_ztf():
    return [simulated_packets.message("ztf", alert.packet) for alert in simulate("ztf", 12, 5, cutouts=False)]


@pytest.fixture
def rows(sent_by_ztf):
    return [row for value in sent_by_ztf for row in fastavro.reader(io.BytesIO(value))]


def test_rows_of_a_survey_are_sent_with_all_that_they_have(tmp_path, rows, sent_by_ztf):
    table = pa.Table.from_pylist(rows).append_column("added by a-broker", pa.array([0.5] * 12))
    table = table.append_column("seen", pa.array([10**18 + 5000 * k for k in range(12)], pa.timestamp("ns")))
    pq.write_table(table, tmp_path / "night.parquet")
    sent = messages(tmp_path / "night.parquet")
    for number, (value, row) in enumerate(zip(sent, rows, strict=True)):
        (got,) = fastavro.reader(io.BytesIO(value))
        assert got.pop("added_by_a_broker") == 0.5
        assert got.pop("seen") == 10**15 + 5 * number
        # the cutouts are all null
        assert got == {key: item for key, item in row.items() if not key.startswith("cutout")}
    found = curves(as_blocks(sent))
    assert len(found) == 12
    assert same(found, curves(read_blocks([tmp_path / "night.parquet"])))
    assert same(found, curves(as_blocks(sent_by_ztf)))


def test_a_wrong_row_is_seen(tmp_path, rows):
    """Planted: two alerts have exchanged their magnitudes."""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "right.parquet")
    one, two = rows[0]["candidate"], rows[1]["candidate"]
    one["magpsf"], two["magpsf"] = two["magpsf"], one["magpsf"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "wrong.parquet")
    right = curves(read_blocks([tmp_path / "right.parquet"]))
    assert same(right, curves(as_blocks(messages(tmp_path / "right.parquet"))))
    assert not same(right, curves(as_blocks(messages(tmp_path / "wrong.parquet"))))


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "parquet/fink_alerts_2019_51",
        "parquet/fink_datatest_part2_67",
        "parquet/or4_lsst7.1_50",
        "elasticc/elasticc_agn_100",
        "elasticc/elasticc_snia_260",
        "elasticc/elasticc_unlabelled_89",
        "elasticc/elasticc_v0_29",
    ],
)
def test_real_tables(shared_data, name):
    path = shared_data / "alerts" / f"{name}.parquet"
    sent = messages(path)
    assert len(sent) == pq.ParquetFile(path).metadata.num_rows
    assert same(curves(as_blocks(sent)), curves(read_blocks([path])))


def table_of(columns):
    return lambda path: pq.write_table(pa.table(columns), path)


def archived(path):
    archive = Archive(path.parent / "archive", pa.schema([("alert_id", pa.int64())]))
    one = np.array([1])
    (file,) = archive.write(pa.record_batch({"alert_id": [1]}), Positions(["t"], one, one, one))
    file.rename(path)


@pytest.mark.parametrize(("make", "column", "said"), [
    (table_of({"x": [1]}), "", "no binary column packet or value, and no survey has its columns"),
    (table_of({"x": [1], "raw": [b"a"]}), "row", "the column 'row' does not exist; binary columns: raw"),
    (table_of({"x": [1], "raw": [b"a"]}), "x", "the column 'x' is of type int64; binary columns: raw"),
    (archived, "", "an archive of results, which holds no packets"),
    (lambda path: path.write_bytes(b"PAR1 and no more"), "", "cannot be read as Parquet"),
])  # fmt: skip
def test_what_holds_no_packets_is_said(tmp_path, make, column, said):
    make(tmp_path / "night.parquet")
    with pytest.raises(EdgekitError, match=said):
        list(packets([tmp_path / "night.parquet"], column))


def test_a_simulators_true_classes_are_no_packets(tmp_path):
    files = write(tmp_path / "night", simulate("ztf", 3, 5, cutouts=False), packets_per_file=1)
    assert (tmp_path / "night" / "truth.parquet").exists()
    assert len(messages(tmp_path / "night")) == len(files)


def test_tables_that_expand_are_refused(tmp_path, monkeypatch):
    """A few kB that stand for 2 GB are refused before they take memory, in a file and in an archive of files."""
    night = tmp_path / "night.parquet"
    texts = pa.chunked_array([pa.array([b"x" * 500_000] * 100)] * 40)
    pq.write_table(
        pa.table({"packet": texts}), night, use_dictionary=False, column_encoding={"packet": "DELTA_BYTE_ARRAY"}
    )
    with pytest.raises(EdgekitError, match=r"column 'packet' have the encoding DELTA_BYTE"):
        list(packets([night]))
    pq.write_table(pa.table({"packet": [b"x" * 100_000] * 40}), night)
    assert len(list(packets([night]))) == 40
    monkeypatch.setenv(bounded.VARIABLE, "1MB")
    with pytest.raises(EdgekitError, match=r"rows 0 to 40: .* declare 4,000,000 bytes"):
        list(packets([night]))
    (tmp_path / "zeros").write_bytes(bytes(3_000_000))
    with tarfile.open(tmp_path / "night.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "zeros", "zeros")
    with pytest.raises(EdgekitError, match=r"night.tar.gz:zeros: .* declare 3,000,000 bytes"):
        list(packets([tmp_path / "night.tar.gz"]))
