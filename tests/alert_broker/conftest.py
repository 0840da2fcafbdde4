"""Spark in local mode, for the tests that ask for it with -m spark, and a real Apache Kafka."""

import os
import shutil
import sys

import pytest


@pytest.fixture(scope="session")
def spark_session():
    sql = pytest.importorskip("pyspark.sql")
    if shutil.which("java") is None:
        pytest.skip("no java on the path; Spark 4 needs version 17 or newer")
    os.environ.update(PYSPARK_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1")
    builder = sql.SparkSession.builder.master("local[2]").appName("edgekit")
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.sql.shuffle.partitions": "2",
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
