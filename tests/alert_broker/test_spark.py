"""The functions for Spark. Most tests call them directly; those with the mark `spark` run them inside Spark in local
mode."""

import pickle
import shutil
import sys
from pathlib import Path

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alert_broker import spark
from alert_broker.classify import classify_files
from alert_broker.results import result_schema
from alert_broker.simulate import simulate, write
from edgekit.errors import EdgekitError
from tests.alert_broker.small import small_bundle

pytestmark = pytest.mark.usefixtures("one_row")
GR = small_bundle()
PROBABILITIES = [f"p_{name}" for name in GR.manifest.classes]
SHARED = [item.name for item in result_schema(GR.manifest.classes) if item.name not in spark.LEFT_OUT]
ALERTS = {"ztf": 17, "lsst": 9}


@pytest.fixture(scope="module")
def packets(tmp_path_factory) -> Path:
    """Files with one packet each, of two surveys, and four files that do not hold exactly one: cut, empty, text, two
    packets."""
    folder = tmp_path_factory.mktemp("packets")
    for survey, count in ALERTS.items():
        write(folder / survey, simulate(survey, count, 2, cutouts=False), packets_per_file=1)
        for number, path in enumerate(sorted((folder / survey).glob(f"*{'.avro' if survey == 'ztf' else '.bin'}"))):
            path.rename(folder / f"{survey}{number:02}")
        shutil.rmtree(folder / survey)
    (folder / "bad0").write_bytes((folder / "ztf00").read_bytes()[:-100])
    (folder / "bad1").write_bytes(b"")
    (folder / "bad2").write_text("not a packet")
    write(folder / "two", simulate("ztf", 2, 3, cutouts=False), packets_per_file=2)
    next((folder / "two").glob("*.avro")).rename(folder / "bad3")
    shutil.rmtree(folder / "two")
    return folder


@pytest.fixture(scope="module")
def expected(packets, one_row, tmp_path_factory) -> dict[str, dict]:
    """Return the result of `edgekit alerts classify` for each file with one packet."""
    target = tmp_path_factory.mktemp("expected") / "out.parquet"
    files = [path for path in sorted(packets.iterdir()) if not path.name.startswith("bad")]
    classify_files(files, target, bundle=GR, runtime=one_row)
    found = {Path(row["file"]).name: row for row in pq.read_table(target).to_pylist()}
    assert len(found) == sum(ALERTS.values())
    return found


def messages(folder: Path) -> pa.RecordBatch:
    files = sorted(folder.iterdir(), key=lambda path: path.name[::-1])  # surveys and damaged files alternate
    return pa.RecordBatch.from_pydict({"name": [f.name for f in files], "value": [f.read_bytes() for f in files]})


def run(rows: pa.RecordBatch, packets=None, bundle=GR, **options) -> pa.Table:
    function = spark.map_in_arrow(bundle, packets, runtime="one_row", **options)
    return pa.Table.from_batches(function(iter([rows])))


def check_same(rows: list[dict], expected: dict[str, dict], name: str) -> None:
    """Every alert that is expected is there once, and every shared column is equal to the last bit."""
    found = {row[name]: row for row in rows if row["alert_id"] is not None}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert shared(row) == shared(expected[key])


def shared(row: dict) -> dict:
    return {column: row[column] for column in SHARED}


# --- packets


def test_every_message_has_its_row_and_the_numbers_of_alerts_classify(packets, expected):
    rows = messages(packets)
    table = run(rows, "value", keep=["name"])
    assert table.schema.names == ["name", *SHARED]
    assert table["name"].to_pylist() == rows["name"].to_pylist()
    check_same(table.to_pylist(), expected, "name")
    bad = {row["name"]: row["status"] for row in table.to_pylist() if row["name"].startswith("bad")}
    assert bad["bad0"].startswith("error: the block at byte")
    assert bad["bad1"] == "error: the data is empty: it has 0 bytes"
    assert bad["bad2"].startswith(
        "error: the format is unknown: the data begins with 6e 6f 74 20; expected an Avro container"
    )
    assert bad["bad3"].startswith("error: the message holds 2 packets")


