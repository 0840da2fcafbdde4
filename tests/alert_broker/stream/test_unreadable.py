"""Record batches that cannot be read: exactly their offsets become dead letters, wherever the batches stand."""

import os
import time
import tracemalloc
import uuid
from dataclasses import dataclass

import pytest
from confluent_kafka import KafkaError, Producer, TopicPartition

from alert_broker.stream import unreadable as module
from alert_broker.stream.config import SourceSettings
from alert_broker.stream.dead_letters import OMITTED, REASON, headers_of
from alert_broker.stream.redrive import redrive
from alert_broker.stream.unreadable import UnreadableBatches, UnreadableMessage
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.rig import position

WHERE = ("t", 0)
BAD = KafkaError(KafkaError._BAD_COMPRESSION, "Decompression failed")


@dataclass
class Event:
    at: int
    fault: KafkaError | None = None

    def topic(self):
        return "t"

    def partition(self):
        return 0

    def offset(self):
        return self.at

    def error(self):
        return self.fault


class Log:
    """A partition of batches, each (records, readable), as a consumer gets them: the rest of the batch that holds the
    position, or an error at the first offset of that batch; an end once at the end."""

    def __init__(self, *batches, start=0, committed=-1001):
        self.batches, self.position, self.told, self.sought = batches, start, False, []
        self.known = committed
        self.end = sum(records for records, _ in batches)

    def get_watermark_offsets(self, partition, cached):
        assert cached
        return 0, self.end

    def committed(self, partitions, seconds):
        (item,) = partitions
        return [TopicPartition(item.topic, item.partition, self.known)]

    def seek(self, partition):
        assert 0 <= partition.offset <= self.end, "the consumer would be moved to the beginning"
        self.position, self.told = partition.offset, False
        self.sought.append(partition.offset)

    def consume(self):
        base = 0
        for records, readable in self.batches:
            if base <= self.position < base + records:
                if not readable:
                    return [Event(base, BAD)]
                found = [Event(offset) for offset in range(self.position, base + records)]
                self.position = base + records
                return found
            base += records
        told, self.told = self.told, True
        return [] if told else [Event(self.end, KafkaError(KafkaError._PARTITION_EOF))]


def taken(batches):
    """The offsets that were skipped, which are taken out."""
    return [batches.skipped.popleft().at for _ in range(len(batches.skipped))]


def read(log, rounds=200, **settings):
    """(offsets that were read, offsets that were skipped)"""
    batches = UnreadableBatches(log, SourceSettings(**{"unreadable_seconds": 0.0} | settings))
    good, skipped = [], []
    for _ in range(rounds):
        skipped += taken(batches)
        positions = {WHERE: good[-1] + 1} if good else {}
        good += [item.at for item in batches.take(log.consume(), positions) if item.error() is None]
    return good, skipped


@pytest.mark.parametrize(
    "batches",
    [
        [(1, False)],
        [(3, True), (1, False), (4, True)],
        [(3, True), (1000, False), (4, True)],
        [(2, True), (17, False)],
        [(33, False), (2, True), (1, True), (5, True)],
        [(2, False), (3, False), (1, False), (9, True)],
        [(64, False), (1, True), (64, False), (1, True)],
        [(5, True), (7, True)],
    ],
)
def test_exactly_the_offsets_of_unreadable_batches_are_skipped(batches):
    good, skipped, base = [], [], 0
    for records, readable in batches:
        (good if readable else skipped).extend(range(base, base + records))
        base += records
    log = Log(*batches)
    assert read(log) == (good, skipped)
    assert len(log.sought) <= 25 * len(batches)


def test_a_start_amid_the_batch_repeats_no_dead_letter():
    assert read(Log((2, True), (30, False), (2, True), start=20, committed=20)) == ([32, 33], [*range(20, 32)])


