"""Whose a message is: what was read before a partition was taken away is nobody's, even if the partition comes back."""

import threading
from dataclasses import dataclass

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from alert_broker.stream import config as configuration
from alert_broker.stream import source as module
from alert_broker.stream.source import LostError, Source, next_offsets
from alert_broker.stream.start import start_positions
from alert_broker.stream.stats import Stats
from alert_broker.work_budget import CancelledError
from edgekit.errors import EdgekitError


@dataclass
class FakeMessage:
    """As far as the source looks at one."""

    number: int
    at: int
    fault: KafkaError | None = None
    size: int = 100

    def __len__(self):
        return self.size

    def topic(self):
        return "t"

    def partition(self):
        return self.number

    def offset(self):
        return self.at

    def error(self):
        return self.fault


class FakeConsumer:
    """Gives a list of messages per call; a function in it is called first, as a rebalance would be."""

    def __init__(self):
        self.script, self.callbacks, self.commits, self.asked = [], {}, [], []
        self.member = "m"
        self.starts = {}
        self.stored, self.logs = {}, {}  # offsets of the group; where logs begin and end, empty while no broker answers
        self.assigned, self.asleep = set(), set()  # `asleep`: as in librdkafka, it outlives the assignment

    def subscribe(self, topics, **callbacks):
        self.callbacks = callbacks

    def consume(self, size, seconds):
        self.asked.append(size)
        item = self.script.pop(0) if self.script else []
        return item(self) if callable(item) else item

    def commit(self, offsets, asynchronous):
        self.commits.append([(item.topic, item.partition, item.offset) for item in offsets])

    def incremental_assign(self, partitions):
        self.assigned |= {item.partition for item in partitions}
        self.starts |= {item.partition: item.offset for item in partitions}

    def assignment(self):
        return [TopicPartition("t", number) for number in self.assigned]

    def pause(self, partitions):
        self.asleep |= {item.partition for item in partitions}

    def resume(self, partitions):
        self.asleep -= {item.partition for item in partitions}

    def incremental_unassign(self, partitions):
        self.assigned -= {item.partition for item in partitions}

    def committed(self, partitions, timeout):
        return [TopicPartition("t", item.partition, self.stored.get(item.partition, -1001)) for item in partitions]

    def get_watermark_offsets(self, partition, timeout):
        if not self.logs:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))
        return self.logs[partition.partition]

    def memberid(self):
        return self.member

    def consumer_group_metadata(self):
        return "metadata"


class FakeLag:
    """ends: what the broker would tell."""

    def __init__(self, config):
        self.ends = {}

    def look(self, ours, positions):
        return {at: max(0, self.ends[at] - positions.get(at, 0)) for at in ours if at in self.ends}

    def forget(self, where):
        pass


def assign(consumer, *numbers):
    consumer.callbacks["on_assign"](consumer, [TopicPartition("t", number) for number in numbers])


def revoke(consumer, *numbers):
    consumer.callbacks["on_revoke"](consumer, [TopicPartition("t", number) for number in numbers])
    consumer.assigned -= set(numbers)


def messages(number, *offsets):
    return [FakeMessage(number, offset) for offset in offsets]


@pytest.fixture
def source(monkeypatch):
    consumer = FakeConsumer()
    monkeypatch.setattr(module, "open_consumer", lambda settings: consumer)
    monkeypatch.setattr(module, "Lag", FakeLag)
    monkeypatch.setattr(module, "partitions_of", lambda client, topic: [0, 1])
    tables = {
        "source": {"topics": ["t"], "drain_seconds": 0.05},
        "output": [{"topic": "r"}],
        "batch": {"bytes": 10_000},
        "kafka": {"bootstrap.servers": "x:1"},
    }
    source = Source(configuration.parse(tables, "test").check(), Stats())
    assign(consumer, 0, 1)
    return source


def indices(batch):
    return [(batch.partitions[k][1], offset) for k, offset in zip(batch.partition, batch.offset.tolist(), strict=True)]


def test_a_batch_counts_as_consumed(source):
    source.consumer.script = [messages(0, 5, 6), messages(1, 9)]
    batch = source.poll(3, 1.0)
    assert indices(batch) == [(0, 5), (0, 6), (1, 9)]
    assert source.stats.ledger.total().consumed == 3
    assert source.owned(batch).all()
    assert next_offsets(batch, source.owned(batch)) == {("t", 0): 7, ("t", 1): 10}


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


def test_who_is_out_of_the_group_commits_in_no_transaction(source):
    """The publishing thread asks while it holds the lock: before the loss is known here, and while it is served."""
    assert source.group_metadata() == "metadata"
    source.consumer.member = ""
    with pytest.raises(LostError):
        source.group_metadata()
    source.consumer.member = "m"  # the member keeps its name if only its generation is over
    refused = threading.Event()

    def publish():
        with source.publishing:
            holding.set()
            try:
                source.group_metadata()
            except LostError:
                refused.set()

    holding, thread = threading.Event(), threading.Thread(target=publish)
    thread.start()
    holding.wait()
    source.consumer.callbacks["on_lost"](source.consumer, source.consumer.assignment())
    thread.join()
    assert refused.is_set()
    assert source.group_metadata() == "metadata"  # it has joined again


def test_what_is_in_flight_of_a_revoked_partition_is_off_the_books(source):
    source.consumer.script = [[*messages(0, 5, 6), *messages(1, 9)]]
    batch = source.poll(3, 1.0)
    revoke(source.consumer, 0)
    assign(source.consumer, 0)
    assert source.owned(batch).tolist() == [False, False, True]
    assert next_offsets(batch, source.owned(batch)) == {("t", 1): 10}
    assert source.stats.ledger.total().consumed == 1
    assert source.stats.ledger.to_json()["revoked"] == 2


