"""Dead letters back to where they came from, after what killed them is fixed."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from alert_broker.stream.clients import HOPELESS, REBALANCED, consumer_defaults, of_producer, open_consumer, reason_of
from alert_broker.stream.config import DeadLetters, Secret
from alert_broker.stream.dead_letters import (
    OFFSET,
    OMITTED,
    PARTITION,
    PREFIX,
    REASON,
    REDRIVEN,
    TOPIC,
    attempts,
    headers_of,
    text_of,
)
from alert_broker.stream.ledger import Partition
from alert_broker.stream.publish import NotSentError, Outgoing, Sender
from alert_broker.stream.source import place_of
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
BATCH = 256  # dead letters that are sent before the next are read: some MB
SEND_SECONDS = 60.0
JOIN_SECONDS = 90.0  # for a partition to be ours: a member that was killed holds it for a session, 45 s by default
READ_SECONDS = 30.0  # for a message at an offset


@dataclass(frozen=True, slots=True)
class Redriven:
    """What became of the dead letters that were looked at. gone: too large to carry their alert, which its topic has
    no more; each is told in the log."""

    sent: int = 0
    passed_over: int = 0  # for another reason, or with too many attempts
    gone: int = 0


class Originals:
    """Messages at their offsets, for the letters that do not carry them."""

    def __init__(self, settings: dict[str, Secret]) -> None:
        self._settings = settings
        self._consumer: Consumer | None = None

    def read(self, topic: str, partition: int, offset: int) -> Message | None:
        """The message, or None if it is not there any more."""
        if self._consumer is None:
            self._consumer = open_consumer({**self._settings, "group.id": "edgekit-none", "auto.offset.reset": "error"})
        self._consumer.assign([TopicPartition(topic, partition, offset)])
        deadline = time.monotonic() + READ_SECONDS
        while time.monotonic() < deadline:
            for message in self._consumer.consume(1, 0.2):
                error = message.error()
                if error is None:
                    return message if message.offset() == offset else None
                if error.code() in (KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET):
                    return None
                if error.code() in HOPELESS:
                    raise EdgekitError(f"{topic} cannot be read: {error.str()}")
        raise EdgekitError(f"{topic}[{partition}] does not give its message at {offset}; is the broker up?")

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()


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
    """Send dead letters, as they came, to the topics that they came from (or `to_topic`), up to the end of their topic,
    or to the first one in a partition that has died again since this began: the next run begins there.

    reason: only those whose reason holds this text; the others are passed over, and stay in the topic. A letter that
    has died `max_attempts` times is passed over too. A letter is behind us once the broker has it where it went, so
    that a crash sends some again rather than none; `group` remembers how far we are. progress: told how many were
    looked at.
    """
    reading: dict[str, Secret] = {
        **consumer_defaults(), **settings, "enable.auto.commit": False, "enable.auto.offset.store": False,
        "enable.partition.eof": True, "partition.assignment.strategy": "cooperative-sticky",
    }  # fmt: skip
    consumer = open_consumer({**reading, "group.id": group, "auto.offset.reset": "earliest"})
    originals = Originals(reading)
    sender = Sender(
        {
            "message.max.bytes": 8_388_608,
            **of_producer(settings),
            "enable.idempotence": True,
            "delivery.report.only.error": True,
        },
        SEND_SECONDS,
    )
    sent = passed = gone = 0
    run = uuid.uuid4().hex
    again: set[Partition] = set()
    at_end: set[Partition] = set()
    assigned: set[Partition] = set()

    def keep(_: Consumer, partitions: list[TopicPartition]) -> None:
        assigned.update((item.topic, item.partition) for item in partitions)

    def drop(_: Consumer, partitions: list[TopicPartition]) -> None:
        assigned.difference_update((item.topic, item.partition) for item in partitions)
        at_end.intersection_update(assigned)
        again.intersection_update(assigned)

    consumer.subscribe([config.topic], on_assign=keep, on_revoke=drop)
    deadline = time.monotonic() + join_seconds
    try:
        while not stop() and not (assigned and at_end | again >= assigned):
            batch: list[Outgoing] = []
            after: dict[Partition, int] = {}
            for message in consumer.consume(BATCH, 0.2):
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF:
                        at_end.add(place_of(message)[0])
                    elif error.code() in HOPELESS:
                        raise EdgekitError(f"{config.topic} cannot be read: {error.str()}")
                    continue
                where, offset = place_of(message)
                at_end.discard(where)
                headers = headers_of(message)
                if text_of(dict(headers).get(REDRIVEN)) == run:
                    again.add(where)
                if where in again:
                    continue
                after[where] = offset + 1
                if reason not in text_of(dict(headers).get(REASON)) or attempts(headers) > max_attempts:
                    passed += 1
                elif (letter := restored(message, len(batch), originals, to_topic, run)) is None:
                    gone += 1
                else:
                    batch.append(letter)
            if assigned:
                deadline = time.monotonic() + join_seconds
            elif time.monotonic() > deadline:
                raise EdgekitError(
                    f"no partition of {config.topic} came to us within {join_seconds:.0f} s: other members of the "
                    f"group {group} hold them; wait until they have ended, or name another --group"
                )
            try:
                refused = sender.send(batch)
            except NotSentError as error:
                raise EdgekitError(f"dead letters cannot be sent: {error}; {sent} were, start again to go on") from None
            if refused:
                raise EdgekitError(f"a dead letter cannot be sent: {refused[0][1]}")
            sent += len(batch)
            if after:
                commit(consumer, after)
                progress(sent + passed + gone)
    finally:
        consumer.close()
        originals.close()
    return Redriven(sent, passed, gone)


def commit(consumer: Consumer, after: dict[Partition, int]) -> None:
    """Remember how far we are. If the partitions are another member's by now, it sends some letters again."""
    try:
        consumer.commit(
            offsets=[TopicPartition(name, number, offset) for (name, number), offset in after.items()],
            asynchronous=False,
        )
    except KafkaException as error:
        if error.args[0].code() not in REBALANCED:
            raise EdgekitError(
                f"offsets cannot be committed: {reason_of(error)}; the last {BATCH} dead letters at most will be sent "
                "again"
            ) from None
        LOG.warning("the group has a new generation: another member may send some dead letters again")


def restored(message: Message, place: int, originals: Originals, to_topic: str, run: str) -> Outgoing | None:
    """What to send for a dead letter: the alert as it came, with our headers, which count how often it died; None if
    it is nowhere any more."""
    headers = headers_of(message)
    named = {name: text_of(content) for name, content in headers}
    (own, partition), offset = place_of(message)
    topic = to_topic or named.get(TOPIC, "")
    if not topic:
        raise EdgekitError(
            f"{own}[{partition}] has a message at {offset} that does not say where it came from; it is no dead "
            "letter of ours: name a topic with --to-topic"
        )
    ours = [
        *((name, content) for name, content in headers if name not in (OMITTED, REDRIVEN)),
        (REDRIVEN, run.encode()),
    ]
    if OMITTED not in named:
        return Outgoing(topic, message.value(), ours, place, message.key())
    position = named[TOPIC], int(named[PARTITION]), int(named[OFFSET])
    alert = originals.read(*position)
    if alert is None:
        LOG.warning(
            "the dead letter at %s[%d] %d has no bytes, and %s[%d] has none at %d any more: %s",
            own,
            partition,
            offset,
            *position,
            named[OMITTED],
        )
        return None
    theirs = [(name, content) for name, content in headers_of(alert) if not name.startswith(PREFIX)]
    return Outgoing(topic, alert.value(), [*theirs, *ours], place, alert.key())
