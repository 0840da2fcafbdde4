"""The consumers that tools/bench_peers.py compares with `edgekit alerts consume`: a plain loop over confluent-kafka and
an application of Quix Streams. Each one runs in a process of its own:

    python tools/peer_consumers.py plain fastavro --broker HOST:PORT --count 3000

Both fetch with the settings that edgekit uses. What they do with a message: nothing; decode it with fastavro, either as
the packet comes (`fastavro`) or with a schema that was parsed once for all packets (`fastavro-cached`); or give batches
of messages to edgekit's own stages, publish the rows, and commit after the broker has them (`classify`). Quix Streams
polls message by message; a sink collects its batches, and each checkpoint flushes the sink before it commits.

The process prints a line of JSON: the messages per second over the last three quarters of them.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import fastavro
from bench_memory import open_stages
from confluent_kafka import Consumer, Producer

from alert_broker.containers import SYNC_BYTES, header_end
from alert_broker.stream.clients import consumer_defaults
from alert_broker.stream.config import Batch

BATCH = Batch()  # of the configuration: how many messages edgekit takes at once, and how long it waits for them
PRODUCER = {"compression.type": "zstd", "linger.ms": 2, "enable.idempotence": True, "acks": "all"}  # as edgekit's

Work = Callable[[Sequence[bytes]], None]


class Rate:
    """Counts messages, and remembers when the first quarter of them was done and when all were."""

    def __init__(self, count: int) -> None:
        self.count, self.done = count, 0
        self._began: tuple[int, float] | None = None  # messages done, seconds

    def add(self, number: int) -> bool:
        """Return whether all messages are done."""
        self.done += number
        if self._began is None and self.done >= self.count // 4:
            self._began = self.done, time.perf_counter()
        return self.done >= self.count

    def per_second(self) -> float:
        assert self._began is not None
        done, moment = self._began
        assert self.done > done, f"the first batch had all {self.done} messages; take a larger --count"
        return (self.done - done) / (time.perf_counter() - moment)


def nothing(values: Sequence[bytes]) -> None:
    pass


def decode(values: Sequence[bytes]) -> None:
    """Read each packet as a container of its own, which contains its schema."""
    for value in values:
        for _ in fastavro.reader(io.BytesIO(value)):
            pass


class DecodeCached:
    """Reads the datum of each packet with a schema that was parsed once for each distinct header."""

    def __init__(self) -> None:
        self._schemas: dict[bytes, Any] = {}  # by the container's header

    def __call__(self, values: Sequence[bytes]) -> None:
        for value in values:
            stream = io.BytesIO(value)
            schema = self._schema(value, stream)
            for _ in range(2):  # the number of packets, and of their bytes
                fastavro.schemaless_reader(stream, "long", None)
            fastavro.schemaless_reader(stream, schema, None)
            assert stream.tell() == len(value) - SYNC_BYTES

    def _schema(self, value: bytes, stream: io.BytesIO) -> Any:
        """Return the packet's schema, and move the stream behind the header."""
        for header, schema in self._schemas.items():
            if value.startswith(header):
                stream.seek(len(header) + SYNC_BYTES)
                return schema
        header = value[: header_end(value) - SYNC_BYTES]
        self._schemas[header] = fastavro.schema.parse_schema(fastavro.reader(stream).writer_schema)
        return self._schema(value, stream)


class Classify:
    """Gives messages to edgekit's stages, publishes the rows, and waits until the broker has them."""

    def __init__(self, broker: str, topic: str) -> None:
        self._stages, self._router = open_stages(0)
        self._producer, self._topic = Producer({"bootstrap.servers": broker, **PRODUCER}), topic

    def __call__(self, values: Sequence[bytes]) -> None:
        alerts, dead_letters = self._stages.decode(values)
        rows, failed = self._stages.classify(alerts)
        assert not dead_letters, dead_letters[0]
        assert not failed, failed[0]
        for message in self._router(rows).messages:
            self._producer.produce(self._topic, message.value, message.key)
        assert self._producer.flush(60) == 0


def plain(work: Work, options: argparse.Namespace, rate: Rate) -> None:
    """Poll batches in a loop, and commit each one without waiting."""
    consumer = Consumer(
        {
            "bootstrap.servers": options.broker,
            **consumer_defaults(),
            "group.id": uuid.uuid4().hex,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([options.source])
    done = False
    while not done:
        messages = consumer.consume(BATCH.size, BATCH.seconds)
        for message in messages:
            assert message.error() is None, message.error()
        if messages:
            work([message.value() for message in messages])
            consumer.commit(asynchronous=True)
            done = rate.add(len(messages))
    consumer.close()


def quix(work: Work, options: argparse.Namespace, rate: Rate) -> None:
    """Run an application without state. It commits every five seconds by default, and after each batch if it
    classifies."""
    from quixstreams import Application
    from quixstreams.sinks import BaseSink

    class Batches(BaseSink):  # type: ignore[misc,unused-ignore]
        """Collects the messages of all partitions until the checkpoint."""

        def __init__(self) -> None:
            super().__init__()
            self.values: list[bytes] = []

        def add(self, value: bytes, *_: Any, **__: Any) -> None:
            self.values.append(value)

        def flush(self) -> None:
            values, self.values = self.values, []
            work(values)

    def note(topic: str, partition: int, offset: int) -> None:
        if rate.add(1):
            application.stop()

    in_batches = isinstance(work, Classify)
    application = Application(
        broker_address=options.broker,
        consumer_group=uuid.uuid4().hex,
        auto_offset_reset="earliest",
        consumer_extra_config=consumer_defaults(),
        commit_every=BATCH.size if in_batches else 0,
        on_message_processed=note,
        auto_create_topics=False,
        use_changelog_topics=False,
        loglevel="ERROR",
    )
    topic = application.topic(options.source, value_deserializer="bytes", key_deserializer="bytes")
    frame = application.dataframe(topic)
    if in_batches:
        frame.sink(Batches())
    elif work is not nothing:
        frame.update(lambda value: work([value]))
    application.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("consumer", choices=["plain", "quix"])
    parser.add_argument("work", choices=["nothing", "fastavro", "fastavro-cached", "classify"])
    parser.add_argument("--broker", required=True)
    parser.add_argument("--source", default="source", help="topic")
    parser.add_argument("--results", default="results", help="topic of what is classified")
    parser.add_argument("--count", type=int, required=True, help="messages; the topic must have as many")
    options = parser.parse_args()
    works: dict[str, Callable[[], Work]] = {
        "nothing": lambda: nothing,
        "fastavro": lambda: decode,
        "fastavro-cached": DecodeCached,
        "classify": lambda: Classify(options.broker, options.results),
    }
    rate = Rate(options.count)
    consumers = {"plain": plain, "quix": quix}
    consumers[options.consumer](works[options.work](), options, rate)
    print(json.dumps({"messages": rate.done, "per_second": rate.per_second()}))


if __name__ == "__main__":
    main()
