"""Reading packets: every type of file, every type of damage, and the account of all real packets."""

import json
import random
import re
import shutil
import zlib
from collections import Counter
from pathlib import Path

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alert_broker.avro.columns import Columns
from alert_broker.containers import BadPacket, split
from alert_broker.packets import ALERT_COLUMNS, AlertBatch, ParquetRows, batches, find_files, read_blocks
from alert_broker.simulate import simulate, write
from alert_broker.surveys.base import survey_named
from edgekit.errors import EdgekitError
from tests.alert_broker.ztf_containers import SYNC, alert, container, schema


def read(data: bytes) -> list[dict | BadPacket]:
    """Return a row of `ALERT_COLUMNS` for each alert, and the bad packets, in the order of the file."""
    found = []
    for item in batches(split(data, "bytes")):
        found += [item] if isinstance(item, BadPacket) else item.alerts.to_pylist()
    return sorted(found, key=lambda item: item.offset if isinstance(item, BadPacket) else item["offset"])


def ids(data: bytes) -> list[int | None]:
    """Return the alerts' ids; a bad packet is None."""
    return [None if isinstance(item, BadPacket) else item["alert_id"] for item in read(data)]


def only_bad(data: bytes) -> BadPacket:
    (bad,) = read(data)
    assert isinstance(bad, BadPacket), bad
    return bad


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> dict[str, Path]:
    """One file for each form that surveys send: a ZTF container, an LSST message, and an LSST container."""
    folder = tmp_path_factory.mktemp("simulated")
    files = {
        "ztf": write(folder / "ztf", simulate("ztf", 1, 3), 1)[0],
        "lsst": write(folder / "lsst", simulate("lsst", 1, 3), 1)[0],
        "lsst_container": write(folder / "container", simulate("lsst", 3, 3))[0],
    }
    assert [path.suffix for path in files.values()] == [".avro", ".bin", ".avro"]
    return files


def test_packets_of_a_container_with_their_bytes():
    data = container([alert(1), alert(2)])
    first, second = read(data)
    assert (first["alert_id"], second["alert_id"]) == (1, 2)
    # the length of a string as a zigzag number, then the string
    assert data[second["offset"] :][:13] == b"\x18ZTF24aaaaaaa"


def test_deflate_is_read_and_other_codecs_are_named():
    packets = read(container([alert(1), alert(2)], codec="deflate"))
    assert [packet["alert_id"] for packet in packets] == [1, 2]
    assert packets[0]["offset"] == packets[1]["offset"]
    data = container([alert()]).replace(b"null", b"lzma", 1)
    assert "codec is 'lzma'; supported: null, deflate" in only_bad(data).reason


def test_a_deflate_block_that_is_damaged():
    data = container([alert(1)], codec="deflate")
    start = data.index(SYNC) + 18
    assert "does not decompress" in only_bad(data[:start] + b"\xff" * 8 + data[start + 8 :]).reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\x89PNG and more", "begins with 89 50 4e 47"),
        (b"Obj\x01", "header cannot be used: it ends inside a number"),
        (b"Obj\x01\x02\x16avro", "it claims that 11 bytes follow"),
        (b"Obj\x01" + b"\xff" * 20, "more than 64 bits"),
        (b"\x00\x00\x00", "Confluent message has 3 bytes"),
        (b"\x00\x00\x00\x12\x67datum", "unknown LSST schema id 4711"),
        (b"\x00\x00\x00\x04\x4cnot a datum", "does not decode as lsst.v11_0.alert"),
        (container([]), "holds no packets"),
        (container([alert()]).replace(b'"type": "record"', b'"type": "recard"', 1), "schema does not parse"),
        (container([alert()])[:-3], "cut short: 3 bytes are missing"),
        (container([alert()])[:-40], "cut short: 40 bytes are missing"),
        (container([alert()]) + b"\x80", "ends inside a number"),
    ],
)
def test_bytes_that_are_not_packets(data, reason):
    bad = [item for item in read(data) if isinstance(item, BadPacket)]
    assert len(bad) == 1
    assert reason in bad[0].reason


