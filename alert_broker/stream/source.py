"""Read batches of messages from Kafka, from the partitions that this member of the group owns."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from confluent_kafka import KafkaError, Message, TopicPartition

from alert_broker.stream.clients import HOPELESS, consumer_settings, open_consumer, partitions_of
from alert_broker.stream.config import Config
from alert_broker.stream.connect import principal
from alert_broker.stream.consumer_positions import ConsumerPositions
from alert_broker.stream.lag import Lag
from alert_broker.stream.ledger import Partition
from alert_broker.stream.membership import Membership
from alert_broker.stream.message_batch import MessageBatch, partition_of, position_of
from alert_broker.stream.rights import missing_right
from alert_broker.stream.start import reset_group
from alert_broker.stream.stats import Stats
from alert_broker.stream.topic_ids import TopicIds
from alert_broker.stream.unreadable import UnreadableBatches
from alert_broker.stream.watchdog import WATCHDOG
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
POLL_SECONDS = 0.02  # seconds between checks for requests of the publishing thread
USUAL_BYTES = 65_536  # assumed size of a message before the first one was read
CALL_SECONDS = 60.0  # time limit of a call that has no limit of its own
STALE_SECONDS = 120.0  # after the end of a session, for which a request of that session may come to the broker again
FENCED = KafkaError(KafkaError.FENCED_INSTANCE_ID).str()


class Source:
    """The consumer. Only the thread that made it may use it; other threads use `membership`."""

    def __init__(self, config: Config, stats: Stats) -> None:
        self.config, self.stats = config, stats
        self._at_end: set[Partition] = set()
        self._paused = False
        self._largest = USUAL_BYTES  # bytes of the largest message so far
        self.stopping: Callable[[], bool] = lambda: False  # whether `poll` should return early
        settings = consumer_settings(config)
        if config.source.start_at not in ("earliest", "latest"):
            reset_group(config, settings)
        self.consumer = open_consumer(
            settings, committed=lambda error, partitions: self.membership.commits.answered(error, partitions)
        )
        self.membership = Membership(config, stats, self.consumer, settings, self)
        self.positions = ConsumerPositions(self.consumer, config.source, stats.ledger)
        self._unreadable = UnreadableBatches(self.consumer, config.source)
        self._lag = Lag(config)
        self._topic_ids = TopicIds(self._lag.admin, config.source.topics)
        for topic in config.source.topics:
            partitions_of(self.consumer, topic)  # raises now if the broker or the topic is not there
        self.membership.subscribe(config.source.topics)

    def poll(self, size: int, seconds: float) -> MessageBatch | None:
        """Return up to `size` messages that come within these seconds, or None if none comes. The batch ends earlier
        when it has `batch.bytes`. Its last message may exceed that limit, and so may messages that come with it if they
        are larger than all messages before."""
        if self._unreadable.skipped:
            self.membership.serve()
            return self._skipped(size)
        good: list[Message] = []
        index: dict[Partition, int] = {}
        partition, offset = [], []
        for message in self._messages(size, time.monotonic() + seconds):
            if (fault := message.error()) is not None:
                self._note_error(fault, message)
                continue
            where, number = position_of(message)
            if where not in self.membership.generations:  # read before the partition was taken away
                continue
            partition.append(index.setdefault(where, len(index)))
            offset.append(number)
            good.append(message)
            self._at_end.discard(where)
            self.positions.next[where] = number + 1
        if not good:
            self._look_at_lag()
            return None
        return self._batch(good, index, partition, offset)

    def _messages(self, size: int, deadline: float) -> list[Message]:
        """Return up to `size` messages, ends of partitions and errors that come until then; see `poll`."""
        messages: list[Message] = []
        generations, room = self.membership.generations, self.config.batch.bytes
        for topic in self._topic_ids.changed():
            self.positions.note_new_topic(topic, generations)
            self.membership.begin_again(topic)
        self._choose_positions()
        before = dict(generations)
        while True:
            self.membership.serve()
            slice_seconds = min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
            number = min(size - len(messages), max(1, room // self._largest))
            with WATCHDOG.limit("consume", CALL_SECONDS):
                found = self._unreadable.take(self.consumer.consume(number, slice_seconds), self.positions.next)
            sizes = [len(message) for message in found]
            self._largest, room = max(self._largest, *sizes, 0), room - sum(sizes)
            if generations != before:
                # another member may own the messages that were read earlier, even if we have the partition again
                return [item for item in messages if self._counts(item, before)] + found
            messages += found
            if len(messages) >= size or room <= 0 or time.monotonic() >= deadline or self.stopping():
                return messages

    def _skipped(self, size: int) -> MessageBatch:
        """Return offsets of a record batch that cannot be read, as messages. Nothing is fetched before all of them were
        returned."""
        skipped = self._unreadable.skipped
        chosen: list[Any] = [skipped.popleft() for _ in range(min(size, len(skipped)))]
        index: dict[Partition, int] = {}
        partition = [index.setdefault(item.where, len(index)) for item in chosen]
        self.positions.next |= {item.where: item.at + 1 for item in chosen}
        return self._batch(chosen, index, partition, [item.at for item in chosen])

    def _batch(
        self, good: Sequence[Message], index: dict[Partition, int], partition: list[int], offset: list[int]
    ) -> MessageBatch:
        """Count these messages as consumed, and return them as a batch."""
        batch = MessageBatch(
            good,
            tuple(index),
            tuple(self.membership.generations[where] for where in index),
            np.array(partition, np.int64),
            np.array(offset, np.int64),
            time.monotonic(),
        )
        for where, number in batch.counts(np.ones(len(batch), np.bool_)).items():
            self.stats.ledger.add(where, consumed=number)
        self._look_at_lag()
        return batch

    def _counts(self, message: Message, before: Mapping[Partition, int]) -> bool:
        """Return whether this member has owned the partition of a message, or of an event, all the time since `before`.
        Other errors always count."""
        error = message.error()
        if error is not None and error.code() not in (KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET):
            return True
        where = partition_of(message)
        return where in before and before[where] == self.membership.generations.get(where)

    @property
    def at_end(self) -> bool:
        """Whether at least one partition is assigned and all assigned partitions were read to their end."""
        assigned = set(self.membership.generations)
        return bool(assigned) and self._at_end >= assigned

    @property
    def caught_up(self) -> bool:
        """Whether no message waits in the assigned partitions, according to the broker. An end that was reached earlier
        proves nothing, because the consumer may be stuck since; it is used only if the broker does not answer."""
        lag = self.stats.lag
        return all(not lag[where] if where in lag else where in self._at_end for where in self.membership.generations)

    def pause(self, paused: bool) -> None:
        """Stop fetching, or resume. `poll` must still be called, so that this member stays in the group."""
        if paused != self._paused:
            with WATCHDOG.limit("pause", CALL_SECONDS):
                assigned = self.consumer.assignment()
                (self.consumer.pause if paused else self.consumer.resume)(assigned)
            self._paused = self.stats.paused = paused

    def serve(self) -> None:
        """Carry out the requests of the publishing thread while there is nothing to poll for."""
        self.membership.serve_idle()

    def close(self) -> None:
        """Leave the group. Batches that are still in flight are never published."""
        with WATCHDOG.limit("close", CALL_SECONDS):
            self.membership.leave()

    # --- called by the membership, inside `poll` and `close`

    def begin(self, partitions: list[TopicPartition], committed: Mapping[Partition, int]) -> None:
        for item in partitions:
            where = item.topic, item.partition
            self._at_end.discard(where)
            self._lag.forget(where)
        self.positions.next |= committed
        self.consumer.incremental_assign(partitions)
        # librdkafka remembers that a revoked partition was paused, and would never fetch it again
        (self.consumer.pause if self._paused else self.consumer.resume)(partitions)

    def end(self, where: Partition) -> None:
        self._at_end.discard(where)
        self.stats.lag.pop(where, None)
        self.positions.forget(where)
        self._unreadable.forget(where)
        self._lag.forget(where)

    # --- events that come as messages

    def _note_error(self, error: KafkaError, message: Message) -> None:
        if error.code() == KafkaError._PARTITION_EOF:
            where, position = position_of(message)
            if where in self.membership.generations:
                self._at_end.add(where)
                self.positions.next[where] = position  # also behind the markers of transactions, which are no messages
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
            where = partition_of(message)
            if where in self.membership.generations:
                self.positions.note_missing(where, message.offset())
                self._choose_positions()
        elif FENCED in error.str():
            self._end_as_fenced()
        elif error.code() in HOPELESS or error.fatal():
            raise EdgekitError(self._refusal(error, message.topic()))
        else:
            LOG.warning("%s", error.str())

    def _end_as_fenced(self) -> None:
        """The client can do nothing more. Either another process has joined as the same instance, or our session ended
        while the broker was away. librdkafka then forgets its member id, and the broker takes a commit or a heartbeat
        that is sent nevertheless for one of another process."""
        instance = self.config.source.instance
        if self.membership.was_lost_within(STALE_SECONDS):
            WATCHDOG.end(
                f"the broker refuses this member, as if another process had the instance {instance!r}; our own session "
                "ended shortly before, so it may have refused an old request of ours"
            )
        raise EdgekitError(
            f"another process has joined the group {self.config.source.group!r} with the instance {instance!r}; stop "
            "it, or set source.instance to another name for each member"
        )

    def _choose_positions(self) -> None:
        for where in self.positions.choose():
            self._at_end.discard(where)
            if self._paused:
                self.consumer.pause([TopicPartition(*where)])

    def _refusal(self, error: KafkaError, topic: str | None) -> str:
        """Return the message for an error that waiting does not cure."""
        who = principal(self.config.kafka)
        if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            return missing_right(who, "Read", f"group {self.config.source.group!r}")
        if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED and topic:
            return missing_right(who, "Read", f"topic {topic!r}")
        return f"the broker refuses to be read: {error.str()}{f' ({topic})' if topic else ''}"

    def _look_at_lag(self) -> None:
        self.stats.lag = self._lag.look(self.membership.generations, self.positions.next)
