"""Kafka as a streaming source for Spark, for installations that cannot add Spark's own Kafka connector.

Prefer Spark's own connector, `format("kafka")`. It fetches messages in the JVM and is faster: docs/jobs/stream.md says
how to use it. This source fetches them in Python and needs no jar. It needs Spark 4.

    spark.dataSource.register(KafkaPackets)
    stream = spark.readStream.format("edgekit-kafka").option("subscribe", "ztf").option("kafka.bootstrap.servers", ...)
    classified = classify(stream.load(), bundle, "value", keep=["topic", "partition"])

The options are those of Spark's connector: `subscribe` (topics, separated by commas), `startingOffsets` (earliest,
latest), `maxOffsetsPerTrigger`, and `kafka.*`, which are passed to librdkafka. Spark's checkpoint stores the positions;
nothing is committed to Kafka.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from edgekit.errors import EdgekitError, missing_extra, unknown

try:
    from pyspark.sql.datasource import DataSource, DataSourceStreamReader, InputPartition
except ModuleNotFoundError as error:
    raise missing_extra(str(error.name), "spark", "a source for Spark") from None

NAME = "edgekit-kafka"
COLUMNS = "key binary, value binary, topic string, partition int, offset bigint, timestamp timestamp"
MESSAGES = pa.schema(
    [
        ("key", pa.binary()), ("value", pa.binary()), ("topic", pa.string()), ("partition", pa.int32()),
        ("offset", pa.int64()), ("timestamp", pa.timestamp("us", tz="UTC")),
    ]
)  # fmt: skip
OPTIONS = ("subscribe", "startingOffsets", "maxOffsetsPerTrigger", "kafka.*")
BATCH = 256  # messages in an Arrow batch: some ten MB of packets
TIMEOUT_SECONDS = 60.0  # longest time without an answer from the broker
# maps a topic to its partitions, which are text in JSON, and each partition to the next offset to read
Offsets = dict[str, dict[str, int]]


class Range(InputPartition):
    """Messages of one partition, from offset `start` up to, but not including, `stop`."""

    def __init__(self, topic: str, partition: int, start: int, stop: int) -> None:
        super().__init__((topic, partition, start, stop))
        self.topic, self.partition, self.start, self.stop = topic, partition, start, stop


class KafkaPackets(DataSource):
    """The source as Spark sees it."""

    @classmethod
    def name(cls) -> str:
        return NAME

    def schema(self) -> str:
        return COLUMNS

    def streamReader(self, schema: Any) -> Reader:  # noqa: N802 - Spark's name, as those below
        return Reader(dict(self.options))


class Reader(DataSourceStreamReader):
    """Plans ranges of offsets in the driver, and reads them in the workers."""

    def __init__(self, options: dict[str, str]) -> None:
        named = {name.lower(): value for name, value in options.items()}
        self.topics = [topic.strip() for topic in named.pop("subscribe", "").split(",") if topic.strip()]
        self.begin = named.pop("startingoffsets", "latest")
        most = named.pop("maxoffsetspertrigger", "0")
        if not most.isdecimal():
            raise EdgekitError(f"maxOffsetsPerTrigger is {most!r}; expected a whole number, or 0 for no limit")
        self.most = int(most)
        self.kafka = {name[6:]: named.pop(name) for name in list(named) if name.startswith("kafka.")}
        if named:
            raise unknown("option", next(iter(named)), OPTIONS)
        if not self.topics or "bootstrap.servers" not in self.kafka:
            raise EdgekitError(f"{NAME} needs the options subscribe and kafka.bootstrap.servers; set both")
        if self.begin not in ("earliest", "latest"):
            raise unknown("startingOffsets", self.begin, ["earliest", "latest"])

    def initialOffset(self) -> Offsets:  # noqa: N802
        return self._ends(0 if self.begin == "earliest" else 1)

    def latestOffset(self, start: Offsets | None = None, limit: Any = None) -> Offsets:  # noqa: N802
        """Return the ends of the partitions, or less if `maxOffsetsPerTrigger` is set: it is divided among the
        partitions with new messages."""
        ends = self._ends(1)
        if start is None:  # Spark 4.0 and 4.1 do not pass it
            return ends
        waiting = self.partitions(start, ends)
        most = 0 if type(limit).__name__ == "ReadAllAvailable" else self.most
        reached = {topic: {number: start.get(topic, {}).get(number, 0) for number in ends[topic]} for topic in ends}
        for item in waiting:
            share = max(most // len(waiting), 1) if most else item.stop - item.start
            reached[item.topic][str(item.partition)] = min(item.stop, item.start + share)
        return reached

    def partitions(self, start: Offsets, end: Offsets) -> Sequence[Range]:
        """Return the ranges between the two offsets. A partition without a start offset begins at its first message."""
        found = []
        for topic, numbers in end.items():
            for number, stop in numbers.items():
                first = start.get(topic, {}).get(number)
                if first is None:
                    with self._consumer() as consumer:
                        first = _watermarks(consumer, topic, int(number))[0]
                if stop > first:
                    found.append(Range(topic, int(number), first, stop))
        return found

    def read(self, partition: Range) -> Iterator[pa.RecordBatch]:
        from confluent_kafka import KafkaError, TopicPartition

        where = f"{partition.topic}[{partition.partition}]"
        position, heard = partition.start, time.monotonic()
        with self._consumer() as consumer:
            consumer.assign([TopicPartition(partition.topic, partition.partition, partition.start)])
            while position < partition.stop:
                messages = consumer.consume(min(BATCH, partition.stop - position), timeout=1.0)
                heard = time.monotonic() if messages else heard
                if time.monotonic() - heard > TIMEOUT_SECONDS:
                    raise EdgekitError(
                        f"{where}: the broker sent nothing for {TIMEOUT_SECONDS:.0f} s at offset {position}; "
                        "check that it is reachable"
                    )
                good = []
                for message in messages:
                    if (error := message.error()) is None:
                        position = message.offset() + 1
                        good += [message] if position <= partition.stop else []
                    elif error.code() == KafkaError._PARTITION_EOF:  # the last offsets hold no messages
                        position = partition.stop
                    elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                        raise EdgekitError(
                            f"{where}: the broker deleted the messages from offset {position} on before they were read "
                            f"({error.str()}); to go on without them, start with a new checkpoint"
                        )
                    else:
                        raise EdgekitError(f"{where}: {error.str()}")
                if good:
                    yield _batch(good)

    def _ends(self, side: int) -> Offsets:
        """Return, for all partitions, the offset of the first message (side 0) or the offset after the last one (side
        1)."""
        found: Offsets = {}
        with self._consumer() as consumer:
            for topic in self.topics:
                metadata = consumer.list_topics(topic, timeout=TIMEOUT_SECONDS).topics[topic]
                if metadata.error is not None:
                    raise EdgekitError(f"the topic {topic!r} cannot be read: {metadata.error.str()}")
                numbers = sorted(metadata.partitions)
                found[topic] = {str(number): _watermarks(consumer, topic, number)[side] for number in numbers}
        return found

    @contextmanager
    def _consumer(self) -> Iterator[Any]:
        try:
            from confluent_kafka import Consumer
        except ModuleNotFoundError as error:
            raise missing_extra(str(error.name), "spark", "reading from Kafka") from None
        ours = {
            "group.id": NAME,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
        }
        consumer = Consumer(self.kafka | ours)
        try:
            yield consumer
        finally:
            consumer.close()


def _watermarks(consumer: Any, topic: str, partition: int) -> tuple[int, int]:
    from confluent_kafka import TopicPartition

    low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=TIMEOUT_SECONDS, cached=False)
    return int(low), int(high)


def _batch(messages: Sequence[Any]) -> pa.RecordBatch:
    columns = [
        [message.key() for message in messages],
        [message.value() for message in messages],
        [message.topic() for message in messages],
        [message.partition() for message in messages],
        [message.offset() for message in messages],
        [message.timestamp()[1] * 1000 for message in messages],
    ]
    arrays = [pa.array(values, item.type) for values, item in zip(columns, MESSAGES, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=MESSAGES)
