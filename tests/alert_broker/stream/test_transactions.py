"""Transactions against librdkafka's mock cluster: what is asked of the broker, in which order; errors made to order."""

import time

import pytest
from confluent_kafka import KafkaError

from alert_broker.stream import transactions
from alert_broker.stream.membership import LostError
from alert_broker.stream.sender import Outgoing
from alert_broker.stream.transactions import RENEWALS, ExactlyOnce
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.mock_broker import (
    END_TXN,
    INIT_PRODUCER_ID,
    OFFSET_COMMIT,
    PRODUCE,
    TXN_OFFSET_COMMIT,
    config_of,
    messages,
    no_other,
    publication,
)

EXACTLY = {"mode": "exactly-once", "transactional_id": "t", "seconds": 5.0}


@pytest.fixture
def exactly(cluster, cluster_source):
    return ExactlyOnce(config_of(cluster, publish=EXACTLY), cluster_source.membership)


def publish(exactly, source, found, offset, instead=no_other, account=lambda owned: None):
    """Publish a window of one batch."""
    exactly.publish(publication(source, found, offset, instead, account))
    exactly.finish()
    assert not exactly.busy


def test_a_transaction_takes_the_offsets_along(cluster, cluster_source, exactly):
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(3), 3)
    ours = [kind for kind in kinds if kind in (PRODUCE, TXN_OFFSET_COMMIT, END_TXN)]
    assert ours[0] == PRODUCE
    assert ours[-2:] == [TXN_OFFSET_COMMIT, END_TXN]
    assert OFFSET_COMMIT not in kinds


def test_who_has_lost_its_partitions_aborts(cluster, cluster_source, exactly):
    """What was sent is aborted, no offset is committed, and the next transaction is a new one."""
    cluster_source.membership._losing = True
    accounted = []
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(3), 3, account=accounted.append)
    assert accounted == []
    assert PRODUCE in kinds
    assert kinds.count(END_TXN) == 1
    assert TXN_OFFSET_COMMIT not in kinds
    cluster_source.membership._losing = False
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(2), 5)
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (1, 1)


def test_who_is_suspended_before_the_commit_aborts_and_sends_again(cluster, cluster_source, exactly, monkeypatch):
    """The session was over between the offsets and the end of the transaction: another member may own the partition."""
    real, session = exactly._guard, cluster_source.membership.session_seconds

    def guard(call, *arguments):
        real(call, *arguments)
        if call.__name__ == "send_offsets_to_transaction":
            cluster_source.membership.session_seconds = session if call.__name__ in calls else -1.0
        calls.append(call.__name__)

    calls = []
    monkeypatch.setattr(exactly, "_guard", guard)
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(3), 3)
    assert calls.count("abort_transaction") == 1
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (2, 2)


def test_an_abort_that_is_left_out_is_seen(cluster, cluster_source, exactly, monkeypatch):
    """Planted: the transaction stays open, and the next batch would be part of it."""
    real = exactly._guard

    def guard(call, *arguments):
        if call.__name__ != "abort_transaction":
            real(call, *arguments)

    monkeypatch.setattr(exactly, "_guard", guard)
    cluster_source.membership._losing = True
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(3), 3)
    assert END_TXN not in kinds
    cluster_source.membership._losing = False
    with pytest.raises(EdgekitError, match="transactions do not work"):
        publish(exactly, cluster_source, messages(2), 5)


@pytest.mark.parametrize(
    "error", [KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID]
)
def test_a_generation_that_is_over_aborts_and_is_asked_again(cluster, cluster_source, exactly, error):
    cluster.fail(TXN_OFFSET_COMMIT, [error])
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(3), 3)
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (2, 2)  # aborted, then committed


@pytest.mark.parametrize("api", [TXN_OFFSET_COMMIT, END_TXN])
def test_an_old_epoch_is_no_fence_while_the_partitions_are_ours(cluster, cluster_source, exactly, api, caplog):
    """As after a restart of the broker: a new producer sends the batch again, and the transaction is committed."""
    cluster.fail(api, [KafkaError.INVALID_PRODUCER_EPOCH])
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(3), 3)
    assert kinds.count(INIT_PRODUCER_ID) == 1
    assert [kind for kind in kinds if kind in (TXN_OFFSET_COMMIT, END_TXN)][-2:] == [TXN_OFFSET_COMMIT, END_TXN]
    assert "we make a new one" in caplog.text
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(2), 5)  # and goes on
    assert kinds.count(END_TXN) == 1


