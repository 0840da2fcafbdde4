"""Publishing at least once against librdkafka's mock cluster: what is asked of it in which order; errors to order."""

import threading
import time

import pytest
from confluent_kafka import KafkaError

from alert_broker.stream.publish import AtLeastOnce
from alert_broker.stream.sender import Outgoing
from alert_broker.work_budget import Budget, CancelledError
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.mock_broker import (
    OFFSET_COMMIT,
    PRODUCE,
    committed,
    config_of,
    messages,
    no_other,
    publication,
    wait_until,
)
from tests.alert_broker.stream.waiting import Stopwatch


@pytest.fixture
def publisher(cluster, cluster_source):
    return AtLeastOnce(config_of(cluster), cluster_source.membership)


def publish(publisher, source, found, offset, instead=no_other):
    """Publish a batch and commit it."""
    publisher.make_room()
    publisher.publish(publication(source, found, offset, instead))
    publisher.finish()
    assert source.membership.commits.finish(10.0)


def test_offsets_are_committed_after_all_is_acknowledged(cluster, cluster_source, publisher):
    with cluster.requests() as kinds:
        publish(publisher, cluster_source, messages(20), 20)
    assert kinds.count(OFFSET_COMMIT) == 1
    assert PRODUCE in kinds
    assert PRODUCE not in kinds[kinds.index(OFFSET_COMMIT) :]
    assert committed(cluster_source) == 20


def test_the_order_is_seen_if_it_is_wrong(cluster, cluster_source, publisher):
    """Planted: commit first."""
    with cluster.requests() as kinds:
        cluster_source.membership.commits.acknowledge({("source", 0): 20})
        assert cluster_source.membership.commits.finish(10.0)
        publisher.publish(publication(cluster_source, messages(20), 20))
        publisher.finish()
    assert PRODUCE in kinds[kinds.index(OFFSET_COMMIT) :]


def test_batches_are_sent_while_earlier_ones_are_not_acknowledged(cluster, cluster_source, publisher):
    """The broker is away. Nothing is accounted for, and nothing is committed, until it has acknowledged the first."""
    accounted = []
    cluster.set_up(False)
    for number in range(1, 4):
        publisher.publish(publication(cluster_source, messages(5), 5 * number, account=accounted.append))
    assert publisher.busy
    assert accounted == []
    cluster.set_up(True)
    with cluster.requests() as kinds:
        publisher.finish()
        assert cluster_source.membership.commits.finish(10.0)
    assert len(accounted) == 3
    assert kinds.count(OFFSET_COMMIT) == 1
    assert committed(cluster_source) == 15


def test_no_more_batches_are_published_than_a_crash_may_repeat(cluster, cluster_source):
    """Two of them: the third waits until the first is committed, which the polling thread does."""
    settings = {"seconds": 3.0, "uncommitted": 2, "commit_seconds": 60.0}
    accounted = []
    budget = Budget(cancelled=lambda: len(accounted) == 2)
    publisher = AtLeastOnce(config_of(cluster, publish=settings), cluster_source.membership, budget)
    for number in (1, 2):
        publisher.make_room()
        publisher.publish(publication(cluster_source, messages(5), 5 * number, account=accounted.append))
    with pytest.raises(CancelledError):
        publisher.make_room()
    assert not publisher.busy  # both are acknowledged: it is the commit that is waited for
    accounted.clear()
    thread = threading.Thread(target=publisher.make_room)
    thread.start()
    wait_until(lambda: cluster_source.poll(1, 0.01) or not thread.is_alive())
    assert committed(cluster_source) == 10  # although a commit a minute is what the configuration says


def test_passing_errors_are_survived(cluster, cluster_source):
    publisher = AtLeastOnce(config_of(cluster, publish={"seconds": 20.0}), cluster_source.membership)
    cluster.fail(PRODUCE, [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.REQUEST_TIMED_OUT])
    publish(publisher, cluster_source, messages(5), 5)
    assert committed(cluster_source) == 5


