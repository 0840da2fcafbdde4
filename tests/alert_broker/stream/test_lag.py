"""The lag against librdkafka's mock cluster, whose log ends are exact: a number for every partition that is ours."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from alert_broker.stream import config as configuration
from alert_broker.stream import lag as module
from alert_broker.stream.lag import Lag
from alert_broker.stream.source import Source
from alert_broker.stream.stats import Stats
from tests.alert_broker.stream.waiting import wait_for
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


LIST_OFFSETS, COORDINATOR = 2, {8, 9, 10}  # the latter: OffsetCommit, OffsetFetch, FindCoordinator
OURS = [("source", number) for number in range(3)]


def numbers(lag):
    return [lag.get(at) for at in OURS]


class Never:
    """A future that is never done; counts who looks at it and who waits for it."""

    def __init__(self):
        self.asked = self.waited = 0

    def done(self):
        self.asked += 1
        return False

    def result(self, timeout=None):
        self.waited += 1


@pytest.mark.parametrize(("start_at", "expected"), [("earliest", [40, 0, 25]), ("latest", [0, 0, 0])])
def test_partitions_that_were_never_read(cluster, start_at, expected):
    send(cluster, 40, 0, 25)
    lag = Lag(config_of(cluster, start_at=start_at))
    wait_for(lambda: numbers(lag.look(OURS, {})) == expected)
    send(cluster, 2, 3, 0)  # and where reading begins stays where it is
    after = [number + more for number, more in zip(expected, (2, 3, 0), strict=True)]
    wait_for(lambda: numbers(lag.look(OURS, {})) == after)
    assert numbers(lag.look(OURS, {OURS[0]: 35})) == [7, *after[1:]]


@pytest.mark.parametrize("start_at", ["earliest", "latest"])
def test_what_the_group_has_committed_is_where_reading_begins(cluster, start_at):
    send(cluster, 40, 0, 25)
    commit(cluster, 10, 0, 20)
    source = Source(config_of(cluster, start_at=start_at), Stats())
    try:
        source.pause(True)  # nothing is read
        wait_for(lambda: source.poll(1, 0.0) is None and numbers(source.stats.lag) == [30, 0, 5])
    finally:
        source.close()


def test_what_was_asked_before_a_partition_came_is_forgotten(cluster):
    send(cluster, 10, 10, 10)
    lag = Lag(config_of(cluster))
    wait_for(lambda: numbers(lag.look(OURS, {})) == [10, 10, 10])
    send(cluster, 5, 0, 0)
    lag.forget(OURS[0])
    assert OURS[0] not in lag.look(OURS, {})
    wait_for(lambda: numbers(lag.look(OURS, {})) == [15, 10, 10])


def test_no_coordinator_is_asked(cluster):
    """An AdminClient that waits for a coordinator can abort the process."""
    lag = Lag(config_of(cluster))
    with cluster.requests() as kinds:
        wait_for(lambda: numbers(lag.look(OURS, {})) == [0, 0, 0])
    assert LIST_OFFSETS in kinds
    assert not COORDINATOR & set(kinds)


def test_a_question_to_the_coordinator_would_be_seen(cluster):
    """Planted: what the test above looks for is what such a question sends."""
    with cluster.requests() as kinds:
        commit(cluster, 1, 1, 1)
    assert COORDINATOR & set(kinds)


def test_nobody_waits_for_a_broker_that_is_away(cluster):
    send(cluster, 3, 0, 0)
    lag = Lag(config_of(cluster))
    wait_for(lambda: numbers(lag.look(OURS, {})) == [3, 0, 0])
    cluster.set_up(False)
    waited = Never()
    lag._pending.insert(0, (lag._ends, OURS[0], waited))  # an answer that never comes, looked at first
    for _ in range(20):
        assert numbers(lag.look(OURS, {OURS[0]: 1})) == [2, 0, 0]  # by the last end that is known
    assert waited.asked == 20
    assert waited.waited == 0


def test_lag_while_paused(cluster):
    """The consumer's own idea of the end, which this was taken from, stands still meanwhile."""
    send(cluster, 5, 5, 5)
    source = Source(config_of(cluster), Stats())

    def lag_is(*expected):
        source.poll(100, 0.0)
        return numbers(source.stats.lag) == list(expected)

    try:
        wait_for(lambda: lag_is(0, 0, 0) and source.at_end)
        source.pause(True)
        send(cluster, 30, 0, 7)
        wait_for(lambda: lag_is(30, 0, 7))
        assert not source.caught_up
        _, stale = source.consumer.get_watermark_offsets(TopicPartition("source", 0), cached=True)
        assert stale == 5
        source.pause(False)
        wait_for(lambda: lag_is(0, 0, 0))
    finally:
        source.close()


def test_an_end_that_the_broker_does_not_know_changes_nothing(cluster):
    lag = Lag(config_of(cluster))
    for offset, known in ((7, 7), (-1, 7), (9, 9)):
        future = Future()
        future.set_result(SimpleNamespace(offset=offset))
        lag._take(lag._ends, OURS[0], future)
        assert lag._ends == {OURS[0]: known}
