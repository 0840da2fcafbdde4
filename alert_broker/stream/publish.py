"""Publish results and dead letters, and commit the offsets after that.

Batches are sent while earlier ones are not acknowledged yet. At least once: once brokers have acknowledged a batch and
all batches before it, its offsets may be committed, which happens in the background. At most `publish.uncommitted`
batches are published and not committed, so a crash repeats at most these. Exactly once: see `transactions`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from confluent_kafka import KafkaError, Message

from alert_broker.stream.clients import producer_settings
from alert_broker.stream.config import Config
from alert_broker.stream.membership import Membership
from alert_broker.stream.message_batch import next_offsets
from alert_broker.stream.publication import Publication
from alert_broker.stream.sender import FLUSH_SECONDS, NotSentError, Outgoing, Report, Sender, refused
from alert_broker.stream.transactions import ExactlyOnce
from alert_broker.work_budget import Budget
from edgekit.errors import EdgekitError

ROOM_STEP = 0.005  # seconds between looks whether a batch was committed, while too many are not


class Publisher(Protocol):
    """Publishes batches in order, and commits their offsets. One thread uses it, which calls `serve` every few
    milliseconds while `busy`."""

    @property
    def busy(self) -> bool: ...

    def make_room(self) -> None:
        """Wait until one more batch may be published."""
        ...

    def publish(self, publication: Publication) -> None:
        """Send a batch without waiting for the brokers' answer."""
        ...

    def serve(self) -> None:
        """Act on the brokers' answers."""
        ...

    def finish(self) -> None:
        """Return when the brokers have all messages."""
        ...

    def give_up(self) -> None:
        """Do not wait for what the brokers have not acknowledged; act on what they have."""
        ...


def open_publisher(config: Config, membership: Membership, budget: Budget | None = None) -> Publisher:
    """budget: once it is cancelled, the publisher waits for no broker any more; what is not acknowledged by then is not
    committed."""
    if config.publish.mode == "exactly-once":
        return ExactlyOnce(config, membership, budget)
    return AtLeastOnce(config, membership, budget)


class AtLeastOnce:
    """Delivery reports tell what is acknowledged."""

    def __init__(self, config: Config, membership: Membership, budget: Budget | None = None) -> None:
        self._membership, self._budget = membership, budget or Budget()
        self._sender = Sender(producer_settings(config), config.publish.seconds, budget)
        self._waiting: deque[Publication] = deque()  # sent and not yet acknowledged, the oldest first
        self._published, self._most = 0, config.publish.uncommitted

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def make_room(self) -> None:
        self.serve()
        while self._published - self._membership.commits.batches >= self._most:
            self._membership.commits.hurry()
            self._act(lambda: self._sender.poll(ROOM_STEP))
            self._budget.check()

    def publish(self, publication: Publication) -> None:
        self._published += 1
        self._waiting.append(publication)
        self._act(lambda: self._send(publication, publication.messages))

    def serve(self) -> None:
        self._act(lambda: self._sender.poll(0.0))

    def finish(self) -> None:
        while self._waiting:
            self._act(self._sender.wait)

    def give_up(self) -> None:
        self._act(lambda: self._sender.flush(FLUSH_SECONDS))

    def _act(self, call: Callable[[], object]) -> None:
        """Call the producer, and finish the batches that are acknowledged then."""
        try:
            call()
            self._resend()
        except NotSentError as error:
            raise EdgekitError(
                f"results cannot be published: {error}; nothing that is not published was committed; start again to "
                "continue"
            ) from None
        while self._waiting and not self._waiting[0].unanswered:
            self._finish(self._waiting.popleft())

    def _send(self, publication: Publication, messages: Sequence[Outgoing]) -> None:
        publication.unanswered += len(messages)
        for message in messages:
            self._sender.produce(message, _report(publication, message))

    def _resend(self) -> None:
        """Send other messages in place of those that were refused."""
        for publication in self._waiting:
            if publication.failed and not publication.unanswered:
                failed, publication.failed = publication.failed, []
                self._send(publication, publication.instead(refused(failed)))

    def _finish(self, publication: Publication) -> None:
        batch, membership = publication.batch, self._membership
        with membership.publishing:
            owned = membership.owned(batch)
            if owned.any():
                publication.account(owned)
            membership.commits.acknowledge(next_offsets(batch, owned))


def _report(publication: Publication, message: Outgoing) -> Report:
    def report(error: KafkaError | None, _: Message | None) -> None:
        publication.unanswered -= 1
        if error is not None:
            publication.failed.append((message, error))

    return report
