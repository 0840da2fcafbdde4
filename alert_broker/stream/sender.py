"""Send messages, and hear what became of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from alert_broker.stream.clients import KAFKA_LOG, note_error, refusal_of
from alert_broker.stream.config import Secret
from alert_broker.stream.watchdog import WATCHDOG
from alert_broker.work_budget import Budget
from edgekit.errors import EdgekitError

FLUSH_SECONDS = 0.2  # seconds between checks whether the consumer stops, while the broker acknowledges
FULL_SECONDS = 0.1  # to wait for room in librdkafka's queue
# Errors of one message, not of the broker: sending the message again would fail again
UNSENDABLE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG}
# The broker refuses every message with these errors, so no message is at fault
REFUSED_TO_ALL = {KafkaError.INVALID_RECORD, KafkaError.INVALID_TIMESTAMP, KafkaError._INVALID_DIFFERENT_RECORD}
CAUSES_FOR_ALL = (
    "the clock of this machine is ahead of the broker's by more than message.timestamp.after.max.ms, or the topic is "
    "compacted and takes no message without a key"
)
FENCED = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError._FATAL}
MSG_TIMED_OUT = KafkaError(KafkaError._MSG_TIMED_OUT)

Headers = list[tuple[str, str | bytes | None]]
Report = Callable[[KafkaError | None, Message | None], None]


class Outgoing(NamedTuple):
    """A message to be sent. alert_index: the index, in its batch, of the alert that it was made from."""

    topic: str
    value: bytes | None
    headers: Headers
    alert_index: int
    key: bytes | None = None


Refused = Sequence[tuple[Outgoing, str]]  # each with the reason for which no broker would ever accept it


class NotSentError(Exception):
    """Messages that the broker did not acknowledge, for a reason that is not in the messages."""

    def __init__(self, error: KafkaError, topic: str = "") -> None:
        text = f"{topic}: {error.str()}" if topic else error.str()
        super().__init__(f"{text} ({CAUSES_FOR_ALL})" if error.code() in REFUSED_TO_ALL else text)
        self.text, self.fatal = error.str(), error.fatal() or error.code() in FENCED


class Sender:
    """A producer, used by one thread. budget: whoever waits, for room in librdkafka's queue or for answers, gets
    a CancelledError if it is cancelled."""

    def __init__(self, settings: dict[str, Secret], seconds: float, budget: Budget | None = None) -> None:
        self.seconds, self._budget = seconds, budget or Budget()
        try:
            self.producer = Producer(settings, logger=KAFKA_LOG, error_cb=note_error)
        except (KafkaException, ValueError, TypeError) as error:
            raise EdgekitError(f"the producer cannot be configured: {refusal_of(error, settings)}") from None

    def produce(self, message: Outgoing, report: Report) -> None:
        """Hand a message to librdkafka. report: is called with the error or None, in a later call of this object or at
        once; only with errors if the producer is set so."""
        while True:
            try:
                self.producer.produce(
                    message.topic,
                    message.value,
                    message.key,
                    on_delivery=report,
                    headers=message.headers,
                )
                return
            except BufferError:  # librdkafka's queue is full: let it send some
                self.poll(FULL_SECONDS)
                self._budget.check()
            except KafkaException as error:
                report(error.args[0], None)
                return

    def poll(self, seconds: float) -> None:
        """Hear reports; wait for the first of them."""
        self._serve(self.producer.poll, seconds)

    def flush(self, seconds: float) -> int:
        """Wait for the delivery reports; return how many are missing."""
        return self._serve(self.producer.flush, seconds)

    def send(self, messages: Sequence[Outgoing]) -> Refused:
        """Send all messages and wait for the broker. Messages that no broker would ever accept are returned with the
        reason; any other failure is a NotSentError."""
        failed: list[tuple[Outgoing, KafkaError]] = []
        for message in messages:
            self.produce(message, _collect(message, failed))
        self.wait()
        return refused(failed)

    def wait(self) -> None:
        """Wait until all messages are acknowledged or refused; NotSentError if that takes too long."""
        deadline = time.monotonic() + self.seconds + 5.0  # librdkafka itself gives up after `seconds`
        while self.flush(FLUSH_SECONDS):
            self._budget.check()
            if time.monotonic() > deadline:
                raise NotSentError(MSG_TIMED_OUT)

    def _serve(self, call: Callable[[float], int], seconds: float) -> int:
        """Have callbacks called. After a fatal error, such as a fence, the binding raises in the midst of them, and at
        times loses what it raised: a SystemError is left.
        """
        try:
            with WATCHDOG.limit(call.__name__, seconds):
                return call(seconds)
        except (KafkaException, SystemError) as error:
            cause = error if isinstance(error, KafkaException) else error.__cause__
            known = cause.args[0] if isinstance(cause, KafkaException) else KafkaError(KafkaError._FATAL)
            raise NotSentError(known) from None


def _collect(message: Outgoing, failed: list[tuple[Outgoing, KafkaError]]) -> Report:
    def report(error: KafkaError | None, _: Message | None) -> None:
        if error is not None:
            failed.append((message, error))

    return report


def refused(failed: Sequence[tuple[Outgoing, KafkaError]]) -> Refused:
    """Return the failed messages with the reason; NotSentError unless all of them are at fault themselves."""
    for message, error in failed:
        if error.code() not in UNSENDABLE:
            raise NotSentError(error, message.topic)
    return [(message, f"{message.topic}: {error.str()}") for message, error in failed]
