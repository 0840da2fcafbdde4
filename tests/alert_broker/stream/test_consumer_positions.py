"""Partitions without a position: where reading begins, and what is counted as deleted."""

from dataclasses import replace

import pytest

from edgekit.errors import EdgekitError
from tests.alert_broker.stream.fake_consumer import indices, messages, no_position


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
    source.positions.settings = replace(source.positions.settings, on_gap="stop")
    source.consumer.logs = {0: (600, 900)}
    source.consumer.script = [[no_position(0, 400)]]
    with pytest.raises(EdgekitError, match=r"deleted 200 offsets of t\[0\].*to go on at offset 600, set source.on_gap"):
        source.poll(1, 0.0)
    assert expired(source) == {0: 200}


@pytest.mark.parametrize(("start_at", "start"), [("earliest", 600), ("latest", 900)])
def test_a_group_that_has_committed_nothing_starts_where_it_is_told(source, start_at, start):
    source.positions.settings = replace(source.positions.settings, start_at=start_at)
    source.consumer.logs = {0: (600, 900)}
    source.consumer.script = [[no_position(0, None)]]
    source.poll(1, 0.0)
    assert source.consumer.starts[0] == start
    assert source.stats.ledger.total().expired == 0


def test_latest_passes_over_nothing_that_the_group_has_not_read(source):
    """The group has a position: what is left of the log is read, although it would start at the end without one."""
    source.positions.settings = replace(source.positions.settings, start_at="latest")
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


def test_the_polling_thread_waits_for_one_unknown_log_at_most(source):
    """While no broker answers, each question takes seconds. Then a partition with an answer is not kept waiting by one
    without."""
    source.consumer.script = [[no_position(0, 400), no_position(1, 400)]]
    source.poll(1, 0.0)
    source.consumer.asked_logs.clear()
    source.poll(1, 0.0)
    assert len(source.consumer.asked_logs) == 1
    source.consumer.logs = {1: (600, 900)}
    for _ in range(3):
        source.poll(1, 0.0)
    assert source.consumer.starts[1] == 600
    assert source.consumer.starts[0] < 0


@pytest.mark.parametrize(("begin", "gone"), [(0, 0), (7, 7)])
def test_a_topic_that_was_created_again_is_read_from_its_beginning(source, caplog, begin, gone):
    """Also where reading begins at the end without a position, and where the old offset exists in the new topic."""
    source.positions.settings = replace(source.positions.settings, start_at="latest")
    source.consumer.logs = {0: (begin, 900), 1: (begin, 900)}
    source.consumer.script = [messages(0, 400)]
    assert indices(source.poll(1, 1.0)) == [(0, 400)]
    source._topic_ids.new, source.membership._drain_seconds = ["t"], 0.0
    source.consumer.script = [messages(0, begin)]
    assert indices(source.poll(1, 1.0)) == [(0, begin)]
    assert source.consumer.starts == {0: begin, 1: begin}
    assert source.stats.ledger.total().expired == 2 * gone
    assert "the topic t was deleted and created again" in caplog.text


def test_another_topic_that_was_created_again_changes_nothing(source):
    source.consumer.logs = {0: (0, 900)}
    source._topic_ids.new = ["other"]
    source.consumer.script = [messages(0, 400)]
    assert indices(source.poll(1, 1.0)) == [(0, 400)]
    assert all(start < 0 for start in source.consumer.starts.values())  # where the group goes on
