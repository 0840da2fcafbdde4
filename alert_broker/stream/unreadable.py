"""Skip record batches that the client cannot read, such as one that inflates beyond `receive.message.max.bytes`.

librdkafka reports such a batch as an error at its first offset, and fetches it again for ever. If nothing else has come
from the partition for `source.unreadable_seconds`, the consumer stops or skips the batch, as `source.unreadable` says.

To skip it, the end of the batch must be found, since only its content says how many records it has. The consumer seeks
further and further ahead, and bisects when it has reached something that is not in the batch. Each offset that was
skipped becomes a dead letter without payload.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from alert_broker.stream.clients import reason_of
from alert_broker.stream.config import SourceSettings
from alert_broker.stream.ledger import Partition
from alert_broker.stream.watchdog import WATCHDOG
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
# The content causes these errors: it cannot be decompressed or parsed, or its checksum is wrong.
UNREADABLE = {
    KafkaError._BAD_COMPRESSION, KafkaError._BAD_MSG, KafkaError._NOT_IMPLEMENTED, KafkaError.INVALID_MSG,
    KafkaError.INVALID_MSG_SIZE, KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.UNSUPPORTED_COMPRESSION_TYPE,
}  # fmt: skip
COMMITTED_SECONDS = 1.0  # to wait for the broker; without its answer, some dead letters may be sent a second time


@dataclass(frozen=True, slots=True)
class UnreadableMessage:
    """Replaces a `confluent_kafka.Message` that cannot be read."""

    where: Partition
    at: int
    reason: str

    def __len__(self) -> int:
        return 0

    def error(self) -> None:
        return None

    def topic(self) -> str:
        return self.where[0]

    def partition(self) -> int:
        return self.where[1]

    def offset(self) -> int:
        return self.at

    def value(self) -> None:
        return None

    def key(self) -> None:
        return None

    def headers(self) -> None:
        return None

    def timestamp(self) -> tuple[int, int]:
        return 0, -1


class Skipped:
    """Messages that cannot be read, in order. The object stores ranges of offsets, because one batch of a hostile
    producer may have many millions of records."""

    def __init__(self) -> None:
        self._ranges: deque[tuple[Partition, range, str]] = deque()

    def __len__(self) -> int:
        return sum(len(offsets) for _, offsets, _ in self._ranges)

    def add(self, where: Partition, offsets: range, reason: str) -> None:
        self._ranges.append((where, offsets, reason))

    def popleft(self) -> UnreadableMessage:
        where, offsets, reason = self._ranges.popleft()
        if len(offsets) > 1:
            self._ranges.appendleft((where, offsets[1:], reason))
        return UnreadableMessage(where, offsets[0], reason)

    def forget(self, where: Partition) -> None:
        self._ranges = deque(item for item in self._ranges if item[0] != where)


@dataclass(slots=True)
class _Search:
    """A batch that cannot be read. base: its first offset; start: the first that was not processed; since: monotonic
    seconds. While its end is searched for, `low` is in the batch, `high` is not, and `probe` was asked for last."""

    base: int
    start: int
    reason: str
    since: float
    low: int = 0
    high: int | None = None
    probe: int | None = None
    step: int = 1


class UnreadableBatches:
    """The thread that polls uses it. `skipped`: messages that must be processed before anything else is read."""

    def __init__(self, consumer: Any, settings: SourceSettings) -> None:
        self._consumer, self._settings = consumer, settings
        self._searches: dict[Partition, _Search] = {}
        self.skipped = Skipped()

    def forget(self, where: Partition) -> None:
        """Forget a partition that was revoked."""
        self._searches.pop(where, None)
        self.skipped.forget(where)

    def take(self, found: Sequence[Message], positions: dict[Partition, int]) -> list[Message]:
        """Return the messages, ends and errors of one call of `consume` without those of an unreadable batch.

        positions: the next offset of each partition from which something was read.
        """
        kept: list[Message] = []
        moved: set[Partition] = set()  # the rest of this call was fetched before the consumer was moved
        for message in found:
            error, offset = message.error(), message.offset()
            topic, number = message.topic(), message.partition()
            if topic is None or number is None or offset is None or offset < 0:
                kept.append(message)
                continue
            where = topic, number
            search = self._searches.get(where)
            if where in moved:
                continue
            if error is not None and error.code() != KafkaError._PARTITION_EOF:
                if error.code() not in UNREADABLE:
                    kept.append(message)
                elif self._failed(where, search, offset, error, positions):
                    moved.add(where)
            elif search is not None and search.probe is not None:
                search.high = search.probe
                self._seek_on(where, search)
                moved.add(where)
            else:
                self._searches.pop(where, None)  # the batch could be read after all
                kept.append(message)
        return kept

    def _failed(
        self, where: Partition, search: _Search | None, base: int, error: KafkaError, positions: dict[Partition, int]
    ) -> bool:
        """Note an error at the offset at which a batch begins; return whether the consumer was moved."""
        now = time.monotonic()
        if search is None or (search.probe is None and search.base != base):
            LOG.warning("%s[%d] cannot be read at offset %d: %s", *where, base, error.str())
            start = max(base, positions.get(where) or self._committed(where))
            self._searches[where] = _Search(base, start, error.str(), now)
            return False
        if search.probe is None:
            if now - search.since < self._settings.unreadable_seconds:
                return False
            if self._settings.unreadable == "stop":
                raise EdgekitError(
                    f"{where[0]}[{where[1]}] cannot be read at offset {base}: {search.reason}; nothing after it was "
                    "committed: raise receive.message.max.bytes in [kafka], or skip it with source.unreadable = 'skip'"
                )
            search.low = search.start
        elif base == search.base:
            search.low = search.probe
        else:
            search.high = base  # the first offset of another batch that cannot be read, which is skipped later
        self._seek_on(where, search)
        return True

    def _seek_on(self, where: Partition, search: _Search) -> None:
        """Ask for the next offset of the search; at its end, for the first offset after the batch."""
        if search.high is not None and search.high - search.low <= 1:
            del self._searches[where]
            reason = f"the record cannot be read: {search.reason}"
            offsets = range(search.start, search.low + 1)
            self.skipped.add(where, offsets, reason)
            LOG.warning("%s[%d]: offsets %d to %d are skipped: %s", *where, offsets[0], offsets[-1], search.reason)
            self._seek(where, search.low + 1)
            return
        if search.high is not None:
            search.probe = (search.low + search.high) // 2
        else:
            # never beyond the end, where the partition has no offset to read from
            search.probe = min(search.low + search.step, max(self._end(where), search.low + 1))
            search.step *= 2
        self._seek(where, search.probe)

    def _committed(self, where: Partition) -> int:
        """Return the offset at which reading began, which may be in the middle of the batch; 0 if it is not known."""
        try:
            with WATCHDOG.limit("committed", COMMITTED_SECONDS):
                (found,) = self._consumer.committed([TopicPartition(*where)], COMMITTED_SECONDS)
        except KafkaException as error:
            LOG.warning("the committed offset of %s[%d] is not known: %s", *where, reason_of(error))
            return 0
        return max(0, int(found.offset))

    def _end(self, where: Partition) -> int:
        known = self._consumer.get_watermark_offsets(TopicPartition(*where), cached=True)
        return int(known[1]) if known else -1

    def _seek(self, where: Partition, offset: int) -> None:
        try:
            self._consumer.seek(TopicPartition(*where, offset))
        except KafkaException as error:
            raise EdgekitError(
                f"{where[0]}[{where[1]}] cannot be moved to offset {offset}: {reason_of(error)}; start again"
            ) from None