@pytest.mark.parametrize("api", [TXN_OFFSET_COMMIT, END_TXN])
def test_who_is_fenced_off_again_and_again_stops(cluster, cluster_source, exactly, api):
    """Two members with one transactional id do that to each other."""
    for _ in range(RENEWALS):
        cluster.fail(api, [KafkaError.PRODUCER_FENCED])
        publish(exactly, cluster_source, messages(1), 1)
    cluster.fail(api, [KafkaError.PRODUCER_FENCED])
    with cluster.requests() as kinds, pytest.raises(EdgekitError, match="fenced off"):
        publish(exactly, cluster_source, messages(1), 1)
    assert INIT_PRODUCER_ID not in kinds


def test_old_epochs_that_are_long_past_do_not_count(cluster, cluster_source, exactly, monkeypatch):
    monkeypatch.setattr(transactions, "RENEWAL_SECONDS", 0.0)
    for _ in range(RENEWALS + 1):
        cluster.fail(TXN_OFFSET_COMMIT, [KafkaError.PRODUCER_FENCED])
        publish(exactly, cluster_source, messages(1), 1)


def test_who_is_fenced_off_and_has_lost_its_partitions_makes_no_new_producer(cluster, cluster_source, exactly):
    cluster.fail(TXN_OFFSET_COMMIT, [KafkaError.PRODUCER_FENCED])
    real, calls = cluster_source.membership.group_metadata, []

    def group_metadata():
        calls.append(1)
        if len(calls) > 1:
            raise LostError("of the test")
        return real()

    cluster_source.membership.group_metadata = group_metadata
    accounted = []
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(3), 3, account=accounted.append)
    assert accounted == []
    assert len(calls) == 2
    assert INIT_PRODUCER_ID not in kinds


@pytest.mark.parametrize(("committed", "sent"), [(3, 1), (2, 2), (-1001, 2)])
def test_a_transaction_whose_commit_is_in_doubt_is_not_repeated_if_it_was_committed(
    cluster, cluster_source, exactly, monkeypatch, committed, sent
):
    """The offsets are part of the transaction, so they tell whether it was committed."""
    monkeypatch.setattr(cluster_source.membership, "committed", lambda partitions: dict.fromkeys(partitions, committed))
    cluster.fail(END_TXN, [KafkaError.INVALID_PRODUCER_EPOCH])
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, messages(3), 3)
    assert kinds.count(TXN_OFFSET_COMMIT) == sent


def test_a_dead_letter_outlives_the_producer(cluster, cluster_source, exactly):
    """A message that was replaced stays replaced when the batch is sent again: nobody is asked twice."""
    large, asked = Outgoing("results", b"x" * 9_000_000, [], 1), []

    def instead(refused):
        asked.append(1)
        return [Outgoing("dead", b"small", [], 1)]

    cluster.fail(TXN_OFFSET_COMMIT, [KafkaError.PRODUCER_FENCED])
    publish(exactly, cluster_source, [*messages(1), large], 2, instead)
    assert asked == [1]


def test_what_no_broker_takes_is_replaced_in_a_transaction_of_its_own(cluster, cluster_source, exactly):
    large = Outgoing("results", b"x" * 9_000_000, [], 1)
    with cluster.requests() as kinds:
        publish(exactly, cluster_source, [*messages(1), large], 2, lambda refused: [Outgoing("dead", b"small", [], 1)])
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (1, 2)


def test_exactly_once_needs_a_name(cluster, cluster_source):
    with pytest.raises(EdgekitError, match=r"publish\.transactional_id"):
        ExactlyOnce(config_of(cluster), cluster_source.membership)


# --- windows of several batches


@pytest.fixture
def offsets(monkeypatch):
    """The next offsets that transactions took along; the mock cluster keeps none of them for the group."""
    real, found = ExactlyOnce._guard, []

    def guard(self, call, *arguments):
        real(self, call, *arguments)
        if call.__name__ == "send_offsets_to_transaction":
            found.append([item.offset for item in arguments[0]])

    monkeypatch.setattr(ExactlyOnce, "_guard", guard)
    return found


