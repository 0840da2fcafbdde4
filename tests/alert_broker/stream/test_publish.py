"""Publishing against librdkafka's mock cluster: what is asked of the broker, in which order; errors made to order."""

import threading
import time

import pytest
from confluent_kafka import KafkaError

from alert_broker.stream import config as configuration
from alert_broker.stream import publish
from alert_broker.stream.membership import LostError
from alert_broker.stream.publish import RENEWALS, AtLeastOnce, ExactlyOnce, Outgoing
from alert_broker.stream.source import Source
from alert_broker.stream.stats import Stats
from alert_broker.work_budget import Budget, CancelledError
from edgekit.errors import EdgekitError
from tests.brokers import MockCluster

PRODUCE, OFFSET_COMMIT, INIT_PRODUCER_ID, END_TXN, TXN_OFFSET_COMMIT = 0, 8, 22, 26, 28


@pytest.fixture
def cluster():
    with MockCluster() as cluster:
        for topic in ("source", "results", "dead"):
            cluster.create_topic(topic, 1)
        yield cluster


def config_of(cluster, **changes):
    tables = {
        "source": {"topics": ["source"], "group": "g"},
        "output": [{"topic": "results"}],
        "dead_letters": {"topic": "dead"},
        "publish": {"seconds": 3.0},
        "kafka": {"bootstrap.servers": cluster.address, "session.timeout.ms": 6000},
    }
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
    return [Outgoing("results", b"x" * 100, [], index) for index in range(count)]


def no_other(refused):
    raise AssertionError(refused)


def test_offsets_are_committed_after_all_is_acknowledged(cluster, source):
    publisher = AtLeastOnce(config_of(cluster), source.membership)
    with cluster.requests() as kinds:
        publisher.publish(messages(20), {("source", 0): 7}, no_other)
    assert kinds.count(OFFSET_COMMIT) == 1
    assert PRODUCE in kinds
    assert PRODUCE not in kinds[kinds.index(OFFSET_COMMIT) :]


def test_the_order_is_seen_if_it_is_wrong(cluster, source):
    """Planted: commit first."""
    publisher = AtLeastOnce(config_of(cluster), source.membership)
    with cluster.requests() as kinds:
        source.membership.commit({("source", 0): 7})
        publisher.publish(messages(20), {}, no_other)
    assert PRODUCE in kinds[kinds.index(OFFSET_COMMIT) :]


def test_passing_errors_are_survived(cluster, source):
    publisher = AtLeastOnce(config_of(cluster, publish={"seconds": 20.0}), source.membership)
    cluster.fail(PRODUCE, [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.REQUEST_TIMED_OUT])
    publisher.publish(messages(5), {("source", 0): 5}, no_other)
    assert source.consumer.committed(source.consumer.assignment(), 5)[0].offset == 5


def test_a_broker_that_is_away_for_a_moment(cluster, source):
    publisher = AtLeastOnce(config_of(cluster, publish={"seconds": 20.0}), source.membership)
    publisher.publish(messages(1), {("source", 0): 1}, no_other)
    cluster.set_up(False)
    timer = threading.Timer(1.0, cluster.set_up, (True,))
    timer.start()
    publisher.publish(messages(10), {("source", 0): 11}, no_other)
    assert not timer.is_alive()  # it was away all the time until then
    assert source.consumer.committed(source.consumer.assignment(), 10)[0].offset == 11


def test_what_is_not_acknowledged_is_not_committed(cluster, source):
    publisher = AtLeastOnce(config_of(cluster), source.membership)
    publisher.publish(messages(2), {("source", 0): 2}, no_other)
    cluster.fail(PRODUCE, [KafkaError.TOPIC_AUTHORIZATION_FAILED])
    with cluster.requests() as kinds, pytest.raises(EdgekitError, match="results cannot be published"):
        publisher.publish(messages(2), {("source", 0): 4}, no_other)
    assert OFFSET_COMMIT not in kinds


@pytest.mark.parametrize("error", [KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID])
def test_a_commit_of_a_generation_that_is_over_is_no_failure(cluster, source, error, caplog):
    cluster.fail(OFFSET_COMMIT, [error])
    AtLeastOnce(config_of(cluster), source.membership).publish(messages(2), {("source", 0): 2}, no_other)
    assert "new generation" in caplog.text


def test_a_commit_that_is_refused_is_a_failure(cluster, source):
    cluster.fail(OFFSET_COMMIT, [KafkaError.GROUP_AUTHORIZATION_FAILED])
    with pytest.raises(EdgekitError, match="offsets cannot be committed"):
        AtLeastOnce(config_of(cluster), source.membership).publish(messages(2), {("source", 0): 2}, no_other)