def test_another_models_numbers_are_not_taken_for_the_same(packets, expected):
    other = run(messages(packets), "value", small_bundle(seed=1), keep=["name"])
    with pytest.raises(AssertionError):
        check_same(other.to_pylist(), expected, "name")


def test_a_null_message_is_a_row_too(packets):
    rows = pa.RecordBatch.from_pydict({"value": [None, (packets / "ztf00").read_bytes(), None]})
    assert run(rows, "value")["status"].to_pylist() == [
        "error: the message is null",
        "classified",
        "error: the message is null",
    ]


def test_no_rows_give_no_rows():
    table = run(pa.RecordBatch.from_pydict({"value": pa.array([], pa.binary())}), "value")
    assert (table.num_rows, table.schema.names) == (0, SHARED)


def test_large_batches_are_cut(packets, monkeypatch):
    monkeypatch.setattr(spark, "BATCH", 4)
    rows = messages(packets)
    assert run(rows, "value", keep=["name"])["name"].to_pylist() == rows["name"].to_pylist()


def test_what_travels_is_small_and_opened_once(packets, monkeypatch):
    job = pickle.loads(pickle.dumps(spark._job(GR, "value", (), "onnxruntime")))
    assert len(pickle.dumps(job)) < 2 * len(spark.pack(GR))
    spark._open.cache_clear()
    opened = []
    real = spark.Classifier
    monkeypatch.setattr(spark, "Classifier", lambda *a, **options: opened.append(options) or real(*a, **options))
    rows = messages(packets)
    for _ in range(3):
        pickle.loads(pickle.dumps(job))(rows)
    assert opened == [{"threads": 1, "session_threads": 1}]


def test_a_model_that_cannot_be_used_shows_before_the_job():
    with pytest.raises(EdgekitError, match="the preprocessing is None"):
        spark.map_in_arrow(small_bundle(preprocessing=None), "value")


def test_a_result_that_lost_a_row_is_an_error(packets, monkeypatch):
    real = spark.batches
    monkeypatch.setattr(spark, "batches", lambda blocks, size: list(real(blocks, size))[:-1])
    with pytest.raises(EdgekitError, match=r"30 rows gave \d+ results"):
        run(messages(packets), "value")


# --- columns


@pytest.fixture(scope="module")
def alerts(packets) -> dict[str, dict]:
    """Return ZTF's packets as fastavro reads them; one of them has no history."""
    found = {}
    for path in sorted(packets.glob("ztf*")):
        with path.open("rb") as stream:
            (found[path.name],) = fastavro.reader(stream)
    return found


def columns_of(alerts: dict[str, dict]):
    """Return Fink's concatenated columns as Spark passes them to a pandas UDF: missing values are NaN."""
    pd = pytest.importorskip("pandas")

    def concatenated(name, kind):
        rows = [
            [*(point[name] for point in alert["prv_candidates"] or []), alert["candidate"][name]]
            for alert in alerts.values()
        ]
        return pd.Series([np.array(row, kind) for row in rows])

    candid = pd.Series([alert["candid"] for alert in alerts.values()])
    numbers = [concatenated(name, float) for name in ("jd", "fid", "magpsf", "sigmapsf")]
    return [candid, *numbers], concatenated("isdiffpos", object)


def without_forced(alert: dict) -> dict:
    return {**alert, "fp_hists": None}


@pytest.fixture(scope="module")
def by_columns(alerts, one_row) -> list[dict]:
    """Return the rows for complete columns, as in Parquet. Fink's columns have no forced photometry."""
    table = run(pa.RecordBatch.from_pylist([without_forced(alert) for alert in alerts.values()]))
    return table.to_pylist()


def test_columns_give_the_packets_numbers(alerts, expected, by_columns):
    table = run(pa.RecordBatch.from_pylist(list(alerts.values())))
    for name, row in zip(alerts, table.to_pylist(), strict=True):
        assert row == shared(expected[name])
    assert by_columns != table.to_pylist()  # this shows that the forced photometry matters


