"""The limits of dead letters, and what tells one failure from another."""

import pytest

from alert_broker.stream.brokers import MockCluster
from alert_broker.stream.config import DeadLetters
from alert_broker.stream.dead_letters import Letter, Limits, kind_of, redrive, stack_digest
from edgekit.errors import EdgekitError


def letters(*places):
    return [Letter(place, f"reason {place}") for place in places]


def test_in_a_row_across_batches():
    limits = Limits(DeadLetters(max_consecutive=4, max_ratio=1.0))
    limits.check(letters(3, 4), 5)
    with pytest.raises(EdgekitError, match=r"4 alerts in a row.*reason 1"):
        limits.check(letters(0, 1, 2), 5)


def test_a_good_alert_breaks_the_row():
    limits = Limits(DeadLetters(max_consecutive=4, max_ratio=1.0))
    for _ in range(20):
        limits.check(letters(2, 3, 4), 5)


def test_a_share_of_a_full_window_only():
    limits = Limits(DeadLetters(max_ratio=0.5, window=10, max_consecutive=100))
    limits.check(letters(0, 1, 2, 3), 4)  # all of them, but of too few
    limits.check([], 4)
    with pytest.raises(EdgekitError, match="6 of the last 10"):
        limits.check(letters(0, 1), 2)


def test_what_leaves_the_window_counts_no_more():
    limits = Limits(DeadLetters(max_ratio=0.3, window=10, max_consecutive=100))
    for _ in range(50):
        limits.check(letters(0, 4, 7), 10)
    with pytest.raises(EdgekitError, match="4 of the last 10"):
        limits.check(letters(0, 1, 4, 7), 10)


def failing(number):
    return {}[number]


def other(number):
    return {}[number]


def digest(call, number):
    try:
        call(number)
    except KeyError as error:
        return stack_digest(error)
    raise AssertionError


def test_stack_digests_are_of_the_place():
    assert digest(failing, 1) == digest(failing, 2) != digest(other, 1)


def test_reasons_are_counted_without_their_numbers():
    assert kind_of("the block at byte 12 ends 3 bytes early: lost") == kind_of("the block at byte 7 ends 9 bytes early")


def test_a_topic_of_dead_letters_that_is_not_there_is_said():
    with MockCluster() as cluster:
        settings = {"bootstrap.servers": cluster.address, "allow.auto.create.topics": False}
        with pytest.raises(EdgekitError, match="not-there cannot be read"):
            redrive(settings, DeadLetters(topic="not-there"), group="g")
