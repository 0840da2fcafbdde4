"""Dead letters: an alert that cannot be read goes to a topic of its own, as it came, with all that is needed to tell
why and to send it again. Too many of them stop the consumer: then it is not the alerts that are broken."""

from __future__ import annotations

import hashlib
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from alert_broker.containers import WIRE_HEADER, WIRE_MAGIC
from alert_broker.stream.config import DeadLetters, Secret
from alert_broker.stream.ledger import Partition
from alert_broker.stream.publish import Headers, NotSentError, Outgoing, Sender, of_producer
from alert_broker.stream.source import HOPELESS, open_consumer, place_of
from edgekit.errors import EdgekitError

PREFIX = "edgekit."  # of our headers
REASON, STATUS, SCHEMA_ID, STACK = (PREFIX + name for name in ("reason", "status", "schema-id", "stack"))
TOPIC, PARTITION, OFFSET = (PREFIX + name for name in ("topic", "partition", "offset"))
WHEN, ATTEMPTS = PREFIX + "dead-lettered-at", PREFIX + "attempts"
SHOWN = 300  # characters of a reason in messages to people
REDRIVE_BATCH = 256  # dead letters that are sent before the next are read: some MB
SEND_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Letter:
    """Why one message of a batch is a dead letter. stack: digest of where the program failed, if it did."""

    place: int
    reason: str
    status: str = "error"
    stack: str = ""