def check_columns(frame, by_columns) -> None:
    assert frame["alert_id"].tolist() == [row["alert_id"] for row in by_columns]
    assert frame["best_class"].tolist() == [row["best_class"] for row in by_columns]
    np.testing.assert_array_equal(
        frame[PROBABILITIES].to_numpy(), [[row[p] for p in PROBABILITIES] for row in by_columns]
    )
    assert frame["n_upper_limits"].tolist() == [row["n_upper_limits"] for row in by_columns]


def test_finks_columns_give_the_same_numbers_with_the_signs(alerts, by_columns):
    columns, signs = columns_of(alerts)
    function = spark._columns_function(GR, None, "one_row")
    check_columns(function(*columns, signs), by_columns)
    assert any(value in ("f", "0") for row in signs for value in row)
    with pytest.raises(AssertionError):  # the twin: without signs, as in Fink's modules
        check_columns(function(*columns), by_columns)
    columns[3] = columns[3] + 0.1
    with pytest.raises(AssertionError):
        check_columns(function(*columns, signs), by_columns)


def test_finks_cuts(alerts, by_columns):
    pd = pytest.importorskip("pandas")
    columns, signs = columns_of(alerts)
    count = len(columns[0])
    roid, match = pd.Series([0] * count), pd.Series(["Unknown"] * count)
    start = columns[1].apply(lambda dates: dates[-1] - 10.0)
    roid[1], match[2], start[3] = 3, "Star", start[3] - 90.0
    columns[3][4] = np.where(np.arange(len(columns[3][4])) == 0, columns[3][4], np.nan)
    frame = spark._columns_function(GR, {"Unknown"}, "one_row")(*columns, roid, match, start, signs)
    outside = [number in (1, 2, 3, 4) for number in range(count)]
    assert (frame["status"] == "skipped: the alert is outside the cuts").tolist() == outside
    assert frame["alert_id"].tolist() == columns[0].tolist()
    assert frame["n_det_g"].tolist() == [
        None if out else row["n_det_g"] for out, row in zip(outside, by_columns, strict=True)
    ]
    assert frame["best_class"].isna().tolist() == outside
    inside = ~np.array(outside)
    wanted = np.array([[row[p] for p in PROBABILITIES] for row in by_columns])
    np.testing.assert_array_equal(frame[PROBABILITIES].to_numpy()[inside], wanted[inside])


def test_rows_without_measurements_and_wrong_columns(alerts):
    pd = pytest.importorskip("pandas")
    function = spark._columns_function(GR, None, "one_row")
    columns, signs = columns_of(dict(list(alerts.items())[:3]))
    for column in (*columns[1:], signs):
        column[1] = None
    frame = function(*columns, signs)
    assert frame["status"].tolist()[::2] == ["classified", "classified"]
    assert frame["status"][1] == "error: candidate or a row in it is null"
    assert len(function(*(column[:0] for column in columns))) == 0
    with pytest.raises(EdgekitError, match="given 3 columns; expected candid, cjd, cfid"):
        function(*columns[:3])
    with pytest.raises(EdgekitError, match="differ in length"):
        function(*columns[:4], pd.Series([np.ones(2)] * 3))


def test_a_table_of_another_layout_is_explained():
    with pytest.raises(EdgekitError, match=r"no survey has these columns: ra, dec; supported: .*name it: packets="):
        run(pa.RecordBatch.from_pydict({"ra": [1.0], "dec": [2.0]}))


def test_the_schema_is_what_comes_out(packets):
    table = run(messages(packets), "value")
    told = [item.rpartition(" ") for item in spark.result_ddl(GR).split(", ")]
    names = {"string": pa.string(), "bigint": pa.int64(), "int": pa.int32(), "float": pa.float32()}
    assert [(name.strip("`"), names[kind]) for name, _, kind in told] == [(f.name, f.type) for f in table.schema]


