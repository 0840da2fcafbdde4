"""Publish results and dead letters, a batch at a time, and commit the offsets after that.

At least once: offsets are committed after the broker has acknowledged the whole batch, and the next batch is sent after
that; a crash repeats one batch at most. Exactly once: results and offsets are one transaction; whoever reads only
committed messages sees a batch once or not at all, and an earlier process of this member is fenced off.

A broker can also refuse a producer that no other process has replaced, because librdkafka's epoch is old after the
broker was killed. The group tells the two cases apart. While this member owns the partitions, it replaces its producer,
at most `RENEWALS` times in `RENEWAL_SECONDS`, and sends the batch again only if the group has no offset of it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from alert_broker.stream.clients import KAFKA_LOG, REBALANCED, note_error, producer_settings, reason_of, refusal_of
from alert_broker.stream.config import Config, Secret
from alert_broker.stream.connect import principal
from alert_broker.stream.ledger import Partition
from alert_broker.stream.membership import LostError, Membership
from alert_broker.stream.rights import missing_right
from alert_broker.stream.watchdog import WATCHDOG
from alert_broker.work_budget import Budget, CancelledError
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
ATTEMPTS = 5  # at a transaction that the broker asks to have aborted
FLUSH_SECONDS = 0.2  # seconds between checks whether the consumer stops, while the broker acknowledges
RENEWALS, RENEWAL_SECONDS = (
    3,
    600.0,
)  # a limit, because two members with one transactional id would fence each other off for ever
CALL_SECONDS = 30.0  # time limit of a call that has no limit of its own
# Errors of one message, not of the broker: sending the message again would fail again
UNSENDABLE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG}
# The broker refuses every message with these errors, so no message is at fault
REFUSED_TO_ALL = {KafkaError.INVALID_RECORD, KafkaError.INVALID_TIMESTAMP, KafkaError._INVALID_DIFFERENT_RECORD}
CAUSES_FOR_ALL = (
    "the clock of this machine is ahead of the broker's by more than message.timestamp.after.max.ms, or the topic is "
    "compacted and takes no message without a key"
)


Headers = list[tuple[str, str | bytes | None]]


class Outgoing(NamedTuple):
    """A message to be sent. alert_index: the index, in its batch, of the alert that it was made from."""

    topic: str
    value: bytes | None
    headers: Headers
    alert_index: int
    key: bytes | None = None


Refused = Sequence[tuple[Outgoing, str]]  # each with the reason for which no broker would ever accept it
Instead = Callable[[Refused], Sequence[Outgoing]]


class Publisher(Protocol):
    """Sends a batch and commits its offsets."""

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, int], instead: Instead) -> None:
        """Return when the brokers have all messages and the offsets. Raise LostError if another member owns the
        partitions by now; then none of the messages is visible. instead: returns the messages to send in place of
        messages that no broker would ever accept."""
        ...

    def close(self) -> None: ...


def open_publisher(config: Config, membership: Membership, budget: Budget | None = None) -> Publisher:
    """budget: `publish` raises its CancelledError if the broker has not acknowledged when the budget is cancelled. The
    batch is then not committed."""
    if config.publish.mode == "exactly-once":
        return ExactlyOnce(config, membership, budget)
    return AtLeastOnce(config, membership, budget)


class Sender:
    """A producer that records which messages failed."""

    def __init__(self, settings: dict[str, Secret], seconds: float, budget: Budget | None = None) -> None:
        self.failed: list[tuple[Outgoing, KafkaError]] = []
        self.seconds, self._budget = seconds, budget or Budget()
        try:
            self.producer = Producer(settings, logger=KAFKA_LOG, error_cb=note_error)
        except (KafkaException, ValueError, TypeError) as error:
            raise EdgekitError(f"the producer cannot be configured: {refusal_of(error, settings)}") from None

    def send(self, messages: Sequence[Outgoing]) -> Refused:
        """Send all messages and wait for the broker. Messages that no broker would ever accept are returned with the
        reason; any other failure is a NotSentError."""
        self.failed.clear()
        produce = self.producer.produce
        for message in messages:
            while True:
                try:
                    produce(
                        message.topic,
                        message.value,
                        message.key,
                        on_delivery=self._note(message),
                        headers=message.headers,
                    )
                    break
                except BufferError:  # librdkafka's queue is full: let it send some
                    self._serve(self.producer.poll, 0.1)
                    self._budget.check()
                except KafkaException as error:
                    self.failed.append((message, error.args[0]))
                    break
        deadline = time.monotonic() + self.seconds + 5.0  # librdkafka itself gives up after `seconds`
        while (left := self.flush(FLUSH_SECONDS)) and time.monotonic() < deadline:
            self._budget.check()
        lost = [(message, error) for message, error in self.failed if error.code() not in UNSENDABLE]
        if left or lost:
            raise NotSentError(lost[0][1], lost[0][0].topic) if lost else NotSentError(MSG_TIMED_OUT)
        return [(message, f"{message.topic}: {error.str()}") for message, error in self.failed]

    def flush(self, seconds: float) -> int:
        """Wait for the delivery reports; return how many are missing."""
        return self._serve(self.producer.flush, seconds)

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

    def _note(self, message: Outgoing) -> Callable[[KafkaError | None, Message], None]:
        def report(error: KafkaError | None, _: Message) -> None:
            if error is not None:
                self.failed.append((message, error))

        return report


class AtLeastOnce:
    """Send, wait for all delivery reports, commit."""

    def __init__(self, config: Config, membership: Membership, budget: Budget | None = None) -> None:
        self._membership = membership
        self._sender = Sender(producer_settings(config), config.publish.seconds, budget)

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, int], instead: Instead) -> None:
        try:
            while refused := self._sender.send(messages):
                messages = instead(refused)
        except NotSentError as error:
            raise EdgekitError(
                f"results cannot be published: {error}; nothing of this batch was committed; start again to continue"
            ) from None
        if offsets:
            self._membership.commit(dict(offsets))

    def close(self) -> None:
        with contextlib.suppress(NotSentError):  # `publish` has waited for all that it did not give up
            self._sender.flush(FLUSH_SECONDS)


class ExactlyOnce:
    """One transaction per batch, with the offsets in it."""

    def __init__(self, config: Config, membership: Membership, budget: Budget | None = None) -> None:
        name = config.transactional_id()
        if not name:
            raise EdgekitError(
                "exactly-once needs a name of this member that outlives it, so that a new one fences the old one off; "
                "set publish.transactional_id or source.instance, another one for each member"
            )
        self._membership, self._seconds, self._budget = membership, config.publish.seconds, budget
        self._name, self._who = name, principal(config.kafka)
        self._settings = producer_settings(config)
        del self._settings["delivery.timeout.ms"]  # the transaction's time is the limit
        self._settings |= {"transactional.id": name, "transaction.timeout.ms": int(config.publish.seconds * 1000)}
        self._renewals: deque[float] = deque(maxlen=RENEWALS)  # monotonic seconds
        try:
            self._open()
        except FencedError as error:
            raise fenced(str(error)) from None

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, int], instead: Instead) -> None:
        batch = list(messages)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._transaction(batch, offsets, instead)
                return
            except FencedError as error:
                last = str(error)
                if self._renew(last, offsets):
                    return
            except AbortedError as error:
                last = str(error)
                LOG.warning("a transaction was aborted (%d of %d): %s", attempt, ATTEMPTS, last)
                time.sleep(0.1 * attempt)
        raise EdgekitError(
            f"the transaction was aborted {ATTEMPTS} times: {last}; nothing of it is visible; start again"
        )

    def close(self) -> None:
        pass  # no transaction is open between batches

    def _open(self) -> None:
        self._sender = Sender(self._settings, self._seconds, self._budget)
        self._guard(self._sender.producer.init_transactions, self._seconds)

    def _transaction(self, batch: list[Outgoing], offsets: Mapping[Partition, int], instead: Instead) -> None:
        """Send and commit; if that fails, abort and raise AbortedError, LostError or FencedError. Messages that no
        broker takes are replaced in `batch`."""
        producer = self._sender.producer
        try:
            self._send(batch, offsets, instead)
        except LostError:
            self._guard(producer.abort_transaction, self._seconds)
            raise
        except CancelledError:
            with contextlib.suppress(KafkaException), WATCHDOG.limit("abort_transaction", FLUSH_SECONDS):
                producer.abort_transaction(FLUSH_SECONDS)  # if it fails, the next process of this member aborts it
            raise
        except (AbortedError, NotSentError) as error:
            if isinstance(error, NotSentError) and error.fatal:
                raise FencedError(error.text) from None
            self._guard(producer.abort_transaction, self._seconds)
            raise AbortedError(str(error)) from None

    def _send(self, batch: list[Outgoing], offsets: Mapping[Partition, int], instead: Instead) -> None:
        producer = self._sender.producer
        self._guard(producer.begin_transaction)
        while refused := self._sender.send(batch):
            self._guard(producer.abort_transaction, self._seconds)
            gone = {id(message) for message, _ in refused}
            batch[:] = [*(item for item in batch if id(item) not in gone), *instead(refused)]
            self._guard(producer.begin_transaction)
        positions = [TopicPartition(topic, number, offset) for (topic, number), offset in offsets.items()]
        if positions:
            metadata = self._membership.group_metadata()
            since = time.monotonic()
            self._guard(producer.send_offsets_to_transaction, positions, metadata, self._seconds)
            if time.monotonic() - since > self._membership.session_seconds:
                # a broker should refuse the offsets of a member that is out of its group, but not every broker does
                raise AbortedError("this process was suspended for longer than its session")
        self._guard(producer.commit_transaction, self._seconds)

    def _renew(self, reason: str, offsets: Mapping[Partition, int]) -> bool:
        """Replace the producer; return whether the transaction of the old one was committed nevertheless."""
        self._membership.group_metadata()  # LostError if our partitions are another's
        now = time.monotonic()
        if len(self._renewals) == RENEWALS and now - self._renewals[0] < RENEWAL_SECONDS:
            raise fenced(reason)
        self._renewals.append(now)
        LOG.warning("the broker refuses our producer (%s), but our partitions are ours: we make a new one", reason)
        with WATCHDOG.limit("purge", CALL_SECONDS):
            self._sender.producer.purge()
        try:
            self._open()  # this also ends the transaction of the old one
        except FencedError as error:
            raise fenced(str(error)) from None
        try:
            committed = self._membership.committed(list(offsets))
        except KafkaException as error:
            raise EdgekitError(
                f"the group's offsets cannot be read: {reason_of(error)}; start again to continue"
            ) from None
        return bool(offsets) and all(committed[where] >= offset for where, offset in offsets.items())

    def _guard(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Call the function, again if the broker says that a retry may work."""
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                with WATCHDOG.limit(call.__name__, self._seconds if arguments else CALL_SECONDS):
                    call(*arguments)
                return
            except KafkaException as exception:
                error = exception.args[0]
                if error.code() == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
                    raise EdgekitError(missing_right(self._who, "Write", f"transactional id {self._name!r}")) from None
                if error.fatal() or error.code() in FENCED:
                    raise FencedError(error.str()) from None
                if error.txn_requires_abort() or error.code() in REBALANCED:
                    raise AbortedError(error.str()) from None
                if not error.retriable() or time.monotonic() > deadline:
                    raise EdgekitError(
                        f"transactions do not work with this broker: {error.str()}; nothing unfinished is visible"
                    ) from None


MSG_TIMED_OUT = KafkaError(KafkaError._MSG_TIMED_OUT)


class NotSentError(Exception):
    """Messages that the broker did not acknowledge, for a reason that is not in the messages."""

    def __init__(self, error: KafkaError, topic: str = "") -> None:
        text = f"{topic}: {error.str()}" if topic else error.str()
        super().__init__(f"{text} ({CAUSES_FOR_ALL})" if error.code() in REFUSED_TO_ALL else text)
        self.text, self.fatal = error.str(), error.fatal() or error.code() in FENCED


class AbortedError(Exception):
    """The transaction must be aborted and may be tried again."""


class FencedError(Exception):
    """The broker refuses this producer: another one has its transactional id, or its epoch is old."""


def fenced(reason: str) -> EdgekitError:
    return EdgekitError(
        f"this member was fenced off: {reason}; another one runs with the same publish.transactional_id, and nothing "
        "unfinished of ours is visible"
    )


FENCED = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError._FATAL}