def stack_digest(error: BaseException) -> str:
    """The same for the same failure at the same place, whatever the alert: for counting."""
    frames = [f"{frame.filename}:{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return hashlib.sha256("\n".join([type(error).__name__, *frames]).encode()).hexdigest()[:16]


def kind_of(reason: str) -> str:
    """A reason without what differs from alert to alert, for counting."""
    return re.sub(r"\d+", "N", reason.split(":")[0])


def text_of(value: str | bytes | None) -> str:
    """A header's value as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def position_headers(message: Message) -> Headers:
    """Where a message was read."""
    (topic, partition), offset = place_of(message)
    return [(TOPIC, topic.encode()), (PARTITION, b"%d" % partition), (OFFSET, b"%d" % offset)]


def headers_of(message: Message) -> Headers:
    found = message.headers() or []
    return list(found.items()) if isinstance(found, dict) else list(found)


def attempts(headers: Headers) -> int:
    """How often it was a dead letter before."""
    text = text_of(dict(headers).get(ATTEMPTS))
    return int(text) if text.isdigit() else 0


def outgoing(letter: Letter, message: Message, topic: str) -> Outgoing:
    """The dead letter as a message: the same key and bytes, the headers that it had, and ours."""
    value = message.value()
    before = headers_of(message)
    headers: Headers = [
        *((name, content) for name, content in before if not name.startswith(PREFIX)),
        *position_headers(message), (REASON, letter.reason.encode()), (STATUS, letter.status.encode()),
        (WHEN, b"%d" % int(time.time() * 1000)), (ATTEMPTS, b"%d" % (attempts(before) + 1)),
    ]  # fmt: skip
    if value is not None and value[:1] == WIRE_MAGIC and len(value) >= WIRE_HEADER.size:
        headers.append((SCHEMA_ID, b"%d" % WIRE_HEADER.unpack(value[: WIRE_HEADER.size])[1]))
    if letter.stack:
        headers.append((STACK, letter.stack.encode()))
    return Outgoing(topic, value, headers, letter.place, message.key())


class Limits:
    """Counts dead letters among the last alerts, in the order in which they came."""

    def __init__(self, config: DeadLetters) -> None:
        self._config = config
        self._window: deque[bool] = deque(maxlen=config.window)
        self._dead = self._row = 0

    def check(self, letters: Sequence[Letter], count: int) -> None:
        """A batch of `count` alerts with these dead letters; raise where that is too many."""
        dead = {letter.place: letter for letter in letters}
        for place in range(count):
            is_dead = place in dead
            if len(self._window) == self._window.maxlen:
                self._dead -= self._window[0]
            self._window.append(is_dead)
            self._dead += is_dead
            self._row = self._row + 1 if is_dead else 0
            if self._row >= self._config.max_consecutive:
                self._stop(f"{self._row} alerts in a row are dead letters", dead[place])
            full = len(self._window) == self._window.maxlen
            if is_dead and full and self._dead > self._config.max_ratio * len(self._window):
                self._stop(f"{self._dead} of the last {len(self._window)} alerts are dead letters", dead[place])

    def _stop(self, what: str, last: Letter) -> None:
        raise EdgekitError(
            f"stopped, as {what} (allowed: {self._config.max_consecutive} in a row, {self._config.max_ratio:.0%} of "
            f"{self._config.window}); the last: {last.reason[:SHOWN]}; this batch is not committed: find the cause, "
            "and start again, or raise dead_letters.max_ratio and dead_letters.max_consecutive"
        )


@dataclass(frozen=True, slots=True)
class Redriven:
    """What became of the dead letters that were looked at."""

    sent: int = 0
    passed_over: int = 0  # for another reason, or with too many attempts


def redrive(
    settings: dict[str, Secret],
    config: DeadLetters,
    *,
    group: str,
    reason: str = "",
    to_topic: str = "",
    max_attempts: int = 3,
    stop: Callable[[], bool] = lambda: False,
) -> Redriven:
    """Send dead letters, as they came, to the topics that they came from (or `to_topic`), up to the end of their topic.

    reason: only those whose reason holds this text; the others are passed over, and stay in the topic. A letter that
    has died `max_attempts` times is passed over too. A letter is behind us once the broker has it where it went, so
    that a crash sends some again rather than none; `group` remembers how far we are.
    """
    consumer = open_consumer({
        **settings, "group.id": group, "enable.auto.commit": False, "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest", "enable.partition.eof": True,
        "partition.assignment.strategy": "cooperative-sticky",
    })  # fmt: skip
    sender = Sender(
        {**of_producer(settings), "message.max.bytes": 8_388_608, "enable.idempotence": True,
         "delivery.report.only.error": True}, SEND_SECONDS,
    )  # fmt: skip
    sent = passed = 0
    at_end: set[Partition] = set()
    assigned: set[Partition] = set()

    def keep(_: Consumer, partitions: list[TopicPartition]) -> None:
        assigned.update((item.topic, item.partition) for item in partitions)

    def drop(_: Consumer, partitions: list[TopicPartition]) -> None:
        assigned.difference_update((item.topic, item.partition) for item in partitions)

    consumer.subscribe([config.topic], on_assign=keep, on_revoke=drop)
    try:
        while not stop() and not (assigned and at_end >= assigned):
            batch: list[Outgoing] = []
            after: dict[Partition, int] = {}
            for message in consumer.consume(REDRIVE_BATCH, 0.2):
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF:
                        at_end.add(place_of(message)[0])
                    elif error.code() in HOPELESS:
                        raise EdgekitError(f"{config.topic} cannot be read: {error.str()}")
                    continue
                where, offset = place_of(message)
                at_end.discard(where)
                after[where] = offset + 1
                headers = headers_of(message)
                named = dict(headers)
                if reason not in text_of(named.get(REASON)) or attempts(headers) > max_attempts:
                    passed += 1
                    continue
                topic = to_topic or text_of(named.get(TOPIC))
                if not topic:
                    raise EdgekitError(
                        f"{where[0]}[{where[1]}] has a message at {offset} that does not say where it came "
                        "from; it is no dead letter of ours: name a topic with --to-topic"
                    )
                batch.append(Outgoing(topic, message.value(), headers, len(batch), message.key()))
            try:
                refused = sender.send(batch)
            except NotSentError as error:
                raise EdgekitError(f"dead letters cannot be sent: {error}; {sent} were, start again to go on") from None
            if refused:
                raise EdgekitError(f"a dead letter cannot be sent: {refused[0][1]}")
            if after:
                consumer.commit(
                    offsets=[TopicPartition(name, number, offset) for (name, number), offset in after.items()],
                    asynchronous=False,
                )
            sent += len(batch)
    finally:
        consumer.close()
    return Redriven(sent, passed)