def test_without_pyspark_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark.sql.functions", None)
    with pytest.raises(EdgekitError, match=r"pip install 'edgekit\[spark\]'"):
        spark.t2(GR, runtime="onnxruntime")


@pytest.mark.realdata
def test_real_packets_give_the_same_numbers(shared_data, tmp_path):
    folders = [shared_data / "alerts" / name for name in ("ztf", "ztf_kowalski", "lsst_wire", "poison")]
    files = [path for folder in folders for path in sorted(folder.iterdir())]
    classify_files(files, tmp_path / "out.parquet", bundle=GR, runtime="one_row")
    wanted = {row["file"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    rows = {"name": [str(path) for path in files], "value": [path.read_bytes() for path in files]}
    found = run(pa.RecordBatch.from_pydict(rows), "value", keep=["name"]).to_pylist()
    assert [row["name"] for row in found] == rows["name"]
    assert len(wanted) > 100
    for row in found:
        if row["name"] in wanted:
            assert shared(row) == shared(wanted[row["name"]])
        else:
            assert row["status"].startswith("error: "), row


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["fink_alerts_2019_51", "fink_datatest_part2_67"])
def test_finks_files_give_the_same_numbers_all_three_ways(shared_data, tmp_path, name):
    path = shared_data / "alerts" / "parquet" / f"{name}.parquet"
    classify_files([path], tmp_path / "out.parquet", bundle=GR, runtime="one_row")
    wanted = pq.read_table(tmp_path / "out.parquet").select(SHARED)
    rows = pq.read_table(path).combine_chunks().to_batches()[0]
    assert run(rows).equals(wanted.cast(run(rows).schema))
    alerts = {
        str(number): row
        for number, row in enumerate(rows.select(["candid", "candidate", "prv_candidates"]).to_pylist())
    }
    columns, signs = columns_of(alerts)
    frame = spark._columns_function(GR, None, "one_row")(*columns, signs)
    check = [row for row in wanted.to_pylist() if row["best_class"] is not None]
    check_columns(frame[frame["best_class"].notna()], check)


# --- Spark


def as_rows(frame) -> list[dict]:
    return [row.asDict(recursive=True) for row in frame.collect()]


def check_spark(rows: list[dict], expected: dict[str, dict]) -> None:
    named = {Path(row["path"]).name: row for row in rows}
    assert len(named) == len(rows)
    assert named.keys() == expected.keys() | {"bad0", "bad2", "bad3"}  # Spark's file source skips empty files
    for name, row in named.items():
        if name.startswith("bad"):
            assert row["status"].startswith("error: ")
        else:
            assert shared(row) == shared(expected[name])


@pytest.mark.spark
def test_spark_classifies_packets(spark_session, packets, expected):
    files = spark_session.read.format("binaryFile").load(str(packets))
    # one column that is read, and a time, which Arrow can represent in several ways
    kept = ["path", "modificationTime", "content"]
    rows = as_rows(spark.classify(files, GR, "content", keep=kept, runtime="one_row"))
    check_spark(rows, expected)
    times = {row["path"]: (row["modificationTime"], row["content"]) for row in as_rows(files.select(*kept))}
    assert {row["path"]: (row["modificationTime"], row["content"]) for row in rows} == times


@pytest.mark.spark
def test_structured_streaming_classifies_packets(spark_session, packets, expected, tmp_path):
    schema = spark_session.read.format("binaryFile").load(str(packets)).schema
    files = spark_session.readStream.format("binaryFile").schema(schema).load(str(packets))
    classified = spark.classify(files, GR, "content", keep=["path"], runtime="one_row")
    query = (
        classified.writeStream.format("parquet")
        .option("checkpointLocation", str(tmp_path / "checkpoint"))
        .trigger(availableNow=True)
        .start(str(tmp_path / "out"))
    )
    assert query.awaitTermination(300)
    check_spark(pq.read_table(tmp_path / "out").to_pylist(), expected)


@pytest.mark.spark
def test_spark_names_what_is_wrong_before_the_job(spark_session, packets):
    files = spark_session.read.format("binaryFile").load(str(packets))
    with pytest.raises(EdgekitError, match=r"unknown column 'contents'.* did you mean 'content'"):
        spark.classify(files, GR, "contents", runtime="one_row")
    with pytest.raises(EdgekitError, match="'path' is of type string; expected binary"):
        spark.classify(files, GR, "path", runtime="one_row")
    with pytest.raises(EdgekitError, match=r"keep: the result has columns of the same name \(Status\)"):
        spark.classify(files.withColumnRenamed("path", "Status"), GR, "content", keep=["Status"], runtime="one_row")
    with pytest.raises(EdgekitError, match="no survey has these columns: path"):
        spark.classify(files, GR, runtime="one_row")


@pytest.mark.spark
@pytest.mark.realdata
def test_spark_classifies_finks_files_all_ways(spark_session, shared_data, tmp_path):
    from pyspark.sql import functions as F

    path = shared_data / "alerts" / "parquet" / "fink_datatest_part2_67.parquet"
    classify_files([path], tmp_path / "out.parquet", bundle=GR, runtime="one_row")
    wanted = {row["alert_id"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    alerts = spark_session.read.parquet(str(path)).coalesce(1)
    rows = as_rows(spark.classify(alerts, GR, keep=["roid", "candid", "mulens"], runtime="one_row"))
    assert len(rows) == len(wanted) == 67
    assert {(row["candid"], row["mulens"]["class_1"]) for row in rows} == {
        (row["candid"], row["mulens"]["class_1"]) for row in as_rows(alerts.select("candid", "mulens"))
    }
    for row in rows:
        assert shared(row) == shared(wanted[row["alert_id"]])

    # fink_utils.spark.utils.concat_col makes the columns in this way
    history = alerts
    for name in ("jd", "fid", "magpsf", "sigmapsf", "isdiffpos"):
        points = F.coalesce(F.col(f"prv_candidates.{name}"), F.array().cast(f"array<{kind_of(alerts, name)}>"))
        history = history.withColumn(f"c{name}", F.concat(points, F.array(F.col(f"candidate.{name}"))))
    five = ["candid", "cjd", "cfid", "cmagpsf", "csigmapsf"]
    whole = spark.t2(GR, runtime="one_row")(*five, "cisdiffpos").alias("t2")
    hosts = {"Unknown", "Fail", "Candidate_SN*", "SN", "Transient"}
    best = spark.t2_max_prob(GR, hosts=hosts, runtime="one_row")
    cuts = ["roid", "cdsxmatch", F.col("candidate.jdstarthist"), "cisdiffpos"]
    inside = (
        (F.expr("size(filter(cmagpsf, x -> x is not null))") >= 2)
        & (F.col("roid") != 3)
        & F.col("cdsxmatch").isin(*hosts)
        & (F.col("candidate.jd") - F.col("candidate.jdstarthist") <= 90)
    )
    cut = spark.t2(GR, hosts=hosts, runtime="one_row")(*five, *cuts).alias("cut")
    chosen = history.select("candid", whole, cut, best(*five, *cuts).alias("best"), inside.alias("inside"))
    rows = as_rows(chosen)
    assert len(rows) == 67
    assert {row["inside"] for row in rows} == {True, False}
    for row in rows:
        other = wanted[row["candid"]]
        assert {name: row["t2"][name] for name in PROBABILITIES} == {name: other[name] for name in PROBABILITIES}
        assert row["t2"]["best_class"] == other["best_class"]
        assert row["cut"]["alert_id"] == row["t2"]["alert_id"] == row["candid"]
        assert row["cut"]["n_det_g"] == (other["n_det_g"] if row["inside"] else None)
        assert (row["cut"]["status"] == "skipped: the alert is outside the cuts") is not row["inside"]
        assert row["best"] == ((other["best_class"] or "None") if row["inside"] else "None")


def kind_of(alerts, name: str) -> str:
    return alerts.select(f"candidate.{name}").schema[name].dataType.simpleString()
