"""What a batch holds: no message that was read before its partition was revoked, even if the partition comes back."""

import pytest
from confluent_kafka import KafkaError

from alert_broker.stream.message_batch import next_offsets
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.fake_consumer import FakeMessage, assign, indices, messages, no_position, revoke


def test_a_batch_counts_as_consumed(source):
    source.consumer.script = [messages(0, 5, 6), messages(1, 9)]
    batch = source.poll(3, 1.0)
    assert indices(batch) == [(0, 5), (0, 6), (1, 9)]
    assert source.stats.ledger.total().consumed == 3
    assert source.membership.owned(batch).all()
    assert next_offsets(batch, source.membership.owned(batch)) == {("t", 0): 7, ("t", 1): 10}


def test_a_partition_that_leaves_while_a_batch_is_read(source):
    def rebalance(consumer):
        revoke(consumer, 0)
        return messages(1, 10)

    source.consumer.script = [[*messages(0, 5), *messages(1, 9)], rebalance]
    assert indices(source.poll(9, 1.0)) == [(1, 9), (1, 10)]
    assert source.stats.ledger.total().consumed == 2


def test_a_partition_that_leaves_and_comes_back_while_a_batch_is_read(source):
    """Offset 5 was read before, and is read again from what was committed on: it must not be in the books twice."""

    def rebalance(consumer):
        revoke(consumer, 0)
        assign(consumer, 0)
        return messages(0, 3, 4, 5)

    source.consumer.script = [[*messages(0, 5), *messages(1, 9)], rebalance]
    assert indices(source.poll(9, 1.0)) == [(1, 9), (0, 3), (0, 4), (0, 5)]


def test_a_partition_that_leaves_while_paused_is_fetched_when_it_comes_back(source):
    source.pause(True)
    revoke(source.consumer, 0)
    source.pause(False)
    assert source.consumer.asleep == {0}
    assign(source.consumer, 0)
    assert not source.consumer.asleep
    source.pause(True)
    revoke(source.consumer, 1)
    assign(source.consumer, 1)
    assert source.consumer.asleep == {0, 1}


def test_the_end_of_a_partition_is_heard_while_others_leave(source):
    end = KafkaError(KafkaError._PARTITION_EOF)
    source.consumer.script = [[FakeMessage(0, 5, end), FakeMessage(1, 7, end)], lambda c: revoke(c, 1) or []]
    assert source.poll(10, 0.02) is None
    assert source.at_end
    # an end that was seen under an earlier assignment says nothing of the new one
    assign(source.consumer, 1)
    source.consumer.script = [
        [FakeMessage(1, 7, end)],
        lambda c: revoke(c, 1) or assign(c, 1) or [],
    ]
    source.poll(10, 0.02)
    assert not source.at_end


def test_who_was_at_the_end_once_is_not_caught_up_for_ever(source):
    end = KafkaError(KafkaError._PARTITION_EOF)
    source.consumer.script = [[FakeMessage(0, 5, end), FakeMessage(1, 7, end)]]
    source.poll(10, 0.0)
    assert source.at_end
    assert source.caught_up  # the broker has not answered yet
    source._lag.ends = {("t", 0): 5, ("t", 1): 7}
    source.poll(10, 0.0)
    assert source.caught_up
    source._lag.ends["t", 1] = 9  # and nothing is read of it
    source.poll(10, 0.0)
    assert source.at_end
    assert not source.caught_up
    assert source.stats.lag == {("t", 0): 0, ("t", 1): 2}


def test_the_end_is_behind_the_marks_of_transactions(source):
    """Two messages and a mark, which is no message but has an offset; the end may be told before they are looked at."""
    source._lag.ends = {("t", 0): 8, ("t", 1): 0}
    source.consumer.script = [[*messages(0, 5, 6), FakeMessage(0, 8, KafkaError(KafkaError._PARTITION_EOF))]]
    source.poll(10, 0.0)
    assert source.stats.lag["t", 0] == 0
    source.consumer.script = [messages(0, 8)]  # the twin: a message, not a mark
    source._lag.ends["t", 0] = 10
    source.poll(10, 0.0)
    assert source.stats.lag["t", 0] == 1


def test_a_batch_is_closed_by_its_bytes(source):
    """10,000 of them; the fourth message fills it."""
    source.consumer.script = [[FakeMessage(0, offset, size=3000)] for offset in range(9)]
    batch = source.poll(500, 5.0)
    assert len(batch) == 4
    assert source.consumer.asked == [1] * 4  # they may be as large as is usual
    source._largest = 3000
    batch = source.poll(500, 5.0)
    assert len(batch) == 4
    assert source.consumer.asked[4:] == [3, 2, 1, 1]  # as many as there is room for, if they are like those before
    assert source.stats.ledger.total().consumed == 8


def test_small_messages_fill_a_batch_by_their_number(source):
    source._largest = 100
    source.consumer.script = [messages(0, *range(30)), messages(0, *range(30, 40))]
    assert len(source.poll(40, 5.0)) == 40
    assert source.consumer.asked == [40, 10]


def test_an_error_is_heard_while_partitions_leave(source):
    refused = FakeMessage(0, 0, KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
    source.consumer.script = [[refused], lambda c: revoke(c, 1) or []]
    with pytest.raises(EdgekitError, match="a client without a name has no right to Read on the topic 't'"):
        source.poll(10, 0.02)


def test_a_position_that_was_missing_under_an_earlier_assignment_says_nothing_of_the_new_one(source):
    source.consumer.logs = {0: (600, 900)}
    before = dict(source.membership.generations)
    assert not source._counts(no_position(0, 400), {**before, ("t", 0): -1})
    assert source._counts(no_position(0, 400), before)


def test_a_partition_that_gets_its_position_while_paused_stays_paused(source):
    source.pause(True)
    source.consumer.asleep.clear()
    source.consumer.logs = {0: (600, 900)}
    source.consumer.script = [[no_position(0, 400)]]
    source.poll(1, 0.0)
    assert source.consumer.asleep == {0}


def test_the_lag_of_a_new_partition_begins_at_what_the_group_has_committed(source):
    source._lag.ends = {("t", 0): 70, ("t", 1): 10}
    source.consumer.stored = {0: 30}
    revoke(source.consumer, 0)
    assign(source.consumer, 0)
    source.poll(1, 0.0)
    assert source.stats.lag["t", 0] == 40
