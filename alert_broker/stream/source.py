"""Read batches of messages from Kafka, and tell whether this member still owns them: a partition can be revoked while
its alerts are in flight.

Each assignment of a partition has a number, its assignment generation. A batch remembers the generations in which its
messages were read. If a generation has ended, this member neither publishes nor commits its messages: the next owner
reads them again.

librdkafka never chooses a position by itself (`auto.offset.reset` is "error"). It reports that it has no position, or
that its position is outside the log. So the messages that retention deleted before they were read are counted exactly.
The gaps that compaction and the markers of transactions leave are no losses and do not count.
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
POLL_SECONDS = 0.02  # seconds between checks for requests of the publishing thread
USUAL_BYTES = 65_536  # assumed size of a message before the first one was read
CALL_SECONDS = 60.0  # time limit of a call that has no limit of its own
COMMIT_SECONDS = 120.0  # librdkafka waits for the coordinator (a session) and for its answer (a minute)
COMMITTED_RETRY = 0.1  # seconds between attempts to learn what the group has committed
OFFSET_SECONDS = 3.0  # to wait for an answer about offsets of one partition, in the thread that polls


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
    """The consumer. The thread that made it calls `poll`, `serve` and `close`. The thread that publishes calls `owned`
    and `commit` while it holds the lock `publishing`, so that no partition is revoked between the two calls.

    Only one thread may use the consumer: the binding lets other threads wait until it is not polling, which may never
    happen. The publishing thread therefore sends requests, which the polling thread carries out between polls.
    """

    def __init__(self, config: Config, stats: Stats) -> None:
        self.config, self.stats, self.publishing = config, stats, Lock()
        self._generations: dict[Partition, int] = {}
        self._generation = 0
        self._at_end: set[Partition] = set()
        self._paused = self._closing = self._losing = False
        self._next: dict[Partition, int] = {}
        self._without_position: dict[Partition, int | None] = {}  # and the offset that is outside their log
        self._largest = USUAL_BYTES  # bytes of the largest message so far
        # moves batches in flight on; returns False if the stages have stopped
        self.while_draining: Callable[[], bool] = lambda: True
        self.stopping: Callable[[], bool] = lambda: False  # whether `poll` should return early
        self.cancelled: Callable[[], bool] = lambda: False  # whether the batches in flight were given up
        self._thread = get_ident()
        self._requests: SimpleQueue[Request] = SimpleQueue()
        settings = consumer_settings(config)
        # the defaults of librdkafka, unless [kafka] sets others
        self.session_seconds = float(settings.get("session.timeout.ms", 45_000)) / 1000.0
        self._heartbeat_seconds = float(settings.get("heartbeat.interval.ms", 3_000)) / 1000.0
        self._polled, self._in_doubt_until = math.inf, 0.0
        if config.source.start_at not in ("earliest", "latest"):
            reset_group(config, settings)
        self.consumer = open_consumer(settings)
        self._unreadable = UnreadableBatches(self.consumer, config.source)
        self._lag = Lag(config)
        for topic in config.source.topics:
            partitions_of(self.consumer, topic)  # raises now if the broker or the topic is not there
        self.consumer.subscribe(
            list(config.source.topics), on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost
        )

    # --- called by the thread that polls

    def poll(self, size: int, seconds: float) -> MessageBatch | None:
        """Return up to `size` messages that come within these seconds, or None if none comes. The batch ends earlier
        when it has `batch.bytes`. Its last message may exceed that limit, and so may messages that come with it if they
        are larger than all messages before."""
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
                # another member may own the messages that were read earlier, even if we have the partition again
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
        """Return offsets of a record batch that cannot be read, as messages. Nothing is fetched before all of them were
        returned."""
        skipped = self._unreadable.skipped
        chosen: list[Any] = [skipped.popleft() for _ in range(min(size, len(skipped)))]
        index: dict[Partition, int] = {}
        partition = [index.setdefault(item.where, len(index)) for item in chosen]
        self._next |= {item.where: item.at + 1 for item in chosen}
        return self._batch(chosen, index, partition, [item.at for item in chosen])

    def _batch(
        self, good: Sequence[Message], index: dict[Partition, int], partition: list[int], offset: list[int]
    ) -> MessageBatch:
        """Count these messages as consumed, and return them as a batch."""
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
        """Return whether this member has owned the partition of a message, or of an event, all the time since `before`.
        Other errors always count."""
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
        """Whether no message waits in the assigned partitions, according to the broker. An end that was reached earlier
        proves nothing, because the consumer may be stuck since; it is used only if the broker does not answer."""
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
        """Carry out the requests of the publishing thread."""
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

    # --- called by the thread that publishes

    def owned(self, batch: MessageBatch) -> npt.NDArray[np.bool_]:
        """Return (messages,) whether this member still owns the partition of each message."""
        mine = [
            self._generations.get(where) == generation
            for where, generation in zip(batch.partitions, batch.generations, strict=True)
        ]
        return np.array(mine, np.bool_)[batch.partition]

    def commit(self, offsets: dict[Partition, int]) -> None:
        """Commit these next offsets and wait for the broker. It is no error if the group was rebalanced meanwhile: the
        new owner reads the messages since the last commit again."""
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
        """Return the offsets that the group has committed; -1001 means none. No transaction is open on them. Raises
        KafkaException if the broker does not answer."""
        found: dict[Partition, int] = self._ask(lambda: self._committed(partitions, ADMIN_SECONDS))
        return found

    def _committed(self, partitions: Sequence[Partition], seconds: float) -> dict[Partition, int]:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self._committed_once(partitions, max(0.1, deadline - time.monotonic()))
            except KafkaException as error:  # for example, the coordinator has just been started
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
        """Return the metadata with which a transaction commits offsets. Raises LostError if this member is out of the
        group: brokers accept offsets in a transaction that names no member, whoever owns the partition now.

        If this process was suspended for longer than its session, it may be out of the group without knowing it. The
        method then waits until heartbeats have been answered or refused.
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
        """Notice that the process was suspended: the thread that polls calls this every few milliseconds otherwise."""
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

    # --- callbacks of the client, called inside `poll` and `close`

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
        # librdkafka remembers that a revoked partition was paused, and would never fetch it again
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
        """Wait until batches in flight are published and committed; after `drain_seconds`, take them off the ledger."""
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
        while not self.publishing.acquire(timeout=DRAIN_STEP):  # the thread that holds it may wait for a commit
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
                self._next[where] = position  # also behind the markers of transactions, which are no messages
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
        """Choose a position for the partitions that have none within their log, and read them from there."""
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
        """Count the messages that retention deleted between the position and the beginning of the log."""
        self.stats.ledger.add(where, expired=begin - position)
        text = (
            f"retention deleted {begin - position} offsets of {where[0]}[{where[1]}] before they were read: from "
            f"{position} to {begin - 1}; add members or raise the topic's retention.ms and retention.bytes"
        )
        if self.config.source.on_gap == "stop":
            raise EdgekitError(f"{text}; to go on at offset {begin}, set source.on_gap to go-on")
        LOG.error("%s", text)

    def _refusal(self, error: KafkaError, topic: str | None) -> str:
        """Return the message for an error that waiting does not cure."""
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
    """Return the partition and the offset of a message."""
    offset = message.offset()
    assert offset is not None
    return partition_of(message), offset


def next_offsets(batch: MessageBatch, chosen: npt.NDArray[np.bool_]) -> dict[Partition, int]:
    """Return the offset after the last of these messages, for each partition that has one."""
    after = np.zeros(len(batch.partitions), np.int64)
    np.maximum.at(after, batch.partition[chosen], batch.offset[chosen] + 1)
    return {where: offset for where, offset in zip(batch.partitions, after.tolist(), strict=True) if offset}