def test_lost_bytes_cost_one_block_and_reading_goes_on():
    """Each block ends with the sync marker, so a copy in text mode that drops bytes does not cost the rest of the
    night."""
    data = container([alert(1), alert(2), alert(3)], sync_interval=1)
    second = read(data)[1]["offset"]
    damaged = data[: second + 5] + data[second + 6 :]
    assert ids(damaged) == [1, None, 3]
    packets = read(damaged)
    assert "ends 1 bytes earlier than it says: bytes were lost" in packets[1].reason


def test_a_packet_that_fails_takes_the_rest_of_its_block_and_says_how_many():
    data = bytearray(container([alert(number) for number in range(1, 5)]))
    third = read(bytes(data))[2]["offset"]
    data[third] = 0x7F  # the length of its name becomes negative
    assert ids(bytes(data)) == [1, 2, None]
    bad = read(bytes(data))[-1]
    assert (bad.offset, bad.packets, bad.status) == (third, 2, "error")
    assert bad.reason == f"the packet does not decode as ztf.alert: a length is negative (byte {third}, in objectId)"


@pytest.mark.parametrize(
    ("codec", "place"), [("null", "(byte {}, in"), ("deflate", "(byte 29 of the decompressed block, in")]
)
def test_what_does_not_decode_says_where(codec, place):
    """If a name is read as a number, all later bytes are shifted."""
    data = container([alert(1), alert(2)], codec=codec).replace(b'"string"', b'"double"', 1)
    bad = only_bad(data)
    assert (bad.status, bad.packets) == ("error", 2)
    assert (
        f"a length reaches beyond the end of the data {place.format(bad.offset + 29)} candidate.isdiffpos)"
        in bad.reason
    )


def test_a_block_with_bytes_left_over_is_not_trusted():
    whole = container([alert(1)])
    start = whole.index(SYNC) + 18
    size = len(whole) - 16 - start
    grown = whole[: start - 1] + bytes([2 * (size + 1)]) + whole[start:-16] + b"\0" + SYNC
    assert "1 bytes left over" in only_bad(grown).reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([{"name": "again", "type": ["null", "ztf.alert"]}], "recursive: ztf.alert"),
        ([{"name": "again", "type": "ztf.alert"}], "recursive: ztf.alert"),
        ([{"name": "many", "type": {"type": "array", "items": "null"}}], "the items of the array many take no bytes"),
        ([], "takes no bytes"),
    ],
)
def test_schemas_on_which_the_decoder_would_crash_or_hang_are_refused(fields, reason):
    text = json.dumps({"type": "record", "name": "ztf.alert", "fields": fields}).encode()
    size = bytes([(2 * len(text)) & 0x7F | 0x80, (2 * len(text)) >> 7])
    header = b"Obj\x01\x02\x16avro.schema" + size + text + b"\0" + SYNC
    assert reason in only_bad(header + b"\x02\x02\x00" + SYNC).reason


@pytest.mark.parametrize("name", ["winter.alert", "hits.alert"])
def test_other_surveys_are_skipped_with_their_name(name):
    bad = only_bad(container([alert(1), alert(2)], avro_schema=schema(name)))
    assert (bad.status, bad.packets) == ("skipped", 2)
    assert f"unsupported survey: the schema is '{name}'; supported: " in bad.reason


@pytest.mark.parametrize("form", ["ztf", "lsst", "lsst_container"])
def test_truncation_anywhere_is_a_bad_packet(simulated, form):
    data = simulated[form].read_bytes()
    rng = random.Random(form)
    for cut in sorted({0, 1, 4, 5, 6, *(rng.randrange(len(data)) for _ in range(60))}):
        found = read(data[:cut])
        assert isinstance(found[-1], BadPacket), cut
        assert form == "lsst_container" or len(found) == 1


@pytest.mark.parametrize("form", ["ztf", "lsst"])
def test_flipped_bytes_never_escape(simulated, form):
    """Avro has no checksum, so a flipped bit may go unnoticed; but it must not crash or hang the reader, or lose the
    packet."""
    data = simulated[form].read_bytes()
    rng = random.Random(form)
    for _ in range(120):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 10])):
            damaged[rng.randrange(min(len(data), rng.choice([100, 20_000, len(data)])))] = rng.randrange(256)
        rows = list(batches(split(bytes(damaged), "bytes")))
        assert sum(len(row.curves) if isinstance(row, AlertBatch) else 1 for row in rows) >= 1


