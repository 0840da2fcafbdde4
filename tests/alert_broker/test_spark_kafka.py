"""The source for Spark with librdkafka's mock broker, in this process. Tests with the mark `spark` run it inside Spark,
and so they do with Spark's own connector on a real Apache Kafka."""

import pytest

confluent_kafka = pytest.importorskip("confluent_kafka")
pytest.importorskip("pyspark.sql.datasource", reason="needs PySpark 4")

import pickle  # noqa: E402

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from alert_broker import spark, spark_kafka  # noqa: E402
from alert_broker.classify import classify_files  # noqa: E402
from alert_broker.simulate import simulate, write  # noqa: E402
from alert_broker.spark_kafka import MESSAGES, KafkaPackets, Reader  # noqa: E402
from edgekit.errors import EdgekitError  # noqa: E402
from tests.alert_broker.conftest import CONNECTOR, connector_jars  # noqa: E402
from tests.alert_broker.small import small_bundle  # noqa: E402
from tests.brokers import create_topics  # noqa: E402

PARTITIONS = 4  # the mock creates topics with this number of partitions


class Broker:
    """The cluster at this address; without one, a mock cluster, which exists as long as its producer."""

    def __init__(self, address: str = ""):
        cluster = {"bootstrap.servers": address} if address else {"test.mock.num.brokers": 1}
        self.producer = confluent_kafka.Producer(cluster | {"log_level": 0})
        told = self.producer.list_topics(timeout=10)
        self.address = ",".join(f"{broker.host}:{broker.port}" for broker in told.brokers.values())
        assert self.address.startswith("127.0.0.1:")

    def send(self, topic, values) -> None:
        failed = []

        def delivered(error, message) -> None:
            failed.extend([error] if error else [])

        for number, value in enumerate(values):
            self.producer.produce(topic, value, f"k{number}", number % PARTITIONS, on_delivery=delivered)
            self.producer.poll(0)
        assert self.producer.flush(30) == 0
        assert not failed

    def reader(self, topics, **options) -> Reader:
        settings = {"subscribe": topics, "kafka.bootstrap.servers": self.address, "startingOffsets": "earliest"}
        return KafkaPackets(settings | options).streamReader(None)


@pytest.fixture(scope="module")
def broker() -> Broker:
    return Broker()


def read(reader: Reader, start, end) -> list[dict]:
    batches = []
    for part in reader.partitions(start, end):
        other, where = pickle.loads(pickle.dumps((reader, part)))  # Spark sends them to its workers in this form
        batches += other.read(where)
    assert all(batch.schema.equals(MESSAGES) for batch in batches)
    return pa.Table.from_batches(batches, MESSAGES).to_pylist()


