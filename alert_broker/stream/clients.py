"""Configure librdkafka's clients for this package, and say what librdkafka's errors mean."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from alert_broker.stream.config import Config, Secret
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
ADMIN_SECONDS = 30.0  # for questions to the broker outside the flow of alerts: offsets, topics
SAY_SECONDS = 60.0  # between two equal messages of librdkafka
MOST_MESSAGES = 100  # messages of librdkafka that are remembered
# Waiting does not cure these errors of the consumer. librdkafka retries after all others by itself, and logs that.
HOPELESS = {
    KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError._FATAL, KafkaError._FENCED,
    KafkaError.INCONSISTENT_GROUP_PROTOCOL, KafkaError.UNSUPPORTED_SASL_MECHANISM, KafkaError.INVALID_SESSION_TIMEOUT,
}  # fmt: skip
ABSENT = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC}
# The group refuses a request of an earlier membership. FENCED_INSTANCE_ID may be such an answer. The client is of no
# use after it, which the consumer reports as a fatal error; see `Source`.
REBALANCED = {
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError._NO_OFFSET,
    KafkaError._ASSIGNMENT_LOST,
}


def consumer_defaults() -> dict[str, Secret]:
    """Return the settings that `[kafka]` may change."""
    return {
        "queued.max.messages.kbytes": 65_536,  # read ahead: a second of alerts at Rubin's rate, and no more memory
        "fetch.message.max.bytes": 8_388_608,
        "fetch.max.bytes": 16_777_216,  # reading ahead goes over its limit by at most this
        # librdkafka stops fetching for this time, by default a second, once it has read that far ahead
        "fetch.queue.backoff.ms": 10,
    }


def consumer_settings(config: Config) -> dict[str, Secret]:
    """Return the consumer's settings for librdkafka. `[kafka]` replaces our defaults, but not the settings that keep
    alerts safe."""
    source = config.source
    settings: dict[str, Secret] = {
        **consumer_defaults(),
        **config.kafka_settings(),
        "group.id": source.group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": True,
        "isolation.level": "read_committed",
        "auto.offset.reset": "error",  # `Source` chooses the position, and counts what retention deleted
    }
    if source.instance:
        settings["group.instance.id"] = source.instance
    return settings | assignment_strategy(settings)


def assignment_strategy(settings: Mapping[str, Secret]) -> dict[str, Secret]:
    """Return the setting by which the members of a group assign the partitions; none if `group.protocol` is "consumer",
    because the broker then assigns them."""
    if settings.get("group.protocol", "classic") == "classic":
        return {"partition.assignment.strategy": "cooperative-sticky"}
    return {}


class OnceAMinute(logging.Filter):
    """Lets a message pass once a minute: librdkafka repeats itself every second while a broker is away. Messages that
    differ only in the details after " (after" are one message."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, float] = {}  # message to monotonic seconds

    def filter(self, record: logging.LogRecord) -> bool:
        text, now = record.getMessage().partition(" (after")[0], time.monotonic()
        if now - self._passed.get(text, -SAY_SECONDS) < SAY_SECONDS:
            return False
        if len(self._passed) >= MOST_MESSAGES:
            self._passed.clear()
        self._passed[text] = now
        return True


KAFKA_LOG = logging.getLogger("edgekit.kafka")  # librdkafka's own messages
KAFKA_LOG.addFilter(OnceAMinute())


def note_error(error: KafkaError) -> None:
    """Log an error that librdkafka reports outside any call. Errors that matter are also raised by the calls that they
    affect."""
    KAFKA_LOG.warning("%s", error.str())


def open_consumer(
    settings: dict[str, Secret],
    hear: Callable[[KafkaError], None] = note_error,
    committed: Callable[[KafkaError | None, list[TopicPartition]], None] = lambda error, partitions: None,
) -> Consumer:
    """Return a consumer with these settings. hear: is called with the errors of the client as a whole, such as those of
    a connection. committed: is called with the answer to a commit that nobody waits for."""
    try:
        return Consumer(settings, logger=KAFKA_LOG, error_cb=hear, on_commit=committed)
    except (KafkaException, ValueError, TypeError) as error:
        raise EdgekitError(f"the consumer cannot be configured: {refusal_of(error, settings)}") from None


