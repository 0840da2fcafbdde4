"""Commits in the background, with a consumer whose answers come when the test says so."""

import time

import pytest
from confluent_kafka import KafkaError, KafkaException

from alert_broker.stream.offset_commits import COMMIT_SECONDS, OffsetCommits
from edgekit.errors import EdgekitError

A, B = ("t", 0), ("t", 1)
AWAY = KafkaError(KafkaError._TRANSPORT)
OLD = KafkaError(KafkaError.ILLEGAL_GENERATION)


class Broker:
    """A consumer as far as commits go. answers: what `consume` hands to `commits`, one a call; refused: the error of
    the next commit that is waited for, or that the client itself refuses."""

    def __init__(self):
        self.sent, self.waited, self.answers, self.refused, self.commits = [], [], [], None, None

    def commit(self, offsets, asynchronous):
        (self.sent if asynchronous else self.waited).append(
            {(item.topic, item.partition): item.offset for item in offsets}
        )
        if self.refused is not None:
            error, self.refused = self.refused, None
            raise KafkaException(error)

    def consume(self, number, seconds):
        if self.answers:
            self.commits.answered(self.answers.pop(0), [])
        return []


@pytest.fixture
def now(monkeypatch):
    """now[0]: the time of the monotonic clock."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def broker(now):
    broker = Broker()
    broker.commits = OffsetCommits(broker, 0.1)
    return broker


def test_nobody_waits_and_a_commit_follows_the_answer_to_the_one_before(broker, now):
    commits = broker.commits
    commits.serve()
    assert broker.sent == []  # nothing to commit
    commits.acknowledge({A: 5})
    commits.serve()
    assert broker.sent == [{A: 5}]
    assert commits.batches == 0  # not answered yet
    commits.acknowledge({A: 9, B: 3})
    now[0] += 50.0
    commits.serve()
    assert broker.sent == [{A: 5}]
    commits.answered(None, [])
    assert commits.batches == 1
    commits.serve()
    assert broker.sent == [{A: 5}, {A: 9, B: 3}]
    commits.answered(None, [])
    assert commits.batches == 2
    commits.serve()
    assert len(broker.sent) == 2
    assert broker.waited == []


def test_commits_come_at_most_so_often(broker, now):
    commits = broker.commits
    for number in range(10):
        now[0] += 0.03
        commits.acknowledge({A: number + 1})
        commits.serve()
        if len(broker.sent) > commits.batches and commits._sent is not None:
            commits.answered(None, [])
    assert broker.sent == [{A: 1}, {A: 5}, {A: 9}]


def test_a_commit_can_be_hurried(broker):
    commits = broker.commits
    commits.acknowledge({A: 1})
    commits.serve()
    commits.answered(None, [])
    commits.acknowledge({A: 2})
    commits.serve()
    assert len(broker.sent) == 1
    commits.hurry()
    commits.serve()
    assert broker.sent == [{A: 1}, {A: 2}]


@pytest.mark.parametrize("error", [AWAY, OLD])
def test_a_commit_that_failed_is_sent_again(broker, now, error, caplog):
    """What was acknowledged since is committed with it."""
    commits = broker.commits
    commits.acknowledge({A: 5, B: 7})
    commits.serve()
    commits.acknowledge({A: 9})
    commits.answered(error, [])
    assert commits.batches == 0
    assert "are committed again" in caplog.text
    commits.hurry()
    commits.serve()
    assert len(broker.sent) == 1  # not at once
    now[0] += 0.2
    commits.serve()
    assert broker.sent[1] == {A: 9, B: 7}
    commits.answered(None, [])
    assert commits.batches == 2


def test_a_commit_that_the_client_refuses_is_sent_again(broker, now):
    broker.refused = AWAY
    broker.commits.acknowledge({A: 5})
    broker.commits.serve()
    now[0] += 0.2
    broker.commits.serve()
    assert broker.sent == [{A: 5}, {A: 5}]


def test_commits_that_fail_for_too_long_are_an_error(broker, now):
    commits = broker.commits
    commits.acknowledge({A: 5})
    while now[0] <= 1000.0 + COMMIT_SECONDS:
        commits.serve()
        commits.answered(AWAY, [])
        now[0] += 1.0
    commits.serve()
    with pytest.raises(EdgekitError, match="offsets cannot be committed"):
        commits.answered(AWAY, [])


def test_failures_that_are_long_past_do_not_count(broker, now):
    commits = broker.commits
    for number in range(1, 4):
        commits.acknowledge({A: number})
        commits.serve()
        commits.answered(AWAY, [])
        now[0] += COMMIT_SECONDS / 2
        commits.serve()
        commits.answered(None, [])
    assert commits.batches == 3


def test_an_error_that_waiting_does_not_cure_is_raised_at_once(broker):
    broker.commits.acknowledge({A: 5})
    broker.commits.serve()
    with pytest.raises(EdgekitError, match="published again after a restart"):
        broker.commits.answered(KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED), [])


def test_a_partition_that_was_revoked_is_not_committed_again(broker, now):
    commits = broker.commits
    commits.acknowledge({A: 5, B: 7})
    commits.serve()
    commits.acknowledge({A: 6})
    commits.forget(A)
    commits.answered(OLD, [])
    now[0] += 0.2
    commits.serve()
    assert broker.sent[1] == {B: 7}
    commits.answered(None, [])
    assert commits.batches == 2


def test_batches_whose_partitions_were_all_revoked_are_done(broker, now):
    commits = broker.commits
    commits.acknowledge({A: 5})
    commits.forget(A)
    commits.acknowledge({})
    commits.serve()
    assert commits.batches == 2
    assert broker.sent == []


def test_whoever_has_nothing_to_poll_for_waits_for_the_answer_only_if_the_publisher_waits(broker, now):
    """Else the publisher would wait for ever: answers are heard in polls, and there is none while queues are full."""
    commits = broker.commits
    commits.acknowledge({A: 5})
    commits.serve_idle()
    assert broker.waited == []
    commits.hurry()
    broker.refused = AWAY
    commits.serve_idle()
    assert broker.waited == [{A: 5}]
    assert commits.batches == 0
    commits.hurry()
    commits.serve_idle()
    assert len(broker.waited) == 1  # not again at once
    now[0] += 0.2
    commits.serve_idle()
    assert commits.batches == 1
    assert broker.sent == []


def test_at_a_revocation_the_answer_is_waited_for(broker):
    """The earlier commit's answer comes later, and says nothing."""
    commits = broker.commits
    commits.acknowledge({A: 5, B: 7})
    commits.serve()
    commits.acknowledge({A: 9})
    commits.commit_now()
    assert broker.waited == [{A: 9, B: 7}]
    assert commits.batches == 2
    commits.acknowledge({A: 10})
    commits.answered(AWAY, [])
    assert commits.batches == 2
    commits.hurry()
    commits.serve()
    commits.answered(None, [])
    assert commits.batches == 3


def test_a_commit_at_a_revocation_that_fails_is_sent_again_for_what_is_still_ours(broker, now):
    commits = broker.commits
    commits.acknowledge({A: 5, B: 7})
    broker.refused = OLD
    commits.commit_now()
    assert commits.batches == 0
    commits.forget(A)
    now[0] += 0.2
    commits.serve()
    assert broker.sent == [{B: 7}]


def test_at_the_end_the_answer_is_waited_for(broker, monkeypatch):
    commits = broker.commits
    commits.acknowledge({A: 5})
    broker.answers = [None]
    assert commits.finish(1.0)
    assert broker.sent == [{A: 5}]


def test_the_end_does_not_wait_for_ever(broker, now, monkeypatch):
    broker.commits.acknowledge({A: 5})
    monkeypatch.setattr(Broker, "consume", lambda self, number, seconds: now.__setitem__(0, now[0] + seconds))
    assert not broker.commits.finish(1.0)
    assert now[0] >= 1001.0