def test_paths_are_checked_before_any_work(tmp_path):
    with pytest.raises(EdgekitError, match=r"path .*nowhere does not exist"):
        read_blocks([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(EdgekitError, match="holds no files"):
        read_blocks([tmp_path / "empty"])
    with pytest.raises(EdgekitError, match="no path was given"):
        read_blocks([])
    with pytest.raises(EdgekitError, match="batch size is 0"):
        next(batches([], 0))


def test_folders_are_walked_in_order_each_file_once(tmp_path):
    for name in ("b/2.avro", "b/10.avro", "a.avro", ".hidden", ".cache/x.avro"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path, tmp_path / "a.avro"])]
    assert names == ["a.avro", "b/10.avro", "b/2.avro"]


def test_content_not_extension_decides(tmp_path, simulated):
    shutil.copy(simulated["lsst"], tmp_path / "a.avro")
    shutil.copy(simulated["ztf"], tmp_path / "b.parquet")
    (tmp_path / "c.bin").write_text("notes")
    (tmp_path / "d").write_bytes(b"")
    names = [
        item.reason[:14] if isinstance(item, BadPacket) else item.schema.survey.name for item in read_blocks([tmp_path])
    ]
    assert names == ["lsst", "ztf", "the format is ", "the data is em"]


def test_parquet_rows_are_packets(tmp_path):
    rows = [alert(number) for number in range(600)]
    history = [row | {"prv_candidates": [row["candidate"] | {"jd": 2_459_000.5}]} for row in rows]
    pq.write_table(pa.Table.from_pylist([row | {"noise": "x"} for row in history]), tmp_path / "x", row_group_size=100)
    blocks = list(read_blocks([tmp_path / "x"]))
    assert all(isinstance(block, ParquetRows) for block in blocks)
    assert sum(block.count for block in blocks) == 600
    (batch,) = batches(blocks)
    assert batch.alerts["offset"].to_pylist() == batch.alerts["alert_id"].to_pylist() == list(range(600))
    assert batch.curves.points.tolist() == [2] * 600


def test_parquet_that_is_damaged_or_foreign(tmp_path):
    history = alert() | {"prv_candidates": [alert()["candidate"]]}
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([history] * 1000), path, compression="none")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "cannot be read as Parquet from row 0 on" in next(read_blocks([path])).reason
    pq.write_table(pa.table({"ra": [1.0, 2.0], "dec": [0.0, 1.0]}), path)
    (bad,) = read_blocks([path])
    assert (bad.status, bad.packets) == ("skipped", 2)
    assert "its first columns are ra, dec" in bad.reason
    pq.write_table(pa.Table.from_pylist([history]).slice(0, 0), path)
    assert next(read_blocks([path])).reason == "the table has no rows"


@pytest.mark.parametrize(
    ("bomb", "words"),
    [
        ({"objectId": "x" * 200_000}, "rows 0 to 256: .* bytes declare 51,"),
        ({"prv_candidates": [alert()["candidate"] | {"isdiffpos": "x" * 200_000}]}, "rows 0 to 256: .* declare 51,"),
        ({"prv_candidates": [alert()["candidate"]] * 10_000}, "a group of its rows: .* bytes declare 92,"),
    ],
    ids=["a long name", "a long text in a history", "a long history"],
)
def test_parquet_that_expands_is_one_bad_packet(bomb, words, tmp_path, monkeypatch):
    """Equal values are one value and a count: some kB stand for many MB."""
    rows = pa.Table.from_pylist([alert() | {"prv_candidates": [alert()["candidate"]]} | bomb])
    rows = pa.concat_tables([rows] * 256)
    pq.write_table(rows, tmp_path / "x", compression="zstd")
    assert (tmp_path / "x").stat().st_size < 50_000
    monkeypatch.setenv("EDGEKIT_READ_LIMIT", "20MB")
    (bad,) = read_blocks([tmp_path / "x"])
    assert re.search(words, bad.reason)
    assert "--read-limit" in bad.reason
    assert (bad.status, bad.packets) == ("error", 256)
    monkeypatch.setenv("EDGEKIT_READ_LIMIT", "200MB")
    assert sum(block.count for block in read_blocks([tmp_path / "x"])) == 256


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"dictionary_pagesize_limit": 100}], ids=str)
def test_texts_of_parquet_are_read_however_they_are_stored(options, tmp_path):
    texts = [f"ZTF24{number:07}" for number in range(600)]
    rows = [alert(name=name) | {"prv_candidates": [alert()["candidate"] | {"jd": 2_459_000.5}]} for name in texts]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x", row_group_size=300, **options)
    (batch,) = batches(read_blocks([tmp_path / "x"]))
    assert batch.alerts["object_id"].to_pylist() == texts
    assert batch.curves.points.tolist() == [2] * 600


