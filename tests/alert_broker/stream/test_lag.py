"""The lag against librdkafka's mock cluster, whose log ends are exact: a number for every partition that is ours."""

import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from alert_broker.stream import config as configuration
from alert_broker.stream import lag as module
from alert_broker.stream.lag import Lag
from alert_broker.stream.source import Source
from alert_broker.stream.stats import Stats
from tests.brokers import MockCluster


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(module, "LAG_SECONDS", 0.05)
    with MockCluster() as cluster:
        cluster.create_topic("source", 3)
        yield cluster


def config_of(cluster, **source):
    tables = {
        "source": {"topics": ["source"], "group": "g", **source},
        "output": [{"topic": "results"}],
        "kafka": {"bootstrap.servers": cluster.address, "session.timeout.ms": 6000},
    }
    return configuration.parse(tables, "test").check()


def send(cluster, *numbers):
    """So many messages to each partition."""
    producer = Producer({"bootstrap.servers": cluster.address})
    for partition, number in enumerate(numbers):
        for _ in range(number):
            producer.produce("source", b"x" * 100, partition=partition)
    assert producer.flush(10) == 0


def commit(cluster, *offsets):
    consumer = Consumer({"bootstrap.servers": cluster.address, "group.id": "g"})
    consumer.commit(offsets=[TopicPartition("source", k, at) for k, at in enumerate(offsets)], asynchronous=False)
    consumer.close()


OURS = [("source", number) for number in range(3)]


def numbers(lag):
    return [lag.get(at) for at in OURS]


def settled(look, quiet=0.3, limit=15.0):
    """What it says once it knows of every partition and has said the same for a while; a busy machine takes longer."""
    started = since = time.monotonic()
    found = look()
    while time.monotonic() - since < quiet and time.monotonic() - started < limit:
        time.sleep(0.01)
        before, found = found, look()
        if found != before or (isinstance(found, dict) and None in numbers(found)):
            since = time.monotonic()
    return found


@pytest.mark.parametrize(
    ("start_at", "committed", "expected"),
    [
        ("earliest", None, [40, 0, 25]),
        ("earliest", (10, 0, 25), [30, 0, 0]),
        ("latest", None, [0, 0, 0]),
        ("latest", (10, 0, 20), [30, 0, 5]),
    ],
)
def test_partitions_that_were_never_read(cluster, start_at, committed, expected):
    send(cluster, 40, 0, 25)
    if committed:
        commit(cluster, *committed)
    lag = Lag(config_of(cluster, start_at=start_at))
    assert numbers(settled(lambda: lag.look(OURS, {}))) == expected
    send(cluster, 2, 3, 0)  # and where reading begins stays where it is
    after = [number + more for number, more in zip(expected, (2, 3, 0), strict=True)]
    assert numbers(settled(lambda: lag.look(OURS, {}))) == after
    assert numbers(lag.look(OURS, {OURS[0]: 35})) == [7, *after[1:]]


def test_what_was_asked_before_a_partition_came_is_forgotten(cluster):
    send(cluster, 10, 10, 10)
    lag = Lag(config_of(cluster))
    assert numbers(settled(lambda: lag.look(OURS, {}))) == [10, 10, 10]
    commit(cluster, 4, 0, 0)  # by another member, which had it in between
    lag.forget(OURS[0])
    assert OURS[0] not in lag.look(OURS, {})
    assert numbers(settled(lambda: lag.look(OURS, {}))) == [6, 10, 10]


def test_nobody_waits_for_a_broker_that_is_away(cluster):
    send(cluster, 3, 0, 0)
    lag = Lag(config_of(cluster))
    assert numbers(settled(lambda: lag.look(OURS, {}))) == [3, 0, 0]
    cluster.set_up(False)
    for _ in range(20):
        started = time.monotonic()
        assert numbers(lag.look(OURS, {OURS[0]: 1})) == [2, 0, 0]  # by the last end that is known
        assert time.monotonic() - started < 0.1
        time.sleep(0.02)


def test_lag_while_paused(cluster):
    """The consumer's own idea of the end, which this was taken from, stands still meanwhile."""
    send(cluster, 5, 5, 5)
    source = Source(config_of(cluster), Stats())
    try:
        deadline = time.monotonic() + 20
        while not source.at_end:
            source.poll(100, 0.05)
            assert time.monotonic() < deadline
        source.pause(True)
        settled(lambda: source.poll(100, 0.0))
        send(cluster, 30, 0, 7)
        settled(lambda: source.poll(100, 0.0))
        assert numbers(source.stats.lag) == [30, 0, 7]
        assert not source.caught_up
        _, stale = source.consumer.get_watermark_offsets(TopicPartition("source", 0), cached=True)
        assert stale == 5
        source.pause(False)
        while source.stats.lag != dict.fromkeys(OURS, 0):
            source.poll(100, 0.05)
            assert time.monotonic() < deadline
    finally:
        source.close()


def test_an_end_that_the_broker_does_not_know_changes_nothing(cluster):
    lag = Lag(config_of(cluster))
    for offset, known in ((7, 7), (-1, 7), (9, 9)):
        future = Future()
        future.set_result(SimpleNamespace(offset=offset))
        lag._take(lag._ends, OURS[0], future)
        assert lag._ends == {OURS[0]: known}