def test_a_window_of_batches_is_one_transaction(cluster, cluster_source, exactly, offsets):
    accounted = []
    with cluster.requests() as kinds:
        for number in range(1, 5):
            exactly.publish(publication(cluster_source, messages(3), 3 * number, account=accounted.append))
        assert accounted == []
        exactly.finish()
    assert len(accounted) == 4
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (1, 1)
    assert offsets == [[12]]


def test_a_window_ends_after_its_time(cluster, cluster_source, exactly, monkeypatch):
    """That of the configuration, or that which the last transaction took."""
    now = [time.monotonic()]
    for seconds, took in ((0.1, 0.0), (0.3, 0.3)):
        exactly._took = took
        monkeypatch.setattr(transactions.time, "monotonic", lambda: now[0])
        exactly.publish(publication(cluster_source, messages(3), 3))
        now[0] += seconds - 0.01
        exactly.serve()
        assert exactly.busy
        now[0] += 0.02
        monkeypatch.undo()
        exactly._opened = time.monotonic() - seconds
        exactly.serve()
        assert not exactly.busy


def test_a_window_ends_in_time_although_batches_keep_coming(cluster, cluster_source, exactly, offsets):
    for number in range(1, 4):
        exactly.make_room()
        exactly.publish(publication(cluster_source, messages(2), 2 * number))
        exactly._opened -= 0.06
    assert offsets == [[4]]


def test_a_window_ends_when_it_has_as_many_batches_as_may_be_uncommitted(cluster, cluster_source, offsets):
    settings = {**EXACTLY, "uncommitted": 3, "commit_seconds": 60.0}
    exactly = ExactlyOnce(config_of(cluster, publish=settings), cluster_source.membership)
    for number in range(1, 4):
        exactly.make_room()
        exactly.publish(publication(cluster_source, messages(2), 2 * number))
        assert len(exactly._window) == number
    exactly.make_room()
    assert not exactly.busy
    assert offsets == [[6]]


def test_a_window_ends_when_partitions_are_revoked(cluster, cluster_source, offsets):
    exactly = ExactlyOnce(config_of(cluster, publish={**EXACTLY, "commit_seconds": 60.0}), cluster_source.membership)
    exactly.publish(publication(cluster_source, messages(2), 2))
    exactly.serve()
    assert exactly.busy
    cluster_source.membership.draining = True
    exactly.serve()
    assert not exactly.busy
    assert offsets == [[2]]


def test_alerts_whose_partition_was_revoked_meanwhile_are_not_sent(cluster, cluster_source, exactly):
    accounted = []
    exactly.publish(publication(cluster_source, messages(3), 3, account=accounted.append))
    cluster_source.membership.generations.clear()
    with cluster.requests() as kinds:
        exactly.finish()
    assert accounted == []
    assert not {PRODUCE, TXN_OFFSET_COMMIT, END_TXN} & set(kinds)


def test_a_window_that_is_given_up_is_not_sent(cluster, cluster_source, exactly):
    exactly.publish(publication(cluster_source, messages(3), 3))
    with cluster.requests() as kinds:
        exactly.give_up()
        exactly.finish()
    assert not {PRODUCE, TXN_OFFSET_COMMIT, END_TXN} & set(kinds)


def test_only_the_batch_whose_message_is_refused_has_it_replaced(cluster, cluster_source, exactly, offsets):
    large, asked = Outgoing("results", b"x" * 9_000_000, [], 0), []

    def instead(refused):
        asked.append([message.alert_index for message, _ in refused])
        return [Outgoing("dead", b"small", [], 0)]

    exactly.publish(publication(cluster_source, messages(3), 3))
    exactly.publish(publication(cluster_source, [large], 4, instead))
    exactly.publish(publication(cluster_source, messages(3), 7))
    with cluster.requests() as kinds:
        exactly.finish()
    assert asked == [[0]]
    assert (kinds.count(TXN_OFFSET_COMMIT), kinds.count(END_TXN)) == (1, 2)
    assert offsets == [[7]]
