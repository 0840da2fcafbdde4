"""Redrive: send dead letters to the topics where they were read, after the cause of their failure is fixed."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from alert_broker.stream.clients import (
    HOPELESS,
    REBALANCED,
    assignment_strategy,
    consumer_defaults,
    of_producer,
    open_consumer,
)
from alert_broker.stream.config import DeadLetters, Secret
from alert_broker.stream.dead_letters import (
    OFFSET,
    OMITTED,
    PARTITION,
    PREFIX,
    REASON,
    REDRIVEN,
    TOPIC,
    UnreadableHeadersError,
    attempts,
    headers_of,
    text_of,
)
from alert_broker.stream.ledger import Partition
from alert_broker.stream.message_batch import position_of
from alert_broker.stream.sender import Headers, NotSentError, Outgoing, Sender
from alert_broker.stream.unreadable import UNREADABLE
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
BATCH = 256  # dead letters that are read and sent together: some MB
SEND_SECONDS = 60.0
# to wait for a partition: a member that was killed holds its partitions for a session, 45 s by default
JOIN_SECONDS = 90.0
READ_SECONDS = 30.0  # to wait for a message at an offset
NUMBER = re.compile("[0-9]{1,18}")  # a partition or an offset in a header


@dataclass(frozen=True, slots=True)
class Redriven:
    """How many dead letters were sent, skipped or lost. gone: dead letters without payload whose alert is no longer in
    its original topic; the log names each of them."""

    sent: int = 0
    passed_over: int = 0  # with another reason, or with too many attempts
    gone: int = 0


class Originals:
    """Reads messages at given offsets, for dead letters that were stored without their payload."""

    def __init__(self, settings: dict[str, Secret]) -> None:
        self._settings = settings
        self._consumer: Consumer | None = None

    def read(self, topic: str, partition: int, offset: int) -> Message | None:
        """Return the message, or None if it is no longer there."""
        if self._consumer is None:
            self._consumer = open_consumer({**self._settings, "group.id": "edgekit-none", "auto.offset.reset": "error"})
        self._consumer.assign([TopicPartition(topic, partition, offset)])
        deadline = time.monotonic() + READ_SECONDS
        while time.monotonic() < deadline:
            for message in self._consumer.consume(1, 0.2):
                error = message.error()
                if error is None:
                    return message if message.offset() == offset else None
                # a message that cannot be read is why the dead letter has no payload
                if error.code() in {KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET, *UNREADABLE}:
                    return None
                if error.code() in HOPELESS:
                    raise EdgekitError(f"{topic} cannot be read: {error.str()}")
        raise EdgekitError(
            f"the broker did not send the message at offset {offset} of {topic}[{partition}] within "
            f"{READ_SECONDS:.0f} s; check that the broker is up, and start again"
        )

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()


class Backlog:
    """The dead letters that one run of `redrive` handles. In each partition they end at the end of the topic, or at the
    first dead letter that failed again since the run began."""

    def __init__(self, settings: dict[str, Secret], topic: str, run: str, join_seconds: float) -> None:
        self._topic, self._group, self._run, self._join_seconds = topic, settings["group.id"], run, join_seconds
        self._assigned: set[Partition] = set()
        self._at_end: set[Partition] = set()
        self._again: set[Partition] = set()  # partitions with a dead letter that failed again
        self._after: dict[Partition, int] = {}  # the next offset of each partition, which `commit` commits
        self._deadline = time.monotonic() + join_seconds
        self._consumer = open_consumer(settings)
        self._consumer.subscribe([topic], on_assign=self._assign, on_revoke=self._revoke)

    @property
    def finished(self) -> bool:
        return bool(self._assigned) and self._at_end | self._again >= self._assigned

    def read(self) -> list[tuple[Message, Headers]]:
        """Return the next dead letters, with their headers. Raises EdgekitError if the topic cannot be read."""
        found: list[tuple[Message, Headers]] = []
        for message in self._consumer.consume(BATCH, 0.2):
            error = message.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    self._at_end.add(position_of(message)[0])
                elif error.code() in HOPELESS:
                    raise EdgekitError(f"{self._topic} cannot be read: {error.str()}")
                elif error.code() in UNREADABLE:  # librdkafka would fetch it again for ever
                    raise EdgekitError(
                        f"{self._topic}[{message.partition()}] cannot be read at offset {message.offset()}: "
                        f"{error.str()}; raise receive.message.max.bytes with --kafka, or name another --group whose "
                        "offsets are after it"
                    )
                continue
            where, offset = position_of(message)
            self._at_end.discard(where)
            headers = readable_headers(message)
            if text_of(dict(headers).get(REDRIVEN)) == self._run:
                self._again.add(where)
            if where not in self._again:
                self._after[where] = offset + 1
                found.append((message, headers))
        if not self._assigned and time.monotonic() > self._deadline:
            raise EdgekitError(
                f"no partition of {self._topic} was assigned within {self._join_seconds:.0f} s, because other members "
                f"of the group {self._group} hold them; wait until they have ended, or name another --group"
            )
        return found

    def commit(self) -> None:
        """Commit the offsets of all dead letters that were read. If another member owns the partitions by now, it sends
        some dead letters again."""
        after, self._after = self._after, {}
        offsets = [TopicPartition(name, number, offset) for (name, number), offset in after.items()]
        try:
            answers = self._consumer.commit(offsets=offsets, asynchronous=False)
            errors = [item.error for item in answers or () if item.error is not None]
        except KafkaException as error:
            errors = [error.args[0]]
        for fault in errors:
            if fault.code() not in REBALANCED:
                raise EdgekitError(
                    f"offsets cannot be committed: {fault.str()}; the last {BATCH} dead letters at most will be sent "
                    "again"
                )
            LOG.warning("the group was rebalanced: another member may send some dead letters again")

    def close(self) -> None:
        self._consumer.close()

    def _assign(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._assigned.update((item.topic, item.partition) for item in partitions)

    def _revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._assigned.difference_update((item.topic, item.partition) for item in partitions)
        self._at_end &= self._assigned
        self._again &= self._assigned
        self._deadline = time.monotonic() + self._join_seconds


def redrive(
    settings: dict[str, Secret],
    config: DeadLetters,
    *,
    group: str,
    reason: str = "",
    to_topic: str = "",
    max_attempts: int = 3,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda count: None,
    join_seconds: float = JOIN_SECONDS,
) -> Redriven:
    """Send dead letters to the topics where they were read (or to `to_topic`). In each partition of the dead-letter
    topic, redrive stops at the end, or at the first dead letter that failed again since this run began; the next run
    starts there.

    reason: only dead letters whose reason contains this text are sent; the others are skipped and stay in the topic. A
    dead letter that has failed more than `max_attempts` times is skipped too. The offset of a dead letter is committed,
    for the consumer group `group`, after the broker has acknowledged the message; after a crash some are sent again and
    none is lost. progress: is called with the number of dead letters that were processed.
    """
    reading: dict[str, Secret] = {
        **consumer_defaults(), **settings, "enable.auto.commit": False, "enable.auto.offset.store": False,
        "enable.partition.eof": True, **assignment_strategy(settings),
    }  # fmt: skip
    run = uuid.uuid4().hex
    originals, sender = Originals(reading), _open_sender(settings)
    backlog = Backlog({**reading, "group.id": group, "auto.offset.reset": "earliest"}, config.topic, run, join_seconds)
    sent = passed = gone = 0
    try:
        while not stop() and not backlog.finished:
            batch: list[Outgoing] = []
            found = backlog.read()
            for message, headers in found:
                if reason not in text_of(dict(headers).get(REASON)) or attempts(headers) > max_attempts:
                    passed += 1
                elif (dead_letter := restored(message, headers, len(batch), originals, to_topic, run)) is None:
                    gone += 1
                else:
                    batch.append(dead_letter)
            _send(sender, batch, sent)
            sent += len(batch)
            if found:
                backlog.commit()
                progress(sent + passed + gone)
    finally:
        backlog.close()
        originals.close()
    return Redriven(sent, passed, gone)


def _open_sender(settings: dict[str, Secret]) -> Sender:
    ours: dict[str, Secret] = {"enable.idempotence": True, "delivery.report.only.error": True}
    return Sender({"message.max.bytes": 8_388_608, **of_producer(settings), **ours}, SEND_SECONDS)


def _send(sender: Sender, batch: list[Outgoing], before: int) -> None:
    """Send a batch. before: the number of dead letters that were sent before, for the error message."""
    try:
        refused = sender.send(batch)
    except NotSentError as error:
        raise EdgekitError(
            f"dead letters cannot be sent: {error}; {before} were sent, start again to send the rest"
        ) from None
    if refused:
        raise EdgekitError(f"a dead letter cannot be sent: {refused[0][1]}")


def readable_headers(message: Message) -> Headers:
    """Return the headers of a message; none if they cannot be read. `outgoing` sends no dead letter with such headers,
    but another program may have written to the topic."""
    try:
        return headers_of(message)
    except UnreadableHeadersError as error:
        (topic, partition), offset = position_of(message)
        LOG.warning(
            "the headers of the message at %s[%d], offset %d, cannot be read: %s", topic, partition, offset, error
        )
        return []


def restored(
    message: Message, headers: Headers, index: int, originals: Originals, to_topic: str, run: str
) -> Outgoing | None:
    """Return the message to send for a dead letter: the alert with its original payload, and edgekit's headers, which
    count its failures. Return None if the payload is no longer in its original topic."""
    named = {name: text_of(content) for name, content in headers}
    (own, partition), offset = position_of(message)
    topic = to_topic or named.get(TOPIC, "")
    if not topic:
        raise EdgekitError(
            f"the message at offset {offset} of {own}[{partition}] has no header {TOPIC!r}, so it is not a dead letter "
            "of edgekit; name the topic to send it to with --to-topic"
        )
    ours = [
        *((name, content) for name, content in headers if name not in (OMITTED, REDRIVEN)),
        (REDRIVEN, run.encode()),
    ]
    if OMITTED not in named:
        return Outgoing(topic, message.value(), ours, index, message.key())
    if TOPIC not in named or not all(NUMBER.fullmatch(named.get(name, "")) for name in (PARTITION, OFFSET)):
        LOG.warning("the message at %s[%d], offset %d, does not say where its payload is", own, partition, offset)
        return None
    position = named[TOPIC], int(named[PARTITION]), int(named[OFFSET])
    alert = originals.read(*position)
    if alert is None:
        LOG.warning(
            "the dead letter at %s[%d], offset %d, has no payload, and its alert is gone from %s[%d], offset %d: %s",
            own,
            partition,
            offset,
            *position,
            named[OMITTED],
        )
        return None
    theirs = [(name, content) for name, content in readable_headers(alert) if not name.startswith(PREFIX)]
    return Outgoing(topic, alert.value(), [*theirs, *ours], index, alert.key())