def test_a_broker_that_is_away_for_a_moment(cluster, cluster_source):
    publisher = AtLeastOnce(config_of(cluster, publish={"seconds": 20.0}), cluster_source.membership)
    publish(publisher, cluster_source, messages(1), 1)
    cluster.set_up(False)
    timer = threading.Timer(1.0, cluster.set_up, (True,))
    timer.start()
    publish(publisher, cluster_source, messages(10), 11)
    assert not timer.is_alive()  # it was away all the time until then
    assert committed(cluster_source) == 11


def test_what_is_not_acknowledged_is_not_committed(cluster, cluster_source, publisher):
    publish(publisher, cluster_source, messages(2), 2)
    cluster.fail(PRODUCE, [KafkaError.TOPIC_AUTHORIZATION_FAILED])
    with cluster.requests() as kinds:
        publisher.publish(publication(cluster_source, messages(2), 4))
        publisher.publish(publication(cluster_source, messages(2), 6))  # acknowledged, but after the one that failed
        with pytest.raises(EdgekitError, match="results cannot be published"):
            publisher.finish()
        assert cluster_source.membership.commits.finish(1.0)
    assert OFFSET_COMMIT not in kinds
    assert committed(cluster_source) == 2


def test_what_no_broker_takes_is_replaced_and_the_rest_is_not_sent_twice(cluster, cluster_source, publisher):
    large = Outgoing("results", b"x" * 9_000_000, [], 1)
    replaced = []

    def instead(refused):
        replaced.extend((message.alert_index, reason) for message, reason in refused)
        return [Outgoing("dead", b"small", [], message.alert_index) for message, _ in refused]

    publish(publisher, cluster_source, [*messages(1), large], 2, instead)
    assert [index for index, _ in replaced] == [1]
    assert "too large" in replaced[0][1].lower()
    assert committed(cluster_source) == 2


@pytest.mark.parametrize("code", [KafkaError.INVALID_RECORD, KafkaError.INVALID_TIMESTAMP])
def test_what_the_broker_refuses_of_everybody_is_no_fault_of_the_alert(cluster, cluster_source, publisher, code):
    """It would make a dead letter of every result. The twin is the test before this one."""
    cluster.fail(PRODUCE, [code])
    said = (
        r"results: Broker: .*\(the clock of this machine .* message\.timestamp\.after\.max\.ms, or .* without a key\)"
    )
    with cluster.requests() as kinds:
        publisher.publish(publication(cluster_source, messages(2), 2))
        with pytest.raises(EdgekitError, match=said):
            publisher.finish()
        assert cluster_source.membership.commits.finish(1.0)
    assert OFFSET_COMMIT not in kinds


def test_a_batch_without_messages_is_committed_after_those_before_it(cluster, cluster_source, publisher):
    cluster.set_up(False)
    publisher.publish(publication(cluster_source, messages(5), 5))
    publisher.publish(publication(cluster_source, [], 9, count=4))
    publisher.serve()
    assert cluster_source.membership.commits.finish(0.1)
    assert publisher.busy
    cluster.set_up(True)
    publisher.finish()
    assert cluster_source.membership.commits.finish(10.0)
    assert committed(cluster_source) == 9


def test_what_is_acknowledged_after_a_revocation_is_not_ours_to_count(cluster, cluster_source, publisher):
    accounted = []
    publisher.publish(publication(cluster_source, messages(5), 5, account=accounted.append))
    cluster_source.membership.generations.clear()
    publisher.finish()
    with cluster.requests() as kinds:
        assert cluster_source.membership.commits.finish(1.0)
    assert accounted == []
    assert OFFSET_COMMIT not in kinds


def test_who_stops_does_not_wait_for_a_broker_that_is_away(cluster, cluster_source):
    """What was sent is not committed. Without the stop, the publisher waits for as long as it may."""
    began, stopwatch = time.monotonic(), Stopwatch()
    budget = Budget(cancelled=lambda: time.monotonic() > began + 0.3)
    publisher = AtLeastOnce(config_of(cluster, publish={"seconds": 20.0}), cluster_source.membership, budget)
    cluster.set_up(False)
    with cluster.requests() as kinds:
        publisher.publish(publication(cluster_source, messages(3), 3))
        with pytest.raises(CancelledError):
            publisher.finish()
        publisher.give_up()
    assert stopwatch.seconds() < 3.0
    assert publisher.busy
    assert OFFSET_COMMIT not in kinds
    cluster.set_up(True)