def test_batches_keep_surveys_apart_and_bad_packets_in_line(simulated):
    data = container([alert(1), alert(2, ""), alert(3)], sync_interval=1)
    blocks = [*split(data, "ztf"), BadPacket("f", 0, "why"), *split(simulated["lsst"].read_bytes(), "lsst")]
    found = list(batches(blocks, size=2))
    kinds = ["BadPacket", "AlertBatch", "BadPacket", "AlertBatch", "AlertBatch"]
    assert [type(item).__name__ for item in found] == kinds
    assert (found[0].reason, found[2].reason) == ("objectId is ''; expected an object name", "why")
    assert (found[0].file, found[0].packets, found[0].status) == ("ztf", 1, "error")
    assert found[0].offset == blocks[1].offset
    assert found[3].alerts.schema.equals(ALERT_COLUMNS)
    (row,) = found[3].alerts.to_pylist()
    assert (row["alert_id"], row["object_id"], row["survey"]) == (3, "ZTF24aaaaaaa", "ztf")
    assert (row["n_detections"], row["n_forced"], row["n_upper_limits"]) == ([1, 0, 0], [0, 0, 0], 0)
    (lsst_row,) = found[4].alerts.to_pylist()
    assert sum(lsst_row["n_detections"]) == found[4].curves.detected.sum()
    assert sum(lsst_row["n_forced"]) == (~found[4].curves.detected).sum()


def test_schemas_of_one_survey_share_a_batch_in_order():
    """The blocks have an old and a new schema in turns, with a Parquet row between them: the alerts stay in the order
    in which they were read."""
    forced = dict.fromkeys(("jd", "fid", "forcediffimflux", "forcediffimfluxunc", "magzpsci"), "double")
    rows = [{"name": name, "type": kind} for name, kind in (forced | {"procstatus": "string"}).items()]
    record = {"type": "record", "name": "forced", "fields": rows}
    newer = schema(fp_hists={"type": "array", "items": record})
    measured = {"jd": 2_460_400.5, "fid": 2, "forcediffimflux": 5.0, "forcediffimfluxunc": 1.0, "magzpsci": 26.0}
    blocks = []
    for number in range(1, 8):
        if number == 4:
            table = pa.RecordBatch.from_pylist([alert(number) | {"prv_candidates": [alert()["candidate"]]}])
            blocks.append(ParquetRows(survey_named("ztf"), "table", 0, table))
        elif number % 2:
            blocks += split(container([alert(number)]), "old")
        else:
            packet = alert(number) | {"fp_hists": [measured | {"procstatus": "0"}]}
            blocks += split(container([packet], avro_schema=newer), "new")
    (batch,) = batches(blocks)
    assert batch.alerts["alert_id"].to_pylist() == list(range(1, 8))
    assert batch.alerts["file"].to_pylist() == ["old", "new", "old", "table", "old", "new", "old"]
    assert batch.curves.points.tolist() == [1, 2, 1, 2, 1, 2, 1]
    assert batch.curves.time[batch.curves.detected].tolist()[:2] == [60_001.0, 60_002.0]
    halves = [item.alerts["alert_id"].to_pylist() for item in batches(blocks, 4)]
    assert halves == [[1, 2, 3, 4], [5, 6, 7]]


