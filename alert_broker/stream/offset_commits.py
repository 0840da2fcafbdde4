"""Commit offsets in the background: nobody waits for the broker's answer.

The publishing thread says up to which offsets brokers have acknowledged everything. The polling thread commits them
without waiting, at most every `publish.commit_seconds`, and hears the answer in a later poll. If the coordinator of the
group does not answer or has just been started, it commits again, for at most `COMMIT_SECONDS`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from threading import Lock
from types import MappingProxyType

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from alert_broker.stream.clients import HOPELESS, REBALANCED
from alert_broker.stream.ledger import Partition
from alert_broker.stream.watchdog import WATCHDOG
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
COMMIT_SECONDS = 120.0  # librdkafka waits for the coordinator (a session) and for its answer (a minute)
RETRY_SECONDS = 0.1  # before a commit that failed is sent again
ANSWER_STEP = 0.01  # seconds between looks for an answer, when nothing else is left to do


class OffsetCommits:
    """batches: how many batches are committed, of those that were acknowledged. Only `acknowledge`, `hurry` and
    `batches` are for the publishing thread; all else is for the thread that polls."""

    def __init__(self, consumer: Consumer, seconds: float) -> None:
        self.batches = 0
        self._consumer, self._seconds = consumer, seconds
        self._lock = Lock()
        self._acknowledged: dict[Partition, int] = {}  # next offsets, to be committed
        self._acknowledged_batches = 0
        self._sent: dict[Partition, int] | None = None  # next offsets of the commit that is not answered yet
        self._sent_batches = 0
        self._superseded = 0  # answers to come that say nothing, because a later commit was answered before
        self._due, self._hurry = 0.0, False
        self._failing_since: float | None = None  # monotonic seconds

    # --- called by the thread that publishes

    def acknowledge(self, offsets: Mapping[Partition, int]) -> None:
        """Commit these next offsets of one more batch soon; batches must come in the order in which they were read."""
        with self._lock:
            self._acknowledged |= offsets
            self._acknowledged_batches += 1

    def hurry(self) -> None:
        """Commit now, although the last commit was less than `publish.commit_seconds` ago."""
        self._hurry = True

    # --- called by the thread that polls

    @property
    def may_commit(self) -> bool:
        """Whether a commit may be sent now: one that failed is sent again after `RETRY_SECONDS`, not at once."""
        return self._failing_since is None or time.monotonic() >= self._due

    def serve_idle(self) -> None:
        """Between polls that are far apart, no answer is heard. So wait for it, if the publishing thread waits, too."""
        if self._hurry and self.may_commit:
            self._hurry = False
            self.commit_now()

    def serve(self) -> None:
        """Send a commit if it is due."""
        now = time.monotonic()
        if self._sent is not None or not (now >= self._due or (self._hurry and self.may_commit)):
            return
        with self._lock:
            if self.batches == self._acknowledged_batches:
                return
            self._sent, self._acknowledged = self._acknowledged, {}
            self._sent_batches = self._acknowledged_batches
        self._due, self._hurry = now + self._seconds, False
        if not self._sent:  # nothing to commit: all partitions of these batches were revoked
            self._answered(None)
            return
        try:
            self._consumer.commit(offsets=_positions(self._sent), asynchronous=True)
        except KafkaException as error:
            self._answered(error.args[0])

    def answered(self, error: KafkaError | None, partitions: Sequence[TopicPartition]) -> None:
        """The client calls this, inside a poll, with the answer to a commit."""
        if self._superseded:
            self._superseded -= 1
            return
        self._answered(error or _worst(partitions))

    def _answered(self, error: KafkaError | None) -> None:
        sent, self._sent = self._sent, None
        if error is None:
            self.batches, self._failing_since = self._sent_batches, None
        else:
            self._failed(error, sent or {})

    def _failed(self, error: KafkaError, offsets: Mapping[Partition, int]) -> None:
        """Commit these offsets again later, unless that is hopeless."""
        now = time.monotonic()
        since = self._failing_since = self._failing_since or now
        if error.code() in HOPELESS or error.fatal() or now - since > COMMIT_SECONDS:
            raise EdgekitError(
                f"offsets cannot be committed: {error.str()}; what was published since the last commit will be "
                "published again after a restart"
            )
        LOG.warning("offsets were not committed: %s; those of our partitions are committed again", error.str())
        with self._lock:  # what was acknowledged since counts more
            self._acknowledged = {**offsets, **self._acknowledged}
        self._due = now + max(RETRY_SECONDS, self._seconds)

    def commit_now(self, more: Mapping[Partition, int] = MappingProxyType({})) -> None:
        """Commit all that is acknowledged, and wait for the answer: inside a callback of the client, no answer to an
        earlier commit is heard. more: next offsets that are committed, too."""
        with self._lock:
            offsets, self._acknowledged = {**(self._sent or {}), **self._acknowledged, **more}, {}
            batches = self._acknowledged_batches
        if self._sent is not None:
            self._superseded, self._sent = self._superseded + 1, None
        if offsets and (error := self._wait(offsets)) is not None:
            self._failed(error, offsets)
        else:
            self.batches, self._failing_since = batches, None

    def _wait(self, offsets: Mapping[Partition, int]) -> KafkaError | None:
        try:
            with WATCHDOG.limit("commit", COMMIT_SECONDS):
                answer = self._consumer.commit(offsets=_positions(offsets), asynchronous=False)
        except KafkaException as error:
            known: KafkaError = error.args[0]
            return known
        return _worst(answer or ())

    def forget(self, where: Partition) -> None:
        """The partition belongs to another member now."""
        with self._lock:
            self._acknowledged.pop(where, None)
        if self._sent is not None:
            self._sent.pop(where, None)

    def finish(self, seconds: float) -> bool:
        """Commit all that is acknowledged; return whether the broker has answered within these seconds. Messages that
        come meanwhile are dropped."""
        deadline = time.monotonic() + seconds
        while self.batches < self._acknowledged_batches and time.monotonic() < deadline:
            self.hurry()
            self.serve()
            with WATCHDOG.limit("consume", ANSWER_STEP):
                self._consumer.consume(1, ANSWER_STEP)
        return self.batches == self._acknowledged_batches


def _worst(partitions: Sequence[TopicPartition]) -> KafkaError | None:
    """Return the error of one of the partitions; that of a rebalance only if there is no other."""
    errors = [item.error for item in partitions if item.error is not None]
    return min(errors, key=lambda error: error.code() in REBALANCED, default=None)


def _positions(offsets: Mapping[Partition, int]) -> list[TopicPartition]:
    return [TopicPartition(topic, number, offset) for (topic, number), offset in offsets.items()]
