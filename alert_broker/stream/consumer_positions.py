"""Track where the consumer reads next in each partition, and count what retention deleted before it was read.

librdkafka never chooses a position by itself (`auto.offset.reset` is "error"). It reports that it has no position, or
that its position is outside the log. So the messages that retention deleted before they were read are counted exactly.
The gaps that compaction and the markers of transactions leave are no losses and do not count.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from confluent_kafka import Consumer, KafkaException, TopicPartition

from alert_broker.stream.clients import reason_of
from alert_broker.stream.config import SourceSettings
from alert_broker.stream.ledger import Ledger, Partition
from alert_broker.stream.watchdog import WATCHDOG
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
OFFSET_SECONDS = 3.0  # to wait for the ends of a log, in the thread that polls


class ConsumerPositions:
    """The thread that polls uses it. next: the next offset of each partition, where it is known."""

    def __init__(self, consumer: Consumer, settings: SourceSettings, ledger: Ledger) -> None:
        self.settings = settings
        self.next: dict[Partition, int] = {}
        self._consumer, self._ledger = consumer, ledger
        self._missing: dict[Partition, int | None] = {}  # the group's offset outside the log, if it has one

    def forget(self, where: Partition) -> None:
        """Forget a partition that was revoked."""
        self.next.pop(where, None)
        self._missing.pop(where, None)

    def note_missing(self, where: Partition, offset: int | None) -> None:
        """Note that the client has no position within the log of this partition. offset: the group's position outside
        the log, if it has one."""
        self._missing[where] = offset

    def note_new_topic(self, topic: str, partitions: Iterable[Partition]) -> None:
        """The topic was deleted and created again: no offset of the old one counts any more."""
        LOG.error("the topic %s was deleted and created again: it is read from its beginning", topic)
        self._missing |= {where: 0 for where in partitions if where[0] == topic}

    def choose(self) -> Iterator[Partition]:
        """Choose a position for the partitions that have none within their log, and yield each of them once the
        consumer reads it from there. If the broker does not answer for one partition, the method returns, so that the
        polling thread waits for one answer at most; the next call begins with the other partitions."""
        for where, offset in list(self._missing.items()):
            try:
                with WATCHDOG.limit("get_watermark_offsets", OFFSET_SECONDS):
                    begin, end = self._consumer.get_watermark_offsets(TopicPartition(*where), timeout=OFFSET_SECONDS)
            except KafkaException as error:
                LOG.warning("%s[%d] is not read yet, as its log is unknown: %s", *where, reason_of(error))
                self._missing[where] = self._missing.pop(where)
                return
            del self._missing[where]
            start = end if offset is None and self.settings.start_at == "latest" else begin
            if offset is not None and offset < begin:
                self._count_expired(where, offset, begin)
            elif offset:  # the log is shorter than it was
                text = "%s[%d] has no offset %d, as its log goes from %d to %d; reading begins at the first"
                LOG.error(text, *where, offset, begin, end)
            self.next[where] = start
            partition = TopicPartition(*where, start)
            self._consumer.incremental_unassign([partition])
            self._consumer.incremental_assign([partition])
            yield where

    def _count_expired(self, where: Partition, position: int, begin: int) -> None:
        """Count the messages that retention deleted between the position and the beginning of the log."""
        self._ledger.add(where, expired=begin - position)
        text = (
            f"retention deleted {begin - position} offsets of {where[0]}[{where[1]}] before they were read: from "
            f"{position} to {begin - 1}; add members or raise the topic's retention.ms and retention.bytes"
        )
        if self.settings.on_gap == "stop":
            raise EdgekitError(f"{text}; to go on at offset {begin}, set source.on_gap to go-on")
        LOG.error("%s", text)
