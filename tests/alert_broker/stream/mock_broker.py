"""librdkafka's mock cluster for the tests of publishing: a source that has joined its group, and batches to publish."""

import time

import numpy as np
from confluent_kafka import TopicPartition

from alert_broker.stream import config as configuration
from alert_broker.stream.message_batch import MessageBatch
from alert_broker.stream.publication import Publication
from alert_broker.stream.sender import Outgoing

PRODUCE, OFFSET_COMMIT, INIT_PRODUCER_ID, END_TXN, TXN_OFFSET_COMMIT = 0, 8, 22, 26, 28
WHERE = ("source", 0)


def config_of(cluster, **changes):
    tables = {
        "source": {"topics": ["source"], "group": "g"},
        "output": [{"topic": "results"}],
        "dead_letters": {"topic": "dead"},
        "publish": {"seconds": 3.0},
        "kafka": {"bootstrap.servers": cluster.address, "session.timeout.ms": 6000},
    }
    return configuration.parse(tables | changes, "test").check()


def messages(count):
    return [Outgoing("results", b"x" * 100, [], index) for index in range(count)]


def no_other(refused):
    raise AssertionError(refused)


def committed(source):
    """The next offset that the group has committed; -1001 for none."""
    return source.consumer.committed([TopicPartition(*WHERE)], 10)[0].offset


def publication(source, found, offset, instead=no_other, account=lambda owned: None, count=0):
    """A batch of the alerts before this offset, whose messages are `found`."""
    count = count or 1 + max(message.alert_index for message in found)
    offsets = np.arange(offset - count, offset)
    generation = source.membership.generations[WHERE]
    batch = MessageBatch([None] * count, (WHERE,), (generation,), np.zeros(count, np.int64), offsets, 0.0)
    return Publication(batch, list(found), instead, account)


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
