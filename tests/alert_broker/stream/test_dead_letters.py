"""The limits of dead letters, and the digest that distinguishes failures."""

import numpy as np
import pytest

from alert_broker.stream.config import DeadLetters
from alert_broker.stream.dead_letters import (
    LONGEST_CATEGORY,
    MOST_REASON,
    OFFSET,
    OMITTED,
    PARTITION,
    REASON,
    TOPIC,
    DeadLetter,
    DeadLetterLimits,
    category_of,
    outgoing,
    stack_digest,
    without_content,
)
from alert_broker.stream.sender import Outgoing
from edgekit.errors import EdgekitError


def dead_letters(*indices):
    return [DeadLetter(index, f"reason {index}") for index in indices]


def test_in_a_row_across_batches():
    limits = DeadLetterLimits(DeadLetters(max_consecutive=4, max_ratio=1.0))
    limits.check(dead_letters(3, 4), np.ones(5, np.bool_))
    with pytest.raises(EdgekitError, match=r"4 alerts in a row.*reason 1"):
        limits.check(dead_letters(0, 1, 2), np.ones(5, np.bool_))


def test_a_good_alert_breaks_the_row():
    limits = DeadLetterLimits(DeadLetters(max_consecutive=4, max_ratio=1.0))
    for _ in range(20):
        limits.check(dead_letters(2, 3, 4), np.ones(5, np.bool_))


def test_a_share_of_a_full_window_only():
    limits = DeadLetterLimits(DeadLetters(max_ratio=0.5, window=10, max_consecutive=100))
    limits.check(dead_letters(0, 1, 2, 3), np.ones(4, np.bool_))  # all messages failed, but there are too few of them
    limits.check([], np.ones(4, np.bool_))
    with pytest.raises(EdgekitError, match="6 of the last 10"):
        limits.check(dead_letters(0, 1), np.ones(2, np.bool_))


def test_what_leaves_the_window_counts_no_more():
    limits = DeadLetterLimits(DeadLetters(max_ratio=0.3, window=10, max_consecutive=100))
    for _ in range(50):
        limits.check(dead_letters(0, 4, 7), np.ones(10, np.bool_))
    with pytest.raises(EdgekitError, match="4 of the last 10"):
        limits.check(dead_letters(0, 1, 4, 7), np.ones(10, np.bool_))


def test_alerts_of_a_revoked_partition_do_not_count():
    limits = DeadLetterLimits(DeadLetters(max_consecutive=3, max_ratio=1.0))
    theirs = np.array([True, False, True])
    for _ in range(20):
        limits.check(dead_letters(1), theirs)
    limits.check(dead_letters(0, 1, 2), theirs)
    with pytest.raises(EdgekitError, match="3 alerts in a row"):  # the twin: two of the batch before, and this one
        limits.check(dead_letters(0), np.ones(1, np.bool_))


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
    assert category_of("the block at byte 12 ends 3 bytes early: lost") == category_of(
        "the block at byte 7 ends 9 bytes early"
    )
    assert (
        category_of("decodes as lsst.v7_1 with 3.5 of 4 bytes left") == "decodes as lsst.v7_1 with 3.5 of N bytes left"
    )
    assert len(category_of("x" * 5000)) == LONGEST_CATEGORY


FOUND = [(TOPIC, b"t"), (PARTITION, b"3"), (OFFSET, b"17"), (REASON, b"broken")]


def test_what_is_left_of_a_letter_that_no_broker_takes(caplog):
    whole = Outgoing("dead", b"x" * 900, [("survey", b"y" * 900), *FOUND], 4, b"key")
    small = without_content(whole, "dead: too large")
    assert (small.topic, small.value, small.key, small.alert_index) == ("dead", None, None, 4)
    assert small.headers[:-1] == FOUND
    assert small.headers[-1] == (
        OMITTED,
        b"900 bytes, because the broker refuses the dead letter with them: dead: too large",
    )
    assert "t[3], offset 17, is sent without its 900 bytes" in caplog.text
    with pytest.raises(EdgekitError, match="cannot be sent even without its payload: still; raise the broker's limits"):
        without_content(small, "still")


def test_long_reasons_are_cut():
    class Message:
        def headers(self):
            return None

        def value(self):
            return b"v"

        def key(self):
            return None

        def topic(self):
            return "t"

        def partition(self):
            return 0

        def offset(self):
            return 5

    dead_letter = outgoing(DeadLetter(0, "x" * 10**6), Message(), "dead")
    assert len(dict(dead_letter.headers)[REASON]) == MOST_REASON
