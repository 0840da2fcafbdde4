"""Batches of messages from Kafka, and whose they are: a partition can be taken away while its alerts are in flight.

Each assignment of a partition has a number, its generation. A batch remembers the generation under which its messages
were read; what was read under one that has ended is neither published nor committed by us: the next owner reads it
again.

librdkafka never chooses a position by itself (`auto.offset.reset` is "error"): it tells us that it has none, or that
the one that it has is outside the log. So what retention deleted before it was read is counted exactly. The gaps that
compaction and the markers of transactions leave are no losses and do not count.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Lock, get_ident
from typing import Any

import numpy as np
import numpy.typing as npt
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from alert_broker.stream.clients import (
    ADMIN_SECONDS,
    HOPELESS,
    REBALANCED,
    consumer_settings,
    names,
    open_consumer,
    partitions_of,
    reason_of,
)
from alert_broker.stream.config import Config
from alert_broker.stream.connect import principal
from alert_broker.stream.lag import Lag
from alert_broker.stream.ledger import Partition
from alert_broker.stream.rights import missing_right
from alert_broker.stream.start import reset_group
from alert_broker.stream.stats import Stats
from alert_broker.stream.unreadable import UnreadableBatches
from alert_broker.stream.watchdog import WATCHDOG
from alert_broker.work_budget import CancelledError
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
DRAIN_STEP = 0.005
POLL_SECONDS = 0.02  # between looks at what the publishing thread asks for
USUAL_BYTES = 65_536  # of a message, before one has been seen
CALL_SECONDS = 60.0  # that a call may take which names no limit of its own
COMMIT_SECONDS = 120.0  # librdkafka waits for the coordinator (a session) and for its answer (a minute)
COMMITTED_RETRY = 0.1  # seconds between attempts to learn what the group has committed
OFFSET_SECONDS = 3.0  # to wait for an answer about offsets of one partition, in the thread that polls


@dataclass(frozen=True, slots=True)
class MessageBatch:
    """Messages in the order in which they came. partition: (messages,) index into `partitions`, each of which was ours
    under its number in `epochs`; offset: (messages,); received: monotonic seconds."""

    messages: Sequence[Message]
    partitions: tuple[Partition, ...]
    generations: tuple[int, ...]
    partition: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    received: float

    def __len__(self) -> int:
        return len(self.messages)

    def counts(self, chosen: npt.NDArray[np.bool_]) -> dict[Partition, int]:
        """The number of these messages in each partition."""
        numbers = np.bincount(self.partition[chosen], minlength=len(self.partitions)).tolist()
        return {partition: number for partition, number in zip(self.partitions, numbers, strict=True) if number}


class Request:
    """A request of another thread to the thread that polls."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._done = call, Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def serve(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self) -> Any:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class LostError(Exception):
    """This member is out of its group; another member will read its messages again."""