def test_every_message_once_with_its_place(broker, monkeypatch):
    monkeypatch.setattr(spark_kafka, "BATCH", 7)
    values = [f"message {number}".encode() for number in range(50)]
    broker.send("plain", values)
    reader = broker.reader("plain")
    start, end = reader.initialOffset(), reader.latestOffset()
    assert start == {"plain": {str(number): 0 for number in range(PARTITIONS)}}
    assert end == {"plain": {"0": 13, "1": 13, "2": 12, "3": 12}}
    found = read(reader, start, end)
    assert sorted(row["value"] for row in found) == sorted(values)
    for row in found:
        number = values.index(row["value"])
        assert (row["partition"], row["offset"], row["key"]) == (number % 4, number // 4, f"k{number}".encode())
    # the next batch holds only the messages that came since the last one
    broker.send("plain", [b"later"])
    assert [row["value"] for row in read(reader, end, reader.latestOffset(end))] == [b"later"]
    assert reader.partitions(end, end) == []
    assert broker.reader("plain", startingOffsets="latest").initialOffset() == reader.latestOffset()


def test_a_range_ends_where_it_says(broker):
    broker.send("range", [bytes([number]) for number in range(40)])
    reader = broker.reader("range")
    start, end = {"range": {"0": 2, "1": 10}}, {"range": {"0": 5, "1": 10}}
    assert [row["offset"] for row in read(reader, start, end)] == [2, 3, 4]
    with pytest.raises(AssertionError):  # the twin: one more message would be noticed
        assert [row["offset"] for row in read(reader, start, {"range": {"0": 6}})] == [2, 3, 4]


def test_the_limit_is_shared_out_and_never_goes_back(broker):
    broker.send("limited", [bytes([number]) for number in range(40)])
    reader = broker.reader("limited", maxOffsetsPerTrigger="8")
    at, seen = reader.initialOffset(), []
    for _ in range(20):
        end = reader.latestOffset(at)
        rows = read(reader, at, end)
        assert len(rows) <= 8
        seen += rows
        at = end
    assert sorted(row["value"] for row in seen) == sorted(bytes([number]) for number in range(40))
    ahead = {"limited": dict.fromkeys("0123", 99)}  # a broker whose end offset is too low
    assert reader.latestOffset(ahead) == ahead


def test_messages_that_are_gone_are_an_error(broker):
    broker.send("short", [b"x"] * 4)
    with pytest.raises(
        EdgekitError, match=r"short\[0\]: the broker deleted the messages from offset 500 on.* new checkpoint"
    ):
        read(broker.reader("short"), {"short": {"0": 500}}, {"short": {"0": 501}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subscribe": " , "}, "needs the options subscribe"),
        ({"kafka.bootstrap.servers": None}, "needs the options subscribe and kafka.bootstrap.servers"),
        ({"startingOffsets": "now"}, "unknown startingOffsets 'now'"),
        ({"maxOffsetsPerTrigger": "many"}, "maxOffsetsPerTrigger is 'many'; expected a whole number"),
        ({"maxOffsetPerTrigger": "7"}, "unknown option 'maxoffsetpertrigger'.* did you mean 'maxOffsetsPerTrigger'"),
    ],
)
def test_options_are_checked(options, words):
    settings = {"subscribe": "a", "kafka.bootstrap.servers": "127.0.0.1:1"} | options
    with pytest.raises(EdgekitError, match=words):
        Reader({name: value for name, value in settings.items() if value is not None})


@pytest.fixture(params=[spark_kafka.NAME, "kafka"])
def connector(request):
    """(name of a source for Spark, its broker): ours on the mock cluster, and Spark's own on a real Apache Kafka."""
    if request.param == spark_kafka.NAME:
        return request.param, request.getfixturevalue("broker")
    if not connector_jars():
        pytest.skip(f"{CONNECTOR} names no folder with spark-sql-kafka-0-10_*.jar and the jars that it needs")
    cluster = request.getfixturevalue("apache_kafka")
    create_topics(cluster.address, {"alerts": PARTITIONS})
    return request.param, Broker(cluster.address)


@pytest.mark.spark
def test_spark_classifies_a_topic(spark_session, connector, tmp_path):
    name, broker = connector
    bundle, packets = small_bundle(), tmp_path / "packets"
    files = write(packets, simulate("ztf", 30, 5, cutouts=False), packets_per_file=1)
    classify_files(files, tmp_path / "expected.parquet", bundle=bundle)
    wanted = {row["alert_id"]: row["best_class"] for row in pq.read_table(tmp_path / "expected.parquet").to_pylist()}
    values = [path.read_bytes() for path in files if path.suffix == ".avro"]
    spark_session.dataSource.register(KafkaPackets)

    def classify_what_is_there() -> list[dict]:
        stream = (
            spark_session.readStream.format(name)
            .option("subscribe", "alerts")
            .option("startingOffsets", "earliest")
            .option("kafka.bootstrap.servers", broker.address)
            .load()
        )
        rows = spark.classify(stream, bundle, "value", keep=["topic", "partition", "timestamp"], runtime="onnxruntime")
        query = (
            rows.writeStream.format("parquet")
            .option("checkpointLocation", str(tmp_path / "checkpoint"))
            .trigger(availableNow=True)
            .start(str(tmp_path / "out"))
        )
        assert query.awaitTermination(300)
        return pq.read_table(tmp_path / "out").to_pylist()

    broker.send("alerts", [*values[:20], b"not a packet"])
    first = classify_what_is_there()
    assert sorted(row["status"] for row in first)[-1].startswith(
        "error: the format is unknown: the data begins with 6e 6f 74 20"
    )
    assert len(first) == 21
    broker.send("alerts", values[20:])
    found = [row for row in classify_what_is_there() if row["alert_id"] is not None]
    assert len(found) == len(values) == 30
    assert {row["alert_id"]: row["best_class"] for row in found} == wanted
    assert {row["topic"] for row in found} == {"alerts"}