def test_versions_that_differ_in_what_is_skipped_are_converted_at_once(monkeypatch):
    """Each conversion to Arrow costs as much as some dozen packets, so there must be only one."""
    newer, taken = schema(unread=["null", "double"]), []
    take = Columns.take
    monkeypatch.setattr(Columns, "take", lambda columns: taken.append(len(columns)) or take(columns))
    blocks = []
    for number in range(1, 6):
        packet, options = alert(number), {}
        if number % 2:
            packet, options = packet | {"unread": 1.0}, {"avro_schema": newer}
        blocks += split(container([packet], **options), "bytes")
    buffer_pool = {}
    for _ in range(2):
        (batch,) = batches(blocks, buffer_pool=buffer_pool)
        assert batch.alerts["alert_id"].to_pylist() == [1, 2, 3, 4, 5]
        assert batch.curves.time.tolist() == [60_000.0 + number for number in range(1, 6)]
        assert len(buffer_pool) == 1
    assert taken == [5, 5]


# The content of the real folders: for each survey, the number of alerts; for "error" and "skipped", the number of rows.
REAL = {
    "ztf": {"ztf": 61},
    "ztf_kowalski": {"ztf": 24},
    "lsst_wire": {"lsst": 24},
    "parquet": {"ztf": 51 + 67, "lsst": 50},
    "elasticc": {"elasticc": 260 + 100 + 89, "elasticc-v0": 29},
    "other": {"decam": 1, "skipped": 1},
    "poison": {"error": 9},
}


@pytest.mark.realdata
@pytest.mark.parametrize("folder", REAL)
def test_every_real_packet_is_accounted_for(folder, shared_data):
    count: Counter[str] = Counter()
    for item in batches(read_blocks([shared_data / "alerts" / folder]), 64):
        if isinstance(item, BadPacket):
            count[item.status] += 1
        else:
            count[item.survey.name] += len(item.curves)
            assert item.curves.points.min() >= 1
            assert np.isfinite(item.curves.flux).all()
            for one in range(len(item.curves)):
                assert (np.diff(item.curves.take([one]).time) >= 0).all()
    assert count == REAL[folder]


@pytest.mark.realdata
def test_poison_lost_one_byte_at_every_crlf(shared_data):
    """The file is what a copy in text mode gives: it has no CR LF in 0.5 MB. Two packets even decode, with a damaged
    cutout."""
    poison = shared_data / "alerts" / "poison"
    files = find_files([poison])
    assert all(path.read_bytes().count(b"\r\n") == 0 for path in files)
    reasons = [item.reason for item in read_blocks(files)]
    assert all("earlier than it says: bytes were lost" in reason for reason in reasons)
    lost = [int(reason.split(" ends ")[1].split()[0]) for reason in reasons]
    assert lost == [1, 1, 1, 1, 1, 8, 14, 1, 11]
    for name in ("516442330015015017.avro", "516476004815015005.avro"):
        with (poison / name).open("rb") as stream:
            packet = next(fastavro.reader(stream))
        with pytest.raises(zlib.error, match="incorrect data check"):
            zlib.decompress(packet["cutoutDifference"]["stampData"], wbits=31)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["ztf_kowalski/2475433850315015009.avro", "lsst_wire/v10_0_deep_06.bin"])
def test_real_packets_cut_anywhere(name, shared_data):
    data = (shared_data / "alerts" / name).read_bytes()
    rng = random.Random(name)
    for _ in range(40):
        assert only_bad(data[: rng.randrange(len(data))]).status == "error"


def test_long_histories_close_a_batch_before_it_has_its_size(tmp_path, monkeypatch):
    """A few packets may hold as many rows as thousands do: they are read a few at a time, and each is read once."""
    write(tmp_path, simulate("ztf", 12, 3, cutouts=False), packets_per_file=1)
    whole = [item for item in batches(read_blocks([tmp_path])) if not isinstance(item, BadPacket)]
    monkeypatch.setattr("alert_broker.packets.MOST_ROWS", 30)
    parts = [item for item in batches(read_blocks([tmp_path])) if not isinstance(item, BadPacket)]
    assert (len(whole), len(parts) > 2) == (1, True)
    ids = [name for item in parts for name in item.alerts["alert_id"].to_pylist()]
    assert ids == whole[0].alerts["alert_id"].to_pylist()
    np.testing.assert_array_equal(np.concatenate([item.curves.flux for item in parts]), whole[0].curves.flux)
