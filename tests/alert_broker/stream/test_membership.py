"""Whose a message is, and what the publishing thread may commit."""

import threading
import time

import pytest
from confluent_kafka import KafkaError, KafkaException

from alert_broker.stream.membership import LostError
from alert_broker.stream.message_batch import next_offsets
from alert_broker.work_budget import CancelledError
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.fake_consumer import assign, messages, revoke
from tests.alert_broker.stream.waiting import wait_for


def test_who_is_out_of_the_group_commits_in_no_transaction(source):
    """The publishing thread asks while it holds the lock: before the loss is known here, and while it is served."""
    assert source.membership.group_metadata() == "metadata"
    source.consumer.member = ""
    with pytest.raises(LostError):
        source.membership.group_metadata()
    source.consumer.member = "m"  # the member keeps its name if only its generation is over
    refused = threading.Event()

    def publish():
        with source.membership.publishing:
            holding.set()
            try:
                source.membership.group_metadata()
            except LostError:
                refused.set()

    holding, thread = threading.Event(), threading.Thread(target=publish)
    thread.start()
    holding.wait()
    source.consumer.callbacks["on_lost"](source.consumer, source.consumer.assignment())
    thread.join()
    assert refused.is_set()
    assert source.membership.group_metadata() == "metadata"  # it has joined again


def test_what_is_in_flight_of_a_revoked_partition_is_off_the_books(source):
    source.consumer.script = [[*messages(0, 5, 6), *messages(1, 9)]]
    batch = source.poll(3, 1.0)
    revoke(source.consumer, 0)
    assign(source.consumer, 0)
    assert source.membership.owned(batch).tolist() == [False, False, True]
    assert next_offsets(batch, source.membership.owned(batch)) == {("t", 1): 10}
    assert source.stats.ledger.total().consumed == 1
    assert source.stats.ledger.to_json()["revoked"] == 2


def test_what_is_acknowledged_is_committed_between_polls(source):
    source.membership.commits.acknowledge({("t", 0): 7})
    source.poll(1, 0.0)
    assert source.consumer.commits == [[("t", 0, 7)]]


def test_what_is_acknowledged_is_committed_before_its_partition_is_revoked(source):
    source.membership.commits.acknowledge({("t", 0): 7, ("t", 1): 9})
    revoke(source.consumer, 0)
    assert source.consumer.commits == [[("t", 0, 7), ("t", 1, 9)]]
    source.membership.commits.acknowledge({("t", 1): 12})
    source.consumer.callbacks["on_lost"](source.consumer, source.consumer.assignment())
    source.poll(1, 0.0)
    assert len(source.consumer.commits) == 1  # another member owns what was lost


def test_batches_in_flight_of_a_revoked_partition_have_time_to_finish(source):
    """The publishing thread sees that they are waited for."""
    source.consumer.script = [messages(0, 5, 6)]
    source.poll(2, 1.0)
    seen = []

    def keep_moving():
        seen.append(source.membership.draining)
        source.stats.ledger.add(("t", 0), published=2)
        source.membership.commits.acknowledge({("t", 0): 7})
        return True

    source.membership.while_draining = keep_moving
    revoke(source.consumer, 0)
    assert seen == [True]
    assert not source.membership.draining
    assert source.consumer.commits == [[("t", 0, 7)]]
    assert source.stats.ledger.revoked == 0


def test_a_commit_that_fails_while_a_partition_is_revoked_is_not_sent_again_at_once(source, monkeypatch):
    source.consumer.script = [messages(0, 5, 6)]
    source.poll(2, 1.0)
    source.membership.commits.acknowledge({("t", 0): 6})
    tried = []

    def commit(offsets, asynchronous):
        tried.append(asynchronous)
        raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    monkeypatch.setattr(source.consumer, "commit", commit)
    source.membership._drain_seconds = 0.35
    revoke(source.consumer, 0)
    assert 2 <= len(tried) <= 6  # ten times a second at most, and once at the end
    assert not any(tried)


@pytest.mark.parametrize("in_time", [True, False])
def test_what_is_in_flight_of_a_topic_that_was_created_again_is_published_before_its_beginning_is_committed(
    source, caplog, in_time
):
    """Else the old topic's offset would be committed in the new one. What is not published in time is off the books."""
    source.consumer.logs = {0: (0, 9), 1: (0, 9)}
    source.consumer.script = [messages(0, 5, 6)]
    old = source.poll(2, 1.0)

    def keep_moving():
        source.stats.ledger.add(("t", 0), published=2 * in_time)
        source.membership.commits.acknowledge(next_offsets(old, source.membership.owned(old)) if in_time else {})
        return in_time

    source.membership.while_draining = keep_moving
    source._topic_ids.new = ["t"]
    source.consumer.script = [messages(0, 0)]
    new = source.poll(1, 1.0)
    assert source.consumer.commits == [[("t", 0, 0), ("t", 1, 0)]]
    assert not source.membership.owned(old).any()
    assert source.membership.owned(new).all()
    assert source.stats.ledger.revoked == (0 if in_time else 2)
    assert ("2 alerts of the old t[0] were not published in time" in caplog.text) == (not in_time)


def test_a_topic_that_was_created_again_may_have_fewer_partitions(source, caplog):
    """The commit of their beginning fails, and the consumer goes on. Planted: another commit that fails so ends it."""
    gone = KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)
    source.consumer.commit_errors = [gone]
    source.consumer.logs = {0: (0, 9)}
    source._topic_ids.new = ["t"]
    source.consumer.script = [messages(0, 0)]
    assert source.poll(1, 1.0) is not None
    assert "the beginning of the new t is not committed" in caplog.text
    source.membership.commits.acknowledge({("t", 0): 1})
    source.consumer.commit_errors = [gone]
    with pytest.raises(EdgekitError, match="offsets cannot be committed"):
        wait_for(lambda: source.poll(1, 0.0))


LOADING = KafkaError(KafkaError.COORDINATOR_LOAD_IN_PROGRESS)


@pytest.mark.parametrize("error", [LOADING, KafkaError(KafkaError._TRANSPORT)], ids=["loading", "transport"])
def test_a_commit_waits_for_a_coordinator_that_loads(source, error):
    """As a broker that has just been started again does. Before, the consumer ended."""
    source.consumer.commit_errors = [error, error]
    source.membership.commits.acknowledge({("t", 0): 7})
    wait_for(lambda: source.poll(1, 0.0) or source.consumer.commits)
    assert source.consumer.commit_errors == []
    assert source.consumer.commits == [[("t", 0, 7)]]


def test_who_was_suspended_waits_until_heartbeats_were_answered(source, monkeypatch):
    """SIGSTOP for longer than the session: the group may go on without this member, which does not know it yet."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += 0.5

    monkeypatch.setattr(time, "sleep", sleep)
    source.serve()
    now[0] += source.membership.session_seconds - 1.0
    source.serve()
    assert source.membership.group_metadata() == "metadata"
    assert slept == []
    now[0] += source.membership.session_seconds + 1.0
    source.serve()
    assert source.membership.group_metadata() == "metadata"  # it was not thrown out
    assert 0.5 * len(slept) >= 2.0 * 3.0  # two heartbeats of three seconds
    now[0] += source.membership.session_seconds + 1.0
    source.serve()
    source.membership.cancelled = lambda: True
    with pytest.raises(CancelledError):
        source.membership.group_metadata()
    source.membership.cancelled = lambda: False
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(source.consumer, "member", ""))
    with pytest.raises(LostError):
        source.membership.group_metadata()