def test_what_no_broker_takes_is_replaced_and_the_rest_is_not_sent_twice(cluster, source):
    publisher = AtLeastOnce(config_of(cluster), source.membership)
    large = Outgoing("results", b"x" * 9_000_000, [], 1)
    replaced = []

    def instead(refused):
        replaced.extend((message.alert_index, reason) for message, reason in refused)
        return [Outgoing("dead", b"small", [], message.alert_index) for message, _ in refused]

    publisher.publish([*messages(1), large], {("source", 0): 2}, instead)
    assert [index for index, _ in replaced] == [1]
    assert "too large" in replaced[0][1].lower()


@pytest.mark.parametrize("code", [KafkaError.INVALID_RECORD, KafkaError.INVALID_TIMESTAMP])
def test_what_the_broker_refuses_of_everybody_is_no_fault_of_the_alert(cluster, source, code):
    """It would make a dead letter of every result. The twin is the test before this one."""
    publisher = AtLeastOnce(config_of(cluster), source.membership)
    cluster.fail(PRODUCE, [code])
    said = (
        r"results: Broker: .*\(the clock of this machine .* message\.timestamp\.after\.max\.ms, or .* without a key\)"
    )
    with cluster.requests() as kinds, pytest.raises(EdgekitError, match=said):
        publisher.publish(messages(2), {("source", 0): 2}, no_other)
    assert OFFSET_COMMIT not in kinds


EXACTLY = {"mode": "exactly-once", "transactional_id": "t", "seconds": 5.0}


@pytest.fixture
def exactly(cluster, source):
    return ExactlyOnce(config_of(cluster, publish=EXACTLY), source.membership)


def test_a_transaction_takes_the_offsets_along(cluster, exactly):
    with cluster.requests() as kinds:
        exactly.publish(messages(3), {("source", 0): 3}, no_other)
    ours = [kind for kind in kinds if kind in (PRODUCE, TXN_OFFSET_COMMIT, END_TXN)]
    assert ours[0] == PRODUCE
    assert ours[-2:] == [TXN_OFFSET_COMMIT, END_TXN]
    assert OFFSET_COMMIT not in kinds


def test_who_has_lost_its_partitions_aborts(cluster, source, exactly):
    """What was sent is aborted, no offset is committed, and the next transaction is a new one."""
    source.membership._losing = True
    with cluster.requests() as kinds, pytest.raises(LostError):
        exactly.publish(messages(3), {("source", 0): 3}, no_other)
    assert PRODUCE in kinds
    assert kinds.count(END_TXN) == 1
    assert TXN_OFFSET_COMMIT not in kinds
    source.membership._losing = False
    with cluster.requests() as kinds:
        exactly.publish(messages(2), {("source", 0): 5}, no_other)
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (1, 1)


def test_who_is_suspended_before_the_commit_aborts_and_sends_again(cluster, source, exactly, monkeypatch):
    """The session was over between the offsets and the end of the transaction: another member may own the partition."""
    real, session = exactly._guard, source.membership.session_seconds

    def guard(call, *arguments):
        real(call, *arguments)
        if call.__name__ == "send_offsets_to_transaction":
            source.membership.session_seconds = session if call.__name__ in calls else -1.0
        calls.append(call.__name__)

    calls = []
    monkeypatch.setattr(exactly, "_guard", guard)
    with cluster.requests() as kinds:
        exactly.publish(messages(3), {("source", 0): 3}, no_other)
    assert calls.count("abort_transaction") == 1
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (2, 2)


def test_an_abort_that_is_left_out_is_seen(cluster, source, exactly, monkeypatch):
    """Planted: the transaction stays open, and the next batch would be part of it."""
    real = exactly._guard

    def guard(call, *arguments):
        if call.__name__ != "abort_transaction":
            real(call, *arguments)

    monkeypatch.setattr(exactly, "_guard", guard)
    source.membership._losing = True
    with cluster.requests() as kinds, pytest.raises(LostError):
        exactly.publish(messages(3), {("source", 0): 3}, no_other)
    assert END_TXN not in kinds
    source.membership._losing = False
    with pytest.raises(EdgekitError, match="transactions do not work"):
        exactly.publish(messages(2), {("source", 0): 5}, no_other)


@pytest.mark.parametrize(
    "error", [KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID]
)
def test_a_generation_that_is_over_aborts_and_is_asked_again(cluster, exactly, error):
    cluster.fail(TXN_OFFSET_COMMIT, [error])
    with cluster.requests() as kinds:
        exactly.publish(messages(3), {("source", 0): 3}, no_other)
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (2, 2)  # aborted, then committed


