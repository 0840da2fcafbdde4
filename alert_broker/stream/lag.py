"""Consumer lag: for each assigned partition, the end offset on the broker minus the consumer's position.

The broker is asked for the end offsets without waiting for the answer. The consumer's own knowledge of an end came with
the last messages that it fetched: it knows nothing of a partition that it never read, and nothing new while it is
paused or stuck, which is when the lag matters most.

Only leaders of partitions are asked. A question to the group's coordinator, such as for committed offsets, must not go
through an AdminClient: librdkafka can abort the process if the connection to the coordinator is lost meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import Any

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from alert_broker.stream.clients import open_admin, reason_of
from alert_broker.stream.config import Config
from alert_broker.stream.ledger import Partition

LOG = logging.getLogger("edgekit.stream")
LAG_SECONDS = 1.0  # between questions
ANSWER_SECONDS = 10.0  # for an answer; until then there is no other question
EARLIEST, LATEST = OffsetSpec.earliest(), OffsetSpec.latest()  # type: ignore[no-untyped-call]
Offsets = dict[Partition, int]


class Lag:
    """Computes the lag. The thread that polls may call it at any time, because no call waits for the broker."""

    def __init__(self, config: Config) -> None:
        self.admin = open_admin(config.kafka_settings())
        self._begin = LATEST if config.source.start_at == "latest" else EARLIEST
        self._pending: list[tuple[Offsets, Partition, Future[Any]]] = []
        self._ends: Offsets = {}
        self._begins: Offsets = {}  # where reading begins if the group has committed nothing
        self._asked = -LAG_SECONDS
        self._told = ""

    def look(self, ours: Collection[Partition], positions: Mapping[Partition, int]) -> dict[Partition, int]:
        """Return the number of messages between the position and the end, for the partitions of which both are known.

        positions: the next offset of the partitions that the consumer has read from or that the group has committed.
        Reading of the others will begin at the beginning or at the end of the log.
        """
        if all(future.done() for _, _, future in self._pending):
            for found, where, future in self._pending:
                self._take(found, where, future)
            self._pending.clear()
            if ours and time.monotonic() - self._asked >= LAG_SECONDS:
                self._ask(ours, [at for at in ours if at not in positions and at not in self._begins])
        lag = {}
        for at in ours:
            position = positions.get(at, self._begins.get(at))
            if position is not None and at in self._ends:
                lag[at] = max(0, self._ends[at] - position)
        return lag

    def forget(self, where: Partition) -> None:
        """Forget a partition that was revoked or assigned. Answers to earlier questions do not count."""
        self._pending.clear()
        for found in (self._ends, self._begins):
            found.pop(where, None)

    def _ask(self, ours: Collection[Partition], unread: Collection[Partition]) -> None:
        self._asked = time.monotonic()
        try:
            self._ask_offsets(self._ends, ours, LATEST)
            if unread:
                self._ask_offsets(self._begins, unread, self._begin)
        except KafkaException as error:
            self._tell(error)

    def _ask_offsets(self, found: Offsets, of: Collection[Partition], spec: Any) -> None:
        # The consumer does not read messages of an open transaction, so they do not count as lag.
        answers = self.admin.list_offsets(
            {TopicPartition(*at): spec for at in of},
            isolation_level=IsolationLevel.READ_COMMITTED,
            request_timeout=ANSWER_SECONDS,
        )
        self._pending += [(found, (position.topic, position.partition), future) for position, future in answers.items()]

    def _take(self, found: Offsets, where: Partition, future: Future[Any]) -> None:
        try:
            answer = future.result()
        except KafkaException as error:
            self._tell(error)
            return
        if answer.offset >= 0:  # -1 means that the broker does not know; the last end that it told stays
            found[where] = answer.offset

    def _tell(self, error: KafkaException) -> None:
        """Log each reason once, because the question is asked every second."""
        if (reason := reason_of(error)) != self._told:
            LOG.warning("the lag cannot be computed: %s", reason)
            self._told = reason