def test_it_is_tried_for_a_while(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = Log((2, True), (3, False), (2, True))
    batches = UnreadableBatches(log, SourceSettings(unreadable_seconds=10.0))
    batches.take(log.consume(), {})
    for now[0] in (1.0, 5.0, 10.9):
        batches.take(log.consume(), {WHERE: 2})
    assert log.sought == []
    now[0] = 11.1
    batches.take(log.consume(), {WHERE: 2})
    assert log.sought == [3]


def test_a_batch_that_can_be_read_after_all_is_not_skipped():
    log = Log((2, False), (2, True))
    batches = UnreadableBatches(log, SourceSettings(unreadable_seconds=0.0))
    assert batches.take(log.consume(), {}) == []
    log.batches = ((2, True), (2, True))
    assert [item.at for item in batches.take(log.consume(), {})] == [0, 1]
    log.batches = ((2, True), (2, False))  # a new fault is a new search
    assert batches.take(log.consume(), {WHERE: 2}) == []
    assert log.sought == []


def test_it_stops_if_it_is_told_to():
    with pytest.raises(EdgekitError, match=r"t\[0\] cannot be read at offset 2: .*Decompression failed.*'skip'"):
        read(Log((2, True), (3, False), (2, True)), unreadable="stop")


def test_a_revoked_partition_is_forgotten():
    log = Log((4, False))
    batches = UnreadableBatches(log, SourceSettings(unreadable_seconds=0.0))
    for _ in range(20):
        batches.take(log.consume(), {})
    batches.forget(("t", 1))
    assert len(batches.skipped) == 4
    batches.forget(WHERE)
    assert not batches.skipped


def test_a_batch_of_any_number_of_records_takes_no_memory_for_each():
    """A hostile batch may have many millions of records, and memory for each of them would end the consumer."""
    batches = UnreadableBatches(Log((10**9, False), (1, True)), SourceSettings(unreadable_seconds=0.0))
    tracemalloc.start()
    try:
        for _ in range(200):
            batches.take(batches._consumer.consume(), {})
            if batches.skipped:
                break
        assert len(batches.skipped) == 10**9
        assert [batches.skipped.popleft().at for _ in range(3)] == [0, 1, 2]
        assert len(batches.skipped) == 10**9 - 3
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_errors_of_no_offset_are_left_to_the_source():
    @dataclass
    class Other(Event):
        def offset(self):
            return -1001

    batches = UnreadableBatches(Log(), SourceSettings())
    lost = Other(0, KafkaError(KafkaError._TRANSPORT))
    refused = Event(3, KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
    assert batches.take([lost, refused], {}) == [lost, refused]


def test_it_stands_for_a_message():
    message = UnreadableMessage(WHERE, 7, "why")
    assert (message.topic(), message.partition(), message.offset()) == ("t", 0, 7)
    assert (len(message), message.value(), message.key(), message.headers(), message.error()) == (
        0,
        None,
        None,
        None,
        None,
    )


needs_kafka = pytest.mark.skipif(
    not {"EDGEKIT_KAFKA_BOOTSTRAP", "EDGEKIT_TEST_BROKER"} & set(os.environ),
    reason="the embedded broker packs batches anew; set EDGEKIT_KAFKA_BOOTSTRAP to a broker of Apache Kafka",
)
# What is inflated is limited by the client: 17 MB here, 100 MB by default
SMALL = {"fetch.max.bytes": 16_000_000, "receive.message.max.bytes": 17_000_000, "fetch.message.max.bytes": 1_000_000}


def bomb(rig, records: int) -> None:
    """Records of 0.9 MB of zeros, in one batch: nothing is sent before `flush`, however slow the machine is."""
    producer = Producer(
        {
            "bootstrap.servers": rig.address, "compression.type": "zstd", "linger.ms": 60_000,
            "message.max.bytes": 400_000_000, "batch.size": 400_000_000,
        }
    )  # fmt: skip
    for _ in range(records):
        producer.produce(rig.source, bytes(900_000), partition=0)
    assert producer.flush(60) == 0


@needs_kafka
def test_a_bomb_in_a_batch_is_skipped_on_a_real_broker(rig, packets):
    rig.partitions = 1
    rig.send(packets[:10])
    bomb(rig, 30)
    rig.send(packets[10:20])
    kafka = {**rig.kafka, **SMALL}
    began = time.monotonic()
    total = rig.consume(kafka=kafka, source={"unreadable_seconds": 1.0}).ledger.total()
    print(f"skipped after {time.monotonic() - began:.1f} s")
    assert (total.consumed, total.published, total.dead_lettered, total.in_flight) == (50, 20, 30, 0)
    letters = rig.read(rig.dead)
    assert sorted(position(letter)[2] for letter in letters) == list(range(10, 40))
    for letter in letters:
        headers = dict(headers_of(letter))
        assert letter.value() is None
        assert b"cannot be read: Decompression" in headers[REASON]
        assert b"the record, because it cannot be read" in headers[OMITTED]
    done = redrive({**kafka}, rig.config().dead_letters, group=f"{rig.name}-{uuid.uuid4().hex}")
    assert (done.sent, done.gone) == (0, 30)


@needs_kafka
def test_a_bomb_stops_the_consumer_if_so_configured(rig, packets):
    rig.partitions = 1
    rig.send(packets[:3])
    bomb(rig, 30)
    with pytest.raises(
        EdgekitError, match=r"cannot be read at offset 3: Decompression .*raise receive.message.max.bytes"
    ):
        rig.consume(kafka={**rig.kafka, **SMALL}, source={"unreadable_seconds": 1.0, "unreadable": "stop"})
    assert len(rig.read(rig.results)) == 3