class Admin(AdminClient):
    """A client for questions to the broker that may be freed in any thread. librdkafka aborts the process if a client
    is freed in the client's own thread. Answers arrive in that thread, so the garbage collector may run in it; then the
    client is kept until another one is made."""

    _kept: ClassVar[list[Admin]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept.clear()

    def __del__(self) -> None:
        if isinstance(threading.current_thread(), threading._DummyThread):  # a thread that Python did not start
            self._kept.append(self)


def open_admin(settings: Mapping[str, Secret], hear: Callable[[KafkaError], None] = note_error) -> Admin:
    """Return a client for questions to the broker. hear: as in `open_consumer`."""
    try:
        return Admin(of_producer(settings), logger=KAFKA_LOG, error_cb=hear)
    except (KafkaException, ValueError, TypeError) as error:
        raise EdgekitError(
            f"the client for questions to the broker cannot be configured: {refusal_of(error, settings)}"
        ) from None


def reason_of(error: Exception) -> str:
    """Return librdkafka's description of an error on one line."""
    first = error.args[0] if error.args else error
    return " ".join((first.str() if isinstance(first, KafkaError) else str(first)).split())


@contextmanager
def client_errors() -> Iterator[None]:
    """Turn an error of the Kafka client that nothing else has explained into one for the user."""
    try:
        yield
    except KafkaException as error:
        raise EdgekitError(f"the Kafka client failed: {reason_of(error)}; check the broker, and start again") from error


def refusal_of(error: Exception, settings: Mapping[str, Secret]) -> str:
    """Return the reason why librdkafka refuses the settings, without their values. librdkafka quotes the values of some
    settings, such as security.protocol, and a value on the wrong line of the file may be a password."""
    reason = reason_of(error)
    for value in sorted((str(item) for item in settings.values()), key=len, reverse=True):
        reason = reason.replace(f'"{value}"', "(not shown)")
    return reason


def names(partitions: Sequence[TopicPartition]) -> str:
    return ", ".join(f"{item.topic}[{item.partition}]" for item in partitions) or "nothing"


def producer_settings(config: Config) -> dict[str, Secret]:
    return {
        "compression.type": "zstd",
        "linger.ms": 1,  # so that the messages of a batch share requests; librdkafka waits 5 ms by default
        "message.max.bytes": 8_388_608,  # a packet with a deep history, as a dead letter
        "queue.buffering.max.kbytes": 131_072,
        **of_producer(config.kafka_settings()),
        "enable.idempotence": True,
        "acks": "all",
        "delivery.timeout.ms": int(config.publish.seconds * 1000),
    }


def of_producer(settings: Mapping[str, Secret]) -> dict[str, Secret]:
    """Return the settings without those of consumers, about which a producer or an admin client would warn."""
    prefixes = ("session.", "heartbeat.", "max.poll.", "fetch.", "queued.", "group.", "coordinator.", "check.crcs")
    return {name: value for name, value in settings.items() if not name.startswith(prefixes)}


def partitions_of(client: Any, topic: str) -> list[int]:
    """Return the numbers of a topic's partitions."""
    try:
        known = client.list_topics(topic, timeout=ADMIN_SECONDS).topics.get(topic)
    except KafkaException as error:
        reason = reason_of(error)
        raise EdgekitError(f"the broker does not answer: {reason}; check bootstrap.servers and the broker") from None
    if known is None or (known.error is not None and known.error.code() in ABSENT):
        raise EdgekitError(f"the topic {topic!r} is not there; create it or name another one")
    if known.error is not None:
        raise EdgekitError(f"the topic {topic!r} cannot be read: {known.error.str()}; run `edgekit alerts check`")
    return sorted(known.partitions)