def test_a_commit_of_another_thread_is_done_between_polls(source):
    from threading import Thread

    thread = Thread(target=source.commit, args=({("t", 0): 7},))
    thread.start()
    while thread.is_alive():
        source.poll(1, 0.0)
    assert source.consumer.commits == [[("t", 0, 7)]]


def test_start_positions_are_checked():
    known = [TopicPartition("t", number) for number in range(3)]
    found = start_positions("0=4, 2=8", known, None)
    assert [(item.partition, item.offset) for item in found] == [(0, 4), (2, 8)]
    with pytest.raises(EdgekitError, match="names partition 7"):
        start_positions("7=1", known, None)


def test_who_was_suspended_waits_until_heartbeats_were_answered(source, monkeypatch):
    """SIGSTOP for longer than the session: the group may go on without this member, which does not know it yet."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += 0.5

    monkeypatch.setattr(module.time, "sleep", sleep)
    source.serve()
    now[0] += source.session_seconds - 1.0
    source.serve()
    assert source.group_metadata() == "metadata"
    assert slept == []
    now[0] += source.session_seconds + 1.0
    source.serve()
    assert source.group_metadata() == "metadata"  # it was not thrown out
    assert 0.5 * len(slept) >= 2.0 * 3.0  # two heartbeats of three seconds
    now[0] += source.session_seconds + 1.0
    source.serve()
    source.cancelled = lambda: True
    with pytest.raises(CancelledError):
        source.group_metadata()
    source.cancelled = lambda: False
    monkeypatch.setattr(module.time, "sleep", lambda seconds: setattr(source.consumer, "member", ""))
    with pytest.raises(LostError):
        source.group_metadata()


# --- partitions without a position


NO_POSITION = KafkaError(KafkaError._AUTO_OFFSET_RESET)


def no_position(number, offset):
    """The group has committed this offset, which is outside the log; None for nothing."""
    return FakeMessage(number, offset, NO_POSITION)


def expired(source):
    return {number: entry.expired for (_, number), entry in source.stats.ledger.entries.items()}


def test_what_retention_deleted_is_counted_and_reading_goes_on_at_the_beginning(source, caplog):
    source.consumer.logs = {0: (600, 900), 1: (0, 7)}
    source.consumer.script = [[*messages(1, 3), no_position(0, 400)], messages(0, 600, 601)]
    assert indices(source.poll(3, 1.0)) == [(1, 3), (0, 600), (0, 601)]
    assert source.consumer.starts[0] == 600
    assert expired(source) == {0: 200, 1: 0}
    total = source.stats.ledger.total()
    assert (total.consumed, total.in_flight) == (3, 3)  # what is gone is in no other column
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "retention deleted 200 offsets of t[0]" in record.getMessage()


def test_a_gap_within_the_log_is_no_loss(source):
    """As compaction and the markers of transactions leave them: offsets 5 to 8 do not exist."""
    source.consumer.script = [messages(0, 4, 9)]
    assert len(source.poll(2, 1.0)) == 2
    assert source.stats.ledger.total().expired == 0


def test_a_gap_can_stop_the_consumer(source):
    from dataclasses import replace

    source.config = replace(source.config, source=replace(source.config.source, on_gap="stop"))
    source.consumer.logs = {0: (600, 900)}
    source.consumer.script = [[no_position(0, 400)]]
    with pytest.raises(EdgekitError, match=r"deleted 200 offsets of t\[0\].*to go on at offset 600, set source.on_gap"):
        source.poll(1, 0.0)
    assert expired(source) == {0: 200}


@pytest.mark.parametrize(("start_at", "start"), [("earliest", 600), ("latest", 900)])
def test_a_group_that_has_committed_nothing_starts_where_it_is_told(source, start_at, start):
    from dataclasses import replace

    source.config = replace(source.config, source=replace(source.config.source, start_at=start_at))
    source.consumer.logs = {0: (600, 900)}
    source.consumer.script = [[no_position(0, None)]]
    source.poll(1, 0.0)
    assert source.consumer.starts[0] == start
    assert source.stats.ledger.total().expired == 0


def test_latest_passes_over_nothing_that_the_group_has_not_read(source):
    """The group has a position: what is left of the log is read, although it would start at the end without one."""
    from dataclasses import replace

    source.config = replace(source.config, source=replace(source.config.source, start_at="latest"))
    source.consumer.logs = {0: (600, 900)}
    source.consumer.script = [[no_position(0, 400)]]
    source.poll(1, 0.0)
    assert source.consumer.starts[0] == 600
    assert expired(source) == {0: 200}


def test_a_log_that_is_shorter_than_it_was_is_read_from_its_beginning(source, caplog):
    source.consumer.logs = {0: (0, 50)}
    source.consumer.script = [[no_position(0, 400)]]
    source.poll(1, 0.0)
    assert source.consumer.starts[0] == 0
    assert source.stats.ledger.total().expired == 0
    assert "t[0] has no offset 400, as its log goes from 0 to 50" in caplog.text


def test_a_log_that_is_unknown_for_now_is_asked_for_again(source):
    source.consumer.script = [[no_position(0, 400)]]
    source.poll(1, 0.0)
    assert source.consumer.starts[0] < 0
    source.consumer.logs = {0: (600, 900)}
    source.poll(1, 0.0)
    source.poll(1, 0.0)
    assert source.consumer.starts[0] == 600
    assert expired(source) == {0: 200}


def test_a_position_that_was_missing_under_an_earlier_assignment_says_nothing_of_the_new_one(source):
    source.consumer.logs = {0: (600, 900)}
    before = dict(source._generations)
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
