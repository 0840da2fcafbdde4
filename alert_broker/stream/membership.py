"""This consumer as a member of its group: which partitions are assigned to it, and which offsets the group commits.

Each assignment of a partition has a number, its assignment generation. A batch remembers the generations in which its
messages were read. If a generation has ended, this member neither publishes nor commits its messages: the next owner
reads them again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from confluent_kafka import Consumer, KafkaException, TopicPartition

from alert_broker.stream.clients import ADMIN_SECONDS, HOPELESS, names, reason_of
from alert_broker.stream.config import Config, Secret
from alert_broker.stream.ledger import Partition
from alert_broker.stream.message_batch import MessageBatch
from alert_broker.stream.offset_commits import OffsetCommits
from alert_broker.stream.polling_thread import PollingThread
from alert_broker.stream.stats import Stats
from alert_broker.stream.watchdog import WATCHDOG
from alert_broker.work_budget import CancelledError
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
DRAIN_STEP = 0.005
DOUBT_STEP = 0.02  # seconds between checks whether this member is still in the group
COMMITTED_RETRY = 0.1  # seconds between attempts to learn what the group has committed
OFFSET_SECONDS = 3.0  # to wait for the committed offsets, in the thread that polls


class LostError(Exception):
    """This member is out of its group; another member will read its messages again."""


class Reading(Protocol):
    """Reads the partitions that this member owns. The thread that polls calls it."""

    def begin(self, partitions: list[TopicPartition], committed: Mapping[Partition, int]) -> None:
        """Read these partitions from now on. committed: the next offsets of the group, if they are known."""
        ...

    def end(self, where: Partition) -> None:
        """Forget a partition, which another member reads from now on."""
        ...


class Membership:
    """The thread that made it subscribes, and calls `serve` and `leave`. The thread that publishes calls `owned` and
    `commits.acknowledge` while it holds the lock `publishing`, so that no partition is revoked between the two calls.
    draining: whether partitions are being revoked, so that batches in flight should be published soon."""

    def __init__(
        self, config: Config, stats: Stats, consumer: Consumer, settings: Mapping[str, Secret], reading: Reading
    ) -> None:
        self.publishing, self.draining = Lock(), False
        self.commits = OffsetCommits(consumer, config.publish.commit_seconds)
        self.generations: dict[Partition, int] = {}  # of the partitions that this member owns
        # moves batches in flight on; returns False if the stages have stopped
        self.while_draining: Callable[[], bool] = lambda: True
        self.cancelled: Callable[[], bool] = lambda: False  # whether the batches in flight were given up
        # the defaults of librdkafka, unless [kafka] sets others
        self.session_seconds = float(settings.get("session.timeout.ms", 45_000)) / 1000.0
        self._heartbeat_seconds = float(settings.get("heartbeat.interval.ms", 3_000)) / 1000.0
        self._drain_seconds = config.source.drain_seconds
        self._stats, self._consumer, self._reading = stats, consumer, reading
        self._generation = 0
        self._losing = self._leaving = False
        self._lost_at = -math.inf  # monotonic seconds
        self._polled, self._in_doubt_until = math.inf, 0.0
        self._polling_thread = PollingThread()

    # --- called by the thread that polls

    def subscribe(self, topics: Sequence[str]) -> None:
        self._consumer.subscribe(list(topics), on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def serve(self) -> None:
        """Between two polls: carry out the requests of the publishing thread, and commit what it has published."""
        self._note_suspension()
        self._polling_thread.serve()
        self.commits.serve()

    def serve_idle(self) -> None:
        """As `serve`, while there is nothing to poll for."""
        self._note_suspension()
        self._polling_thread.serve()
        self.commits.serve_idle()

    def begin_again(self, topic: str) -> None:
        """The topic was deleted and created again. Publish what is in flight of the old one, and then commit the
        beginning of the new one. Otherwise an offset of the old topic would be committed in the new one, and a crash
        would pass over the messages before it."""
        ours = [where for where in self.generations if where[0] == topic]
        self._drain(ours)
        with self._no_publishing():
            for where in ours:
                self._start_generation(where)
                self.commits.forget(where)
                if number := self._stats.ledger.revoke(where):
                    LOG.error("%d alerts of the old %s[%d] were not published in time and are lost", number, *where)
            try:
                self.commits.commit_now(dict.fromkeys(ours, 0))
            except EdgekitError as error:
                # the new topic may have fewer partitions; any other cause ends the next commit
                LOG.warning("the beginning of the new %s is not committed: %s", topic, error)

    def leave(self) -> None:
        """Leave the group. Batches that are still in flight are never published."""
        self._leaving = True
        self._consumer.close()

    def was_lost_within(self, seconds: float) -> bool:
        """Return whether this member's session ended in these last seconds."""
        return time.monotonic() - self._lost_at < seconds

    def _note_suspension(self) -> None:
        """Notice that the process was suspended: the thread that polls calls this every few milliseconds otherwise."""
        now = time.monotonic()
        if now - self._polled > self.session_seconds:
            LOG.warning("this process was suspended for %.0f s: another member may have taken over", now - self._polled)
            self._in_doubt_until = now + 2.0 * self._heartbeat_seconds
        self._polled = now

    # --- called by the thread that publishes

    def owned(self, batch: MessageBatch) -> npt.NDArray[np.bool_]:
        """Return (messages,) whether this member still owns the partition of each message."""
        mine = [
            self.generations.get(where) == generation
            for where, generation in zip(batch.partitions, batch.generations, strict=True)
        ]
        return np.array(mine, np.bool_)[batch.partition]

    def committed(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Return the offsets that the group has committed; -1001 means none. No transaction is open on them. Raises
        KafkaException if the broker does not answer."""
        found: dict[Partition, int] = self.ask(lambda: self._committed(partitions, ADMIN_SECONDS))
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
            found = self._consumer.committed([TopicPartition(*where) for where in partitions], timeout=seconds)
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
            if self._losing or not self._consumer.memberid():
                raise LostError("the group goes on without this member")
            return None if time.monotonic() < self._in_doubt_until else self._consumer.consumer_group_metadata()

        while (found := self.ask(ask)) is None:
            if self.cancelled():
                raise CancelledError
            time.sleep(DOUBT_STEP)
        return found

    def ask(self, call: Callable[[], Any]) -> Any:
        """Return what the call returns in the thread that polls: only that thread may use the consumer."""
        return self._polling_thread.ask(call)

    # --- callbacks of the client, called inside its `consume` and `close`

    def _assigned(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        for where in (ours := _partitions(partitions)):
            self._start_generation(where)
        LOG.info("assigned %s", names(partitions))
        self._stats.ready = True
        self._reading.begin(partitions, self._committed_if_known(ours))

    def _start_generation(self, where: Partition) -> None:
        self._generation += 1
        self.generations[where] = self._generation

    def _committed_if_known(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Return where reading will begin, for the lag of partitions that are not read yet."""
        try:
            found = self._committed(partitions, OFFSET_SECONDS)
        except KafkaException as error:
            LOG.warning("%d partitions have no lag until they are read: %s", len(partitions), reason_of(error))
            return {}
        return {where: offset for where, offset in found.items() if offset >= 0}

    def _revoked(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Wait until batches in flight are published and committed; after `drain_seconds`, take them off the ledger."""
        with WATCHDOG.limit("on_revoke", math.inf):
            if not self._leaving:
                self._drain(_partitions(partitions))
            self._give_up(partitions, commit=not self._leaving)

    def _drain(self, ours: Sequence[Partition]) -> None:
        deadline = time.monotonic() + self._drain_seconds
        entries = self._stats.ledger.entries
        self.draining = True
        while time.monotonic() < deadline and any(entries[where].in_flight for where in ours if where in entries):
            self._polling_thread.serve()
            if self.commits.may_commit:
                self.commits.commit_now()
            if not self.while_draining():
                break
            time.sleep(DRAIN_STEP)
        self.draining = False

    def _lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        LOG.warning("lost %s: others own them already", names(partitions))
        self._losing, self._lost_at = True, time.monotonic()
        try:
            with WATCHDOG.limit("on_lost", math.inf):
                self._give_up(partitions, commit=False)
        finally:
            self._losing = False

    def _give_up(self, partitions: list[TopicPartition], *, commit: bool) -> None:
        with self._no_publishing():
            if commit:
                self.commits.commit_now()
            for where in _partitions(partitions):
                self.generations.pop(where, None)
                self.commits.forget(where)
                self._reading.end(where)
                if number := self._stats.ledger.revoke(where):
                    LOG.warning("%d alerts of %s[%d] were in flight and go to its next owner", number, *where)
        LOG.info("revoked %s", names(partitions))
        self._stats.ready = bool(self.generations)

    @contextmanager
    def _no_publishing(self) -> Iterator[None]:
        """Hold the lock of the thread that publishes, which may ask something while it holds it."""
        while not self.publishing.acquire(timeout=DRAIN_STEP):
            self._polling_thread.serve()
        try:
            yield
        finally:
            self.publishing.release()


def _partitions(partitions: Sequence[TopicPartition]) -> list[Partition]:
    return [(item.topic, item.partition) for item in partitions]
