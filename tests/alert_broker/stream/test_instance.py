"""Static members that a broker refuses: because of an old request of theirs, or because another process has their
instance. On librdkafka's mock cluster, which gives such answers to order."""

import time

import pytest
from confluent_kafka import KafkaError

from alert_broker.stream import config as configuration
from alert_broker.stream import source as module
from alert_broker.stream.source import STALE_SECONDS, Source
from alert_broker.stream.stats import Stats
from edgekit.errors import EdgekitError
from tests.brokers import MockCluster

HEARTBEAT, OFFSET_COMMIT = 12, 8


class EndedError(Exception):
    """Instead of the end of the process."""


@pytest.fixture
def joined(monkeypatch):
    """(cluster, source): a static member with its partition; the end of the process is an EndedError."""

    def end(reason):
        raise EndedError(reason)

    monkeypatch.setattr(module.WATCHDOG, "end", end)
    with MockCluster() as cluster:
        cluster.create_topic("source", 1)
        tables = {
            "source": {"topics": ["source"], "group": "g", "instance": "one"},
            "output": [{"topic": "results"}],
            "kafka": {
                "bootstrap.servers": cluster.address, "session.timeout.ms": 6000, "heartbeat.interval.ms": 100,
            },
        }  # fmt: skip
        source = Source(configuration.parse(tables, "test").check(), Stats())
        poll_until(source, lambda: source.membership.generations)
        yield cluster, source
        source.close()


def poll_until(source, condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        source.poll(1, 0.05)


def never():
    return False


def test_another_process_with_the_same_instance_is_named(joined):
    cluster, source = joined
    cluster.fail(HEARTBEAT, [KafkaError.FENCED_INSTANCE_ID])
    with pytest.raises(EdgekitError, match="another process has joined the group 'g' with the instance 'one'"):
        poll_until(source, never)


def test_a_fence_soon_after_the_end_of_our_own_session_ends_the_process_so_that_it_is_started_again(joined):
    cluster, source = joined
    source.membership._lost_at = time.monotonic() - STALE_SECONDS / 2
    cluster.fail(HEARTBEAT, [KafkaError.FENCED_INSTANCE_ID])
    with pytest.raises(EndedError, match="it may have refused an old request of ours"):
        poll_until(source, never)


def test_a_commit_that_is_refused_as_fenced_is_no_other_process_either(joined):
    """The client is of no use after that, although a later commit would be answered."""
    cluster, source = joined
    source.membership._lost_at = time.monotonic()
    cluster.fail(OFFSET_COMMIT, [KafkaError.FENCED_INSTANCE_ID])
    source.membership.commits.acknowledge({("source", 0): 5})
    with pytest.raises(EndedError, match="it may have refused an old request of ours"):
        poll_until(source, never)


def test_a_session_that_ended_long_ago_is_no_excuse(joined):
    cluster, source = joined
    source.membership._lost_at = time.monotonic() - STALE_SECONDS - 1.0
    cluster.fail(HEARTBEAT, [KafkaError.FENCED_INSTANCE_ID])
    with pytest.raises(EdgekitError, match="another process"):
        poll_until(source, never)


def test_the_end_of_a_session_is_noted(source):
    assert not source.membership.was_lost_within(STALE_SECONDS)
    source.consumer.callbacks["on_lost"](source.consumer, source.consumer.assignment())
    assert source.membership.was_lost_within(STALE_SECONDS)
