"""The counts and the next offsets of a batch."""

import numpy as np
import pytest

from alert_broker.stream.message_batch import MessageBatch, next_offsets


@pytest.fixture
def batch():
    """Offsets 5, 6 and 8 of partition 0, and 2 of partition 3."""
    partition, offset = np.array([0, 1, 0, 0]), np.array([5, 2, 6, 8])
    return MessageBatch([None] * 4, (("t", 0), ("t", 3)), (1, 2), partition, offset, 0.0)


def test_messages_are_counted_by_partition(batch):
    assert batch.counts(np.array([True, True, True, False])) == {("t", 0): 2, ("t", 3): 1}
    assert batch.counts(np.array([True, False, False, False])) == {("t", 0): 1}


def test_the_next_offset_is_after_the_last_chosen_message(batch):
    assert next_offsets(batch, np.ones(4, np.bool_)) == {("t", 0): 9, ("t", 3): 3}
    assert next_offsets(batch, np.array([True, False, True, False])) == {("t", 0): 7}
