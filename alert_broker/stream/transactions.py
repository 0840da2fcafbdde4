"""Exactly once: results and offsets are one transaction. Whoever reads only committed messages sees a batch once or not
at all, and an earlier process of this member is fenced off.

A transaction costs several requests, however many messages it has. So one transaction publishes a window of batches:
those of `publish.commit_seconds`, or of as long as the last transaction took, if that is longer.

A broker can also refuse a producer that no other process has replaced, because librdkafka's epoch is old after the
broker was killed. The group tells the two cases apart. While this member owns the partitions, it replaces its producer,
at most `RENEWALS` times in `RENEWAL_SECONDS`, and sends the window again only if the group has no offset of it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from alert_broker.stream.clients import REBALANCED, producer_settings, reason_of
from alert_broker.stream.config import Config
from alert_broker.stream.connect import principal
from alert_broker.stream.ledger import Partition
from alert_broker.stream.membership import LostError, Membership
from alert_broker.stream.message_batch import next_offsets
from alert_broker.stream.publication import Publication
from alert_broker.stream.rights import missing_right
from alert_broker.stream.sender import FENCED, FLUSH_SECONDS, NotSentError, Refused, Sender
from alert_broker.stream.watchdog import WATCHDOG
from alert_broker.work_budget import Budget, CancelledError
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
ATTEMPTS = 5  # at a transaction that the broker asks to have aborted
# a limit, because two members with one transactional id would fence each other off for ever
RENEWALS, RENEWAL_SECONDS = 3, 600.0
RETRY_SECONDS = 0.05  # before a call is repeated
CALL_SECONDS = 30.0  # time limit of a call that has no limit of its own


class ExactlyOnce:
    """Collects a window of batches, and publishes it in one transaction with the offsets in it."""

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
        self._settings |= {
            "transactional.id": name,
            "transaction.timeout.ms": int(config.publish.seconds * 1000),
            # if the queue is empty and no error was reported, every message was delivered
            "delivery.report.only.error": True,
        }
        self._renewals: deque[float] = deque(maxlen=RENEWALS)  # monotonic seconds
        self._window: list[Publication] = []
        self._closing = False  # whether a window is being published
        self._window_seconds, self._most = config.publish.commit_seconds, config.publish.uncommitted
        self._opened = self._took = 0.0  # when the window was opened; seconds that the last transaction took
        try:
            self._open()
        except FencedError as error:
            raise fenced(str(error)) from None

    @property
    def busy(self) -> bool:
        return bool(self._window) or self._closing

    def make_room(self) -> None:
        self.serve()
        if len(self._window) >= self._most:
            self._close_window()

    def publish(self, publication: Publication) -> None:
        if not self._window:
            self._opened = time.monotonic()
        self._window.append(publication)

    def serve(self) -> None:
        open_for = time.monotonic() - self._opened
        if self._window and (open_for >= max(self._window_seconds, self._took) or self._membership.draining):
            self._close_window()

    def finish(self) -> None:
        if self._window:
            self._close_window()

    def give_up(self) -> None:
        self._window.clear()

    def _close_window(self) -> None:
        """Publish the window, as far as its alerts are still ours."""
        self._closing = True
        window, self._window = self._window, []
        started = time.monotonic()
        try:
            self._publish_window(window)
        finally:
            self._closing = False
        self._took = time.monotonic() - started

    def _publish_window(self, window: Sequence[Publication]) -> None:
        with self._membership.publishing:
            owned = [self._membership.owned(publication.batch) for publication in window]
            offsets: dict[Partition, int] = {}
            for publication, mine in zip(window, owned, strict=True):
                publication.messages = [message for message in publication.messages if mine[message.alert_index]]
                offsets |= next_offsets(publication.batch, mine)
            if offsets:
                try:
                    self._publish(window, offsets)
                except LostError as error:  # the ledger is updated when the partitions are revoked
                    alerts = sum(len(publication.batch) for publication in window)
                    LOG.warning("another member will process %d alerts again: %s", alerts, error)
                    return
            for publication, mine in zip(window, owned, strict=True):
                if mine.any():
                    publication.account(mine)

    def _publish(self, window: Sequence[Publication], offsets: Mapping[Partition, int]) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._transaction(window, offsets)
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

    def _open(self) -> None:
        self._sender = Sender(self._settings, self._seconds, self._budget)
        self._guard(self._sender.producer.init_transactions, self._seconds)

    def _transaction(self, window: Sequence[Publication], offsets: Mapping[Partition, int]) -> None:
        """Send and commit; if that fails, abort and raise AbortedError, LostError or FencedError. Messages that no
        broker takes are replaced in the window."""
        producer = self._sender.producer
        try:
            self._send(window)
            self._commit(offsets)
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

    def _send(self, window: Sequence[Publication]) -> None:
        producer = self._sender.producer
        self._guard(producer.begin_transaction)
        while refused := self._sender.send([message for publication in window for message in publication.messages]):
            self._guard(producer.abort_transaction, self._seconds)
            for publication in window:
                replace(publication, refused)
            self._guard(producer.begin_transaction)

    def _commit(self, offsets: Mapping[Partition, int]) -> None:
        producer = self._sender.producer
        positions = [TopicPartition(topic, number, offset) for (topic, number), offset in offsets.items()]
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
        return all(committed[where] >= offset for where, offset in offsets.items())

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
                time.sleep(RETRY_SECONDS)


class AbortedError(Exception):
    """The transaction must be aborted and may be tried again."""


class FencedError(Exception):
    """The broker refuses this producer: another one has its transactional id, or its epoch is old."""


def replace(publication: Publication, refused: Refused) -> None:
    """Replace those messages of a batch that no broker takes."""
    reasons = {id(message): reason for message, reason in refused}
    mine = [(message, reasons[id(message)]) for message in publication.messages if id(message) in reasons]
    kept = [message for message in publication.messages if id(message) not in reasons]
    publication.messages = [*kept, *(publication.instead(mine) if mine else [])]


def fenced(reason: str) -> EdgekitError:
    return EdgekitError(
        f"this member was fenced off: {reason}; another one runs with the same publish.transactional_id, and nothing "
        "unfinished of ours is visible"
    )
