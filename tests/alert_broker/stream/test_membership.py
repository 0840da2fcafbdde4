"""Whose a message is, and what the publishing thread may commit."""

import threading
import time

import pytest
from confluent_kafka import KafkaError

from alert_broker.stream import membership as module
from alert_broker.stream.membership import LostError
from alert_broker.stream.message_batch import next_offsets
from alert_broker.work_budget import CancelledError
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.fake_consumer import assign, messages, revoke


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


def test_a_commit_of_another_thread_is_done_between_polls(source):
    thread = threading.Thread(target=source.membership.commit, args=({("t", 0): 7},))
    thread.start()
    while thread.is_alive():
        source.poll(1, 0.0)
    assert source.consumer.commits == [[("t", 0, 7)]]


LOADING = KafkaError(KafkaError.COORDINATOR_LOAD_IN_PROGRESS)


@pytest.mark.parametrize("error", [LOADING, KafkaError(KafkaError._TRANSPORT)], ids=["loading", "transport"])
def test_a_commit_waits_for_a_coordinator_that_loads(source, monkeypatch, error):
    """As a broker that has just been started again does. Before, the consumer ended."""
    monkeypatch.setattr(module, "COMMIT_RETRY", 0.001)
    source.consumer.commit_errors = [error, error]
    source.membership.commit({("t", 0): 7})
    assert source.consumer.commits == [[("t", 0, 7)]]


def test_a_commit_is_not_tried_for_ever(source, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    source.consumer.commit_errors = [LOADING] * 1000
    with pytest.raises(EdgekitError, match="offsets cannot be committed: Broker: Coordinator load in progress"):
        source.membership.commit({("t", 0): 7})
    assert 60.0 <= now[0] < 62.0  # publish.seconds
    source.consumer.commit_errors = [KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED)]
    with pytest.raises(EdgekitError, match="offsets cannot be committed"):  # the twin: no wait cures this
        source.membership.commit({("t", 0): 7})
    assert now[0] < 62.0
    source.consumer.commit_errors = [LOADING]
    source.membership.cancelled = lambda: True
    with pytest.raises(CancelledError):
        source.membership.commit({("t", 0): 7})


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
