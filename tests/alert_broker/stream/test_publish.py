"""Publishing against librdkafka's mock cluster: what is asked of the broker, in which order; errors made to order."""

import threading

import pytest
from confluent_kafka import KafkaError

from alert_broker.stream import config as configuration
from alert_broker.stream.brokers import MockCluster
from alert_broker.stream.publish import AtLeastOnce, ExactlyOnce, Outgoing
from alert_broker.stream.source import Source
from alert_broker.stream.stats import Stats
from edgekit.errors import EdgekitError

PRODUCE, OFFSET_COMMIT = 0, 8


@pytest.fixture
def cluster():
    with MockCluster() as cluster:
        for topic in ("source", "results", "dead"):
            cluster.create_topic(topic, 1)
        yield cluster


def config_of(cluster, **changes):
    tables = {
        "source": {"topics": ["source"], "group": "g"}, "output": [{"topic": "results"}],
        "dead_letters": {"topic": "dead"}, "publish": {"seconds": 3.0},
        "kafka": {"bootstrap.servers": cluster.address, "session.timeout.ms": 6000},
    }  # fmt: skip
    return configuration.parse(tables | changes, "test").check()


@pytest.fixture
def source(cluster):
    source = Source(config_of(cluster), Stats())
    for _ in range(100):
        source.poll(1, 0.1)
        if source.consumer.assignment():
            break
    yield source
    source.close()


def messages(count):
    return [Outgoing("results", b"x" * 100, [], place) for place in range(count)]


def no_other(message, reason):
    raise AssertionError(reason)


def test_offsets_are_committed_after_all_is_acknowledged(cluster, source):
    publisher = AtLeastOnce(config_of(cluster), source)
    with cluster.requests() as kinds:
        publisher.publish(messages(20), {("source", 0): 7}, no_other)
    assert kinds.count(OFFSET_COMMIT) == 1
    assert PRODUCE in kinds
    assert PRODUCE not in kinds[kinds.index(OFFSET_COMMIT) :]


def test_the_order_is_seen_if_it_is_wrong(cluster, source):
    """Planted: commit first."""
    publisher = AtLeastOnce(config_of(cluster), source)
    with cluster.requests() as kinds:
        source.commit({("source", 0): 7})
        publisher.publish(messages(20), {}, no_other)
    assert PRODUCE in kinds[kinds.index(OFFSET_COMMIT) :]


def test_passing_errors_are_survived(cluster, source):
    publisher = AtLeastOnce(config_of(cluster, publish={"seconds": 20.0}), source)
    cluster.fail(PRODUCE, [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.REQUEST_TIMED_OUT])
    publisher.publish(messages(5), {("source", 0): 5}, no_other)
    assert source.consumer.committed(source.consumer.assignment(), 5)[0].offset == 5


def test_a_broker_that_is_away_for_a_moment(cluster, source):
    publisher = AtLeastOnce(config_of(cluster, publish={"seconds": 20.0}), source)
    publisher.publish(messages(1), {("source", 0): 1}, no_other)
    cluster.set_up(False)
    timer = threading.Timer(1.0, cluster.set_up, (True,))
    timer.start()
    publisher.publish(messages(10), {("source", 0): 11}, no_other)
    assert not timer.is_alive()  # it was away all the time until then
    assert source.consumer.committed(source.consumer.assignment(), 10)[0].offset == 11


def test_what_is_not_acknowledged_is_not_committed(cluster, source):
    publisher = AtLeastOnce(config_of(cluster), source)
    publisher.publish(messages(2), {("source", 0): 2}, no_other)
    cluster.fail(PRODUCE, [KafkaError.TOPIC_AUTHORIZATION_FAILED])
    with cluster.requests() as kinds, pytest.raises(EdgekitError, match="results cannot be published"):
        publisher.publish(messages(2), {("source", 0): 4}, no_other)
    assert OFFSET_COMMIT not in kinds


@pytest.mark.parametrize("error", [KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID])
def test_a_commit_of_a_generation_that_is_over_is_no_failure(cluster, source, error, caplog):
    cluster.fail(OFFSET_COMMIT, [error])
    AtLeastOnce(config_of(cluster), source).publish(messages(2), {("source", 0): 2}, no_other)
    assert "new generation" in caplog.text


def test_a_commit_that_is_refused_is_a_failure(cluster, source):
    cluster.fail(OFFSET_COMMIT, [KafkaError.GROUP_AUTHORIZATION_FAILED])
    with pytest.raises(EdgekitError, match="offsets cannot be committed"):
        AtLeastOnce(config_of(cluster), source).publish(messages(2), {("source", 0): 2}, no_other)


def test_what_no_broker_takes_is_replaced_and_the_rest_is_not_sent_twice(cluster, source):
    publisher = AtLeastOnce(config_of(cluster), source)
    large = Outgoing("results", b"x" * 9_000_000, [], 1)
    replaced = []

    def instead(message, reason):
        replaced.append((message.place, reason))
        return Outgoing("dead", b"small", [], message.place)

    publisher.publish([*messages(1), large], {("source", 0): 2}, instead)
    assert [place for place, _ in replaced] == [1]
    assert "too large" in replaced[0][1].lower()


def test_exactly_once_needs_a_name(cluster, source):
    with pytest.raises(EdgekitError, match=r"publish\.transactional_id"):
        ExactlyOnce(config_of(cluster), source)
