"""The position at which a group starts to read: offsets, times, and errors for wrong positions."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from confluent_kafka import OFFSET_END, KafkaError, KafkaException, TopicPartition

from alert_broker.stream.start import start_positions
from edgekit.errors import EdgekitError

PARTITIONS = [TopicPartition("alerts", number) for number in range(3)]


class Broker:
    """A consumer whose partition 0 has a message at 5000 ms and offset 50; the other partitions end before that
    time."""

    def __init__(self):
        self.asked = []

    def offsets_for_times(self, asked, timeout):
        self.asked = [item.offset for item in asked]
        return [TopicPartition(item.topic, item.partition, 50 if item.partition == 0 else OFFSET_END) for item in asked]

    def get_watermark_offsets(self, partition, timeout):
        return 0, 70 + partition.partition


def offsets(found):
    return {item.partition: item.offset for item in found}


@pytest.mark.parametrize("text", ["0=1200,2=7", " 0=1200 , 2=7 "])
def test_offsets_are_taken_as_they_are(text):
    assert offsets(start_positions(text, PARTITIONS, None)) == {0: 1200, 2: 7}


def test_a_partition_that_does_not_exist_is_named():
    with pytest.raises(EdgekitError, match="start_at names partition 3; the topic has 3"):
        start_positions("0=1,3=1", PARTITIONS, None)


@pytest.mark.parametrize("text", ["2026-08-01T04:00:00Z", "2026-08-01T04:00:00", "2026-08-01T06:00:00+02:00"])
def test_a_time_without_a_zone_is_utc_and_partitions_without_a_later_message_start_at_their_end(text):
    broker = Broker()
    assert offsets(start_positions(text, PARTITIONS, broker)) == {0: 50, 1: 71, 2: 72}
    assert broker.asked == [datetime(2026, 8, 1, 4, tzinfo=UTC).timestamp() * 1000] * 3


def test_a_partition_whose_position_is_not_known_is_not_started_at_its_end():
    refused = SimpleNamespace(
        topic="alerts", partition=1, offset=-1, error=KafkaError(KafkaError.NOT_LEADER_FOR_PARTITION)
    )
    broker = Broker()
    broker.offsets_for_times = lambda asked, timeout: [TopicPartition("alerts", 0, 50), refused]
    with pytest.raises(KafkaException, match="NOT_LEADER_FOR_PARTITION"):
        start_positions("2026-08-01T04:00:00Z", PARTITIONS[:2], broker)


@pytest.mark.parametrize("text", ["yesterday", "0=x", "0:1200", "-1=5"])
def test_what_is_neither_is_refused_with_an_example(text):
    with pytest.raises(EdgekitError, match=r"start_at is .*expected earliest, latest, a time such as"):
        start_positions(text, PARTITIONS, Broker())
