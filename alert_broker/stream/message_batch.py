"""Messages that were read together, and where they were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from confluent_kafka import Message

from alert_broker.stream.ledger import Partition


@dataclass(frozen=True, slots=True)
class MessageBatch:
    """Messages in the order in which they were read. partition: (messages,) index into `partitions`; generations: the
    assignment generation in which each of these partitions was read; offset: (messages,); received: monotonic
    seconds."""

    messages: Sequence[Message]
    partitions: tuple[Partition, ...]
    generations: tuple[int, ...]
    partition: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    received: float

    def __len__(self) -> int:
        return len(self.messages)

    def counts(self, chosen: npt.NDArray[np.bool_]) -> dict[Partition, int]:
        """Return how many of these messages each partition has."""
        numbers = np.bincount(self.partition[chosen], minlength=len(self.partitions)).tolist()
        return {partition: number for partition, number in zip(self.partitions, numbers, strict=True) if number}


def partition_of(message: Message) -> Partition:
    topic, partition = message.topic(), message.partition()
    assert topic is not None
    assert partition is not None
    return topic, partition


def position_of(message: Message) -> tuple[Partition, int]:
    """Return the partition and the offset of a message."""
    offset = message.offset()
    assert offset is not None
    return partition_of(message), offset


def next_offsets(batch: MessageBatch, chosen: npt.NDArray[np.bool_]) -> dict[Partition, int]:
    """Return the offset after the last of these messages, for each partition that has one."""
    after = np.zeros(len(batch.partitions), np.int64)
    np.maximum.at(after, batch.partition[chosen], batch.offset[chosen] + 1)
    return {where: offset for where, offset in zip(batch.partitions, after.tolist(), strict=True) if offset}