class Source:
    """The consumer. The thread that made it calls `poll`, `serve` and `close`; the one that publishes calls `owned` and
    `commit`, while it holds `publishing`, so that no partition leaves between the look and the deed.

    Only one thread may touch the consumer: the binding lets others wait until it is not polling, which may be never.
    What the publishing thread needs of it is a request, served between polls.
    """

    def __init__(self, config: Config, stats: Stats) -> None:
        self.config, self.stats, self.publishing = config, stats, Lock()
        self._generations: dict[Partition, int] = {}
        self._generation = 0
        self._at_end: set[Partition] = set()
        self._paused = self._closing = self._losing = False
        self._next: dict[Partition, int] = {}
        self._without_position: dict[Partition, int | None] = {}  # with the offset that is not in their log
        self._largest = USUAL_BYTES  # bytes of a message, so far
        # keeps what is in flight moving; False if it has stopped
        self.while_draining: Callable[[], bool] = lambda: True
        self.stopping: Callable[[], bool] = lambda: False  # whether `poll` should return early
        self.cancelled: Callable[[], bool] = lambda: False  # whether what is in flight was given up
        self._thread = get_ident()
        self._requests: SimpleQueue[Request] = SimpleQueue()
        settings = consumer_settings(config)
        # of librdkafka, where [kafka] does not say
        self.session_seconds = float(settings.get("session.timeout.ms", 45_000)) / 1000.0
        self._heartbeat_seconds = float(settings.get("heartbeat.interval.ms", 3_000)) / 1000.0
        self._polled, self._in_doubt_until = math.inf, 0.0
        if config.source.start_at not in ("earliest", "latest"):
            reset_group(config, settings)
        self.consumer = open_consumer(settings)
        self._unreadable = UnreadableBatches(self.consumer, config.source)
        self._lag = Lag(config)
        for topic in config.source.topics:
            partitions_of(self.consumer, topic)  # a broker or a topic that is not there shows now
        self.consumer.subscribe(
            list(config.source.topics), on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost
        )

    # --- one thread

    def poll(self, size: int, seconds: float) -> MessageBatch | None:
        """Up to `size` messages within these seconds, or until they have `batch.bytes`: the last one may go over it,
        and so may others that come with it if they are larger than any before. None where there were none."""
        if self._unreadable.skipped:
            self.serve()
            return self._skipped(size)
        messages: list[Message] = []
        room = self.config.batch.bytes
        deadline = time.monotonic() + seconds
        before = dict(self._generations)
        self._choose_positions()
        while True:
            self.serve()
            slice_seconds = min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
            number = min(size - len(messages), max(1, room // self._largest))
            with WATCHDOG.limit("consume", CALL_SECONDS):
                found = self._unreadable.take(self.consumer.consume(number, slice_seconds), self._next)
            sizes = [len(message) for message in found]
            self._largest, room = max(self._largest, *sizes, 0), room - sum(sizes)
            if self._generations != before:
                # what was read earlier may be another's now, even if the partition is ours again
                messages = [item for item in messages if self._counts(item, before)]
            messages += found
            if self._generations != before:
                break
            if len(messages) >= size or room <= 0 or time.monotonic() >= deadline or self.stopping():
                break
        good: list[Message] = []
        index: dict[Partition, int] = {}
        partition, offset = [], []
        for message in messages:
            if (fault := message.error()) is not None:
                self._note_error(fault, message)
                continue
            where, number = position_of(message)
            if where not in self._generations:  # read before the partition was taken away
                continue
            partition.append(index.setdefault(where, len(index)))
            offset.append(number)
            good.append(message)
            self._at_end.discard(where)
            self._next[where] = number + 1
        if not good:
            self._look_at_lag()
            return None
        return self._batch(good, index, partition, offset)

    def _skipped(self, size: int) -> MessageBatch:
        """Offsets of a batch that cannot be read, as messages. Nothing is fetched before all of them were given."""
        skipped = self._unreadable.skipped
        chosen: list[Any] = [skipped.popleft() for _ in range(min(size, len(skipped)))]
        index: dict[Partition, int] = {}
        partition = [index.setdefault(item.where, len(index)) for item in chosen]
        self._next |= {item.where: item.at + 1 for item in chosen}
        return self._batch(chosen, index, partition, [item.at for item in chosen])

    def _batch(
        self, good: Sequence[Message], index: dict[Partition, int], partition: list[int], offset: list[int]
    ) -> MessageBatch:
        """These messages, counted as consumed."""
        batch = MessageBatch(
            good,
            tuple(index),
            tuple(self._generations[where] for where in index),
            np.array(partition, np.int64),
            np.array(offset, np.int64),
            time.monotonic(),
        )
        for where, number in batch.counts(np.ones(len(batch), np.bool_)).items():
            self.stats.ledger.add(where, consumed=number)
        self._look_at_lag()
        return batch

    def _counts(self, message: Message, before: Mapping[Partition, int]) -> bool:
        """Whether a message, or an event of a partition, is of one that has been ours all the time since; an error is
        heard in any case."""
        error = message.error()
        if error is not None and error.code() not in (KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET):
            return True
        where = partition_of(message)
        return where in before and before[where] == self._generations.get(where)

    @property
    def at_end(self) -> bool:
        """Whether at least one partition is assigned and all assigned partitions were read to their end."""
        return bool(self._generations) and self._at_end >= set(self._generations)

    @property
    def caught_up(self) -> bool:
        """Whether nothing waits in the partitions that are ours, as the broker has it; that we were at the end once
        says nothing, as we may have been stuck since. It must do where the broker does not answer."""
        lag = self.stats.lag
        return all(not lag[where] if where in lag else where in self._at_end for where in self._generations)

    def pause(self, paused: bool) -> None:
        """Stop fetching, or resume. `poll` must still be called, so that this member stays in the group."""
        if paused != self._paused:
            with WATCHDOG.limit("pause", CALL_SECONDS):
                assigned = self.consumer.assignment()
                (self.consumer.pause if paused else self.consumer.resume)(assigned)
            self._paused = self.stats.paused = paused

    def serve(self) -> None:
        """Do what the publishing thread has requested."""
        self._note_suspension()
        while True:
            try:
                self._requests.get_nowait().serve()
            except Empty:
                return

    def close(self) -> None:
        """Leave the group. Batches that are still in flight are never published."""
        self._closing = True
        with WATCHDOG.limit("close", CALL_SECONDS):
            self.consumer.close()

    # --- the thread that publishes

    def owned(self, batch: MessageBatch) -> npt.NDArray[np.bool_]:
        """(messages,) whether this member still owns each message's partition."""
        mine = [
            self._generations.get(where) == generation
            for where, generation in zip(batch.partitions, batch.generations, strict=True)
        ]
        return np.array(mine, np.bool_)[batch.partition]

    def commit(self, offsets: dict[Partition, int]) -> None:
        """Commit these next offsets and wait for the broker. If the group was rebalanced meanwhile, that is no error:
        the new owner reads again what was published since the last commit."""
        positions = [TopicPartition(topic, number, offset) for (topic, number), offset in offsets.items()]
        try:
            results = self._ask(lambda: self._commit(positions))
            errors = [item.error for item in results or () if item.error is not None]
        except KafkaException as error:
            errors = [error.args[0]]
        for fault in errors:
            if fault.code() in REBALANCED:
                LOG.warning("offsets were not committed, as the group has a new generation: %s", fault.str())
            else:
                raise EdgekitError(
                    f"offsets cannot be committed: {fault.str()}; what was published since the last commit will be "
                    "published again after a restart"
                )

    def _commit(self, positions: list[TopicPartition]) -> list[TopicPartition] | None:
        with WATCHDOG.limit("commit", COMMIT_SECONDS):
            return self.consumer.commit(offsets=positions, asynchronous=False)

    def committed(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """What the group has committed; -1001 for nothing. No transaction is open on it. KafkaException if the broker
        does not answer."""
        found: dict[Partition, int] = self._ask(lambda: self._committed(partitions, ADMIN_SECONDS))
        return found

    def _committed(self, partitions: Sequence[Partition], seconds: float) -> dict[Partition, int]:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self._committed_once(partitions, max(0.1, deadline - time.monotonic()))
            except KafkaException as error:  # such as a coordinator that has just been started
                if error.args[0].code() in HOPELESS or time.monotonic() > deadline:
                    raise
                time.sleep(COMMITTED_RETRY)

    def _committed_once(self, partitions: Sequence[Partition], seconds: float) -> dict[Partition, int]:
        with WATCHDOG.limit("committed", seconds):
            found = self.consumer.committed([TopicPartition(*where) for where in partitions], timeout=seconds)
        if errors := [item.error for item in found if item.error is not None]:
            raise KafkaException(errors[0])
        return {(item.topic, item.partition): item.offset for item in found}

    def group_metadata(self) -> Any:
        """What a transaction needs to commit our offsets. LostError if this member is out of the group: brokers accept
        offsets in a transaction that names no member, whoever owns the partition now.

        If this process was suspended for longer than its session, it may be out of the group without knowing it. Then
        this waits until heartbeats have been answered, or refused.
        """

        def ask() -> Any:
            if self._losing or not self.consumer.memberid():
                raise LostError("the group goes on without this member")
            return None if time.monotonic() < self._in_doubt_until else self.consumer.consumer_group_metadata()

        while (found := self._ask(ask)) is None:
            if self.cancelled():
                raise CancelledError
            time.sleep(POLL_SECONDS)
        return found

    def _note_suspension(self) -> None:
        """Called by the thread that polls, every few milliseconds unless the whole process is suspended."""
        now = time.monotonic()
        if now - self._polled > self.session_seconds:
            LOG.warning("this process was suspended for %.0f s: another member may have taken over", now - self._polled)
            self._in_doubt_until = now + 2.0 * self._heartbeat_seconds
        self._polled = now

    def _ask(self, call: Callable[[], Any]) -> Any:
        if get_ident() == self._thread:
            return call()
        self._requests.put(request := Request(call))
        return request.wait()

    # --- called back from poll and close

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for item in partitions:
            self._generation += 1
            self._generations[item.topic, item.partition] = self._generation
            self._at_end.discard((item.topic, item.partition))
            self._lag.forget((item.topic, item.partition))
        self._note_committed([(item.topic, item.partition) for item in partitions])
        LOG.info("assigned %s", names(partitions))
        self.stats.ready = True
        consumer.incremental_assign(partitions)
        # librdkafka remembers what was paused when a partition left, and would never fetch it again
        (consumer.pause if self._paused else consumer.resume)(partitions)

    def _note_committed(self, partitions: Sequence[Partition]) -> None:
        """Learn where reading will begin, for the lag of partitions that are not read yet."""
        try:
            found = self._committed(partitions, OFFSET_SECONDS)
        except KafkaException as error:
            LOG.warning("%d partitions have no lag until they are read: %s", len(partitions), reason_of(error))
            return
        self._next |= {where: offset for where, offset in found.items() if offset >= 0}

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Let batches in flight be published and committed; after `drain_seconds`, take them off the ledger."""
        with WATCHDOG.limit("on_revoke", math.inf):
            self._drain(partitions)
            self._give_up(partitions)

    def _drain(self, partitions: list[TopicPartition]) -> None:
        ours = [(item.topic, item.partition) for item in partitions]
        deadline = time.monotonic() + (0.0 if self._closing else self.config.source.drain_seconds)
        entries = self.stats.ledger.entries
        while time.monotonic() < deadline and any(entries[item].in_flight for item in ours if item in entries):
            self.serve()
            if not self.while_draining():
                break
            time.sleep(DRAIN_STEP)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        LOG.warning("lost %s: others own them already", names(partitions))
        self._losing = True
        try:
            with WATCHDOG.limit("on_lost", math.inf):
                self._give_up(partitions)
        finally:
            self._losing = False

    def _give_up(self, partitions: list[TopicPartition]) -> None:
        while not self.publishing.acquire(timeout=DRAIN_STEP):  # its holder may be waiting for a commit
            self.serve()
        try:
            for item in partitions:
                where = (item.topic, item.partition)
                self._generations.pop(where, None)
                self._at_end.discard(where)
                self.stats.lag.pop(where, None)
                self._next.pop(where, None)
                self._unreadable.forget(where)
                self._without_position.pop(where, None)
                self._lag.forget(where)
                if number := self.stats.ledger.revoke(where):
                    LOG.warning("%d alerts of %s[%d] were in flight and go to its next owner", number, *where)
        finally:
            self.publishing.release()
        LOG.info("revoked %s", names(partitions))
        self.stats.ready = bool(self._generations)

    def _note_error(self, error: KafkaError, message: Message) -> None:
        if error.code() == KafkaError._PARTITION_EOF:
            where, position = position_of(message)
            if where in self._generations:
                self._at_end.add(where)
                self._next[where] = position  # behind the markers of transactions, too, which are no messages
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
            where = partition_of(message)
            if where in self._generations:
                self._without_position[where] = message.offset()
                self._choose_positions()
        elif error.code() in HOPELESS or error.fatal():
            raise EdgekitError(self._refusal(error, message.topic()))
        else:
            LOG.warning("%s", error.str())

    def _choose_positions(self) -> None:
        """Start to read the partitions that have no position, or none within their log."""
        for where, position in list(self._without_position.items()):
            try:
                with WATCHDOG.limit("get_watermark_offsets", OFFSET_SECONDS):
                    begin, end = self.consumer.get_watermark_offsets(TopicPartition(*where), timeout=OFFSET_SECONDS)
            except KafkaException as error:
                LOG.warning("%s[%d] is not read yet, as its log is unknown: %s", *where, reason_of(error))
                continue  # until the next poll
            del self._without_position[where]
            start = end if position is None and self.config.source.start_at == "latest" else begin
            if position is not None and position < begin:
                self._count_expired(where, position, begin)
            elif position is not None:  # the log is shorter than it was
                text = "%s[%d] has no offset %d, as its log goes from %d to %d; reading begins at the first"
                LOG.error(text, *where, position, begin, end)
            self._next[where] = start
            self._at_end.discard(where)
            partition = TopicPartition(*where, start)
            self.consumer.incremental_unassign([partition])
            self.consumer.incremental_assign([partition])
            if self._paused:
                self.consumer.pause([partition])

    def _count_expired(self, where: Partition, position: int, begin: int) -> None:
        """Retention deleted what is between the position and the beginning of the log."""
        self.stats.ledger.add(where, expired=begin - position)
        text = (
            f"retention deleted {begin - position} offsets of {where[0]}[{where[1]}] before they were read: from "
            f"{position} to {begin - 1}; add members or raise the topic's retention.ms and retention.bytes"
        )
        if self.config.source.on_gap == "stop":
            raise EdgekitError(f"{text}; to go on at offset {begin}, set source.on_gap to go-on")
        LOG.error("%s", text)

    def _refusal(self, error: KafkaError, topic: str | None) -> str:
        """What to say about an error that no waiting cures."""
        who = principal(self.config.kafka)
        if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            return missing_right(who, "Read", f"group {self.config.source.group!r}")
        if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED and topic:
            return missing_right(who, "Read", f"topic {topic!r}")
        return f"the broker refuses to be read: {error.str()}{f' ({topic})' if topic else ''}"

    def _look_at_lag(self) -> None:
        self.stats.lag = self._lag.look(self._generations, self._next)


def partition_of(message: Message) -> Partition:
    topic, partition = message.topic(), message.partition()
    assert topic is not None
    assert partition is not None
    return topic, partition


def position_of(message: Message) -> tuple[Partition, int]:
    """The partition and the offset of a message that was read."""
    offset = message.offset()
    assert offset is not None
    return partition_of(message), offset


def next_offsets(batch: MessageBatch, chosen: npt.NDArray[np.bool_]) -> dict[Partition, int]:
    """The offset after the last of these messages, for each partition that has one."""
    after = np.zeros(len(batch.partitions), np.int64)
    np.maximum.at(after, batch.partition[chosen], batch.offset[chosen] + 1)
    return {where: offset for where, offset in zip(batch.partitions, after.tolist(), strict=True) if offset}