@pytest.mark.parametrize("api", [TXN_OFFSET_COMMIT, END_TXN])
def test_an_old_epoch_is_no_fence_while_the_partitions_are_ours(cluster, exactly, api, caplog):
    """As after a restart of the broker: a new producer sends the batch again, and the transaction is committed."""
    cluster.fail(api, [KafkaError.INVALID_PRODUCER_EPOCH])
    with cluster.requests() as kinds:
        exactly.publish(messages(3), {("source", 0): 3}, no_other)
    assert kinds.count(INIT_PRODUCER_ID) == 1
    assert [kind for kind in kinds if kind in (TXN_OFFSET_COMMIT, END_TXN)][-2:] == [TXN_OFFSET_COMMIT, END_TXN]
    assert "we make a new one" in caplog.text
    with cluster.requests() as kinds:
        exactly.publish(messages(2), {("source", 0): 5}, no_other)  # and goes on
    assert kinds.count(END_TXN) == 1


@pytest.mark.parametrize("api", [TXN_OFFSET_COMMIT, END_TXN])
def test_who_is_fenced_off_again_and_again_stops(cluster, exactly, api):
    """Two members with one transactional id do that to each other."""
    for _ in range(RENEWALS):
        cluster.fail(api, [KafkaError.PRODUCER_FENCED])
        exactly.publish(messages(1), {("source", 0): 1}, no_other)
    cluster.fail(api, [KafkaError.PRODUCER_FENCED])
    with cluster.requests() as kinds, pytest.raises(EdgekitError, match="fenced off"):
        exactly.publish(messages(1), {("source", 0): 1}, no_other)
    assert INIT_PRODUCER_ID not in kinds


def test_old_epochs_that_are_long_past_do_not_count(cluster, exactly, monkeypatch):
    monkeypatch.setattr(publish, "RENEWAL_SECONDS", 0.0)
    for _ in range(RENEWALS + 1):
        cluster.fail(TXN_OFFSET_COMMIT, [KafkaError.PRODUCER_FENCED])
        exactly.publish(messages(1), {("source", 0): 1}, no_other)


def test_who_is_fenced_off_and_has_lost_its_partitions_makes_no_new_producer(cluster, source, exactly):
    cluster.fail(TXN_OFFSET_COMMIT, [KafkaError.PRODUCER_FENCED])
    real, calls = source.membership.group_metadata, []

    def group_metadata():
        calls.append(1)
        if len(calls) > 1:
            raise LostError("of the test")
        return real()

    source.membership.group_metadata = group_metadata
    with cluster.requests() as kinds, pytest.raises(LostError):
        exactly.publish(messages(3), {("source", 0): 3}, no_other)
    assert INIT_PRODUCER_ID not in kinds


@pytest.mark.parametrize(("committed", "sent"), [(3, 1), (2, 2), (-1001, 2)])
def test_a_transaction_whose_commit_is_in_doubt_is_not_repeated_if_it_was_committed(
    cluster, source, exactly, monkeypatch, committed, sent
):
    """The offsets are part of the transaction, so they tell whether it was committed."""
    monkeypatch.setattr(source.membership, "committed", lambda partitions: dict.fromkeys(partitions, committed))
    cluster.fail(END_TXN, [KafkaError.INVALID_PRODUCER_EPOCH])
    with cluster.requests() as kinds:
        exactly.publish(messages(3), {("source", 0): 3}, no_other)
    assert kinds.count(TXN_OFFSET_COMMIT) == sent


def test_a_dead_letter_outlives_the_producer(cluster, exactly):
    """A message that was replaced stays replaced when the batch is sent again: nobody is asked twice."""
    large, asked = Outgoing("results", b"x" * 9_000_000, [], 1), []

    def instead(refused):
        asked.append(1)
        return [Outgoing("dead", b"small", [], 1)]

    cluster.fail(TXN_OFFSET_COMMIT, [KafkaError.PRODUCER_FENCED])
    exactly.publish([*messages(1), large], {("source", 0): 2}, instead)
    assert asked == [1]


def test_what_no_broker_takes_is_replaced_in_a_transaction_of_its_own(cluster, exactly):
    large = Outgoing("results", b"x" * 9_000_000, [], 1)
    with cluster.requests() as kinds:
        exactly.publish([*messages(1), large], {("source", 0): 2}, lambda refused: [Outgoing("dead", b"small", [], 1)])
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (1, 2)


def test_exactly_once_needs_a_name(cluster, source):
    with pytest.raises(EdgekitError, match=r"publish\.transactional_id"):
        ExactlyOnce(config_of(cluster), source.membership)


def test_who_stops_does_not_wait_for_a_broker_that_is_away(cluster, source):
    """What was sent is not committed. Without the stop, the publisher waits for as long as it may."""
    began = time.monotonic()
    budget = Budget(cancelled=lambda: time.monotonic() > began + 0.3)
    publisher = AtLeastOnce(config_of(cluster, publish={"seconds": 20.0}), source.membership, budget)
    cluster.set_up(False)
    with cluster.requests() as kinds, pytest.raises(CancelledError):
        publisher.publish(messages(3), {("source", 0): 3}, no_other)
    assert time.monotonic() - began < 2.0
    assert OFFSET_COMMIT not in kinds
    publisher.close()
    assert time.monotonic() - began < 3.0
    cluster.set_up(True)
