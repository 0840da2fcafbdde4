"""The consumer: poll -> decode -> classify -> route -> publish -> commit, over batches of alerts.

The calling thread polls, and each of the three stages has a thread of its own. Compiled code (the Avro decoder, the
Gaussian process, the network) releases the interpreter lock, so the stages overlap. Queues of a few batches are between
them; when they are full, fetching is paused, so that memory is bounded. The order of the messages is kept throughout,
so it is safe to commit the offset after the last message of a batch.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from confluent_kafka import KafkaException

from alert_broker.classify import Classifiers, load_kernels
from alert_broker.packets import AlertBatch
from alert_broker.stream.archive import Archive, Positions
from alert_broker.stream.clients import reason_of
from alert_broker.stream.config import Config
from alert_broker.stream.connect import reach
from alert_broker.stream.dead_letters import (
    UNREADABLE,
    DeadLetter,
    DeadLetterLimits,
    category_of,
    outgoing,
    position_headers,
    stack_digest,
    without_content,
)
from alert_broker.stream.outputs import Registry
from alert_broker.stream.publish import Outgoing, Refused, open_publisher
from alert_broker.stream.registry import HttpRegistry, RegistryError, open_registry
from alert_broker.stream.reuse import COLUMNS, Reuse
from alert_broker.stream.rights import require_topics
from alert_broker.stream.routing import Route, Router
from alert_broker.stream.source import LostError, MessageBatch, Source, next_offsets
from alert_broker.stream.stages import Stages
from alert_broker.stream.stats import Stats
from alert_broker.stream.unreadable import UnreadableMessage
from alert_broker.work_budget import Budget, CancelledError
from edgekit.bundle.format import Bundle
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
PAUSE_AFTER = (
    1.0  # seconds of full queues before fetching is paused; a pause drops the messages that librdkafka has read ahead
)
IDLE_POLL = 0.01  # seconds between checks for requests of the publishing thread
REGISTRY_RETRY = 1.0  # seconds between attempts to reach a registry that does not answer


@dataclass(slots=True)
class InFlight:
    """A batch that is being processed. alerts: set by decoding; rows: set by classifying; index: (rows,) the index in
    the batch of each row's message; dead_letters: the messages that have no row."""

    batch: MessageBatch
    alerts: list[AlertBatch] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    rows: pa.RecordBatch | None = None
    index: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


class Pipeline:
    """The consumer's threads. `run` returns after `stop` has returned true, or at the end of the topic. At the end of
    the topic everything is published and committed. After `stop`, what is in flight has `source.stop_seconds` to be
    published and committed; the rest is given up without a commit, and the next run reads it again. `run` raises if a
    stage failed or if the ledger does not add up."""

    def __init__(self, config: Config, stats: Stats, *, notify: Callable[[str], None] = lambda message: None) -> None:
        from edgekit.importers.files import resolve

        self.config, self.stats = config, stats
        bundle = resolve(config.model.bundle) if config.model.bundle else None
        self._cancelled = threading.Event()  # set when the batches in flight are given up
        budget = Budget(config.model.alert_seconds, self._cancelled.is_set)
        classifiers = open_classifiers(config, bundle, budget)
        load_kernels(notify)
        classifiers.open_all()
        for item in classifiers.opened.values():
            item.session.warmup(config.batch.size)
            stats.models[item.bundle.manifest.name] = item.bundle.digest
        self._stopping = threading.Event()  # set when no stage should wait for the registry any more
        registry = self._open_registry() if config.registry.url else None
        self._registry = registry
        self.stages = Stages(classifiers, registry.schema if registry else None, budget)
        routes = [Route(item.topic, item.where, item.format, item.attach) for item in config.output]
        self.router = Router(routes, classifiers.schema, registry=registry) if routes else None
        if self.router is not None:
            self.router.warm_up()
        self._attaches = any(item.attach != "nothing" for item in config.output)
        self.archive = Archive(Path(config.archive.folder), classifiers.schema) if config.archive.folder else None
        self.source = Source(config, stats)
        try:
            self.publisher = open_publisher(config, self.source, budget)
        except BaseException:
            self.source.close()
            raise
        self._limits = DeadLetterLimits(config.dead_letters)
        self._failure: BaseException | None = None
        self._queues = {
            name: queue.Queue[InFlight | None](config.batch.queue) for name in ("decode", "classify", "publish")
        }
        self._stopped_at: float | None = None  # monotonic seconds at which `stop` returned true
        self._waiting: deque[InFlight] = deque()  # batches that were read and not yet given to a stage
        self._stop: Callable[[], bool] = lambda: False
        self.source.while_draining = self._keep_moving
        self.source.cancelled = self._cancelled.is_set

    def _open_registry(self) -> Registry:
        return open_registry(
            self.config.registry_url(),
            sleep=self._stopping.wait,
            stopped=self._stopping.is_set,
            seconds=self.config.registry.seconds,
        )

    def run(self, stop: Callable[[], bool]) -> None:
        self._stop = self.source.stopping = stop
        threads = [
            threading.Thread(target=self._serve, args=arguments, name=f"edgekit-{arguments[0]}", daemon=True)
            for arguments in (
                ("decode", self._decode, "classify"),
                ("classify", self._classify, "publish"),
                ("publish", self._publish, None),
            )
        ]
        for thread in threads:
            thread.start()
        try:
            self._poll()
        except BaseException as error:
            self._failure = self._failure or error
            if not isinstance(error, Exception):  # a second Ctrl-C: the user does not want to wait
                raise
        finally:
            threading.Thread(target=self._put, args=("decode", None), daemon=True).start()  # may have to wait for room
            if not isinstance(self._failure, KeyboardInterrupt):
                self._join(threads)
                if self._failure is None and not self._cancelled.is_set():
                    try:
                        self.stats.ledger.check()  # before revoking takes alerts off the ledger
                    except EdgekitError as error:
                        self._failure = error
                self.source.close()
                self.publisher.close()
        if self._failure is not None:
            raise self._failure

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        """Wait for the stages. After a stop they have the configured time; then the rest is given up."""
        for thread in threads:
            while thread.is_alive():
                self.source.serve()
                self._give_up_when_late()
                thread.join(IDLE_POLL)
        if self._cancelled.is_set() and self._failure is None:
            left = self.stats.ledger.total().in_flight
            LOG.warning("stopped with %d alerts in flight: they were not committed and will be read again", left)

    def _give_up_when_late(self) -> None:
        """Give up the batches in flight after a failure, or if they have not finished in time after a stop."""
        late = self._is_stopped() and time.monotonic() - (self._stopped_at or 0.0) > self.config.source.stop_seconds
        if late or self._failure is not None:
            self._stopping.set()
            self._cancelled.set()

    # --- polling

    def _poll(self) -> None:
        waiting = self._waiting
        full_since = 0.0
        while self._failure is None and not self._is_stopped():
            if not waiting:
                batch = self.source.poll(self.config.batch.size, self.config.batch.seconds)
                if batch is not None:
                    self.stats.batch(len(batch))
                    waiting.append(InFlight(batch))
                    full_since = time.monotonic()
                else:
                    if self.source.caught_up and self.stats.ledger.total().in_flight == 0:
                        self.stats.progress()
                    if self.config.source.until_eos and self.source.at_end:
                        return
                continue
            try:
                self._queues["decode"].put(waiting[0], timeout=IDLE_POLL)
                waiting.popleft()
                self.source.pause(False)
            except queue.Full:
                self.source.serve()
                if time.monotonic() - full_since > PAUSE_AFTER:
                    self.source.pause(True)
                    # a paused consumer gets no messages, but must poll to stay in the group and to notice revocations
                    if (batch := self.source.poll(self.config.batch.size, 0.0)) is not None:
                        waiting.append(InFlight(batch))
        while waiting and self._failure is None:
            self._hand_on()
            self.source.serve()
            self._give_up_when_late()
            time.sleep(IDLE_POLL)

    def _is_stopped(self) -> bool:
        if self._stopped_at is None and self._stop():
            self._stopped_at = time.monotonic()
            self._stopping.set()
        return self._stopped_at is not None

    def _keep_moving(self) -> bool:
        """Hand on waiting batches while a partition is drained; return whether the stages still work."""
        self._hand_on()
        self._give_up_when_late()
        return not self._cancelled.is_set()

    def _hand_on(self) -> None:
        """Give waiting batches to the stages as far as there is room."""
        try:
            while self._waiting:
                self._queues["decode"].put_nowait(self._waiting[0])
                self._waiting.popleft()
        except queue.Full:
            pass

    # --- stages

    def _serve(self, name: str, stage: Callable[[InFlight], InFlight | None], following: str | None) -> None:
        """Process batches from this stage's queue and pass them on, until None arrives. After a failure, or once the
        work in flight is given up, drop them: every later batch is dropped, too, so that none is committed."""
        source = self._queues[name]
        while (work := source.get()) is not None:
            self.stats.queue_depths[name] = source.qsize()
            if self._failure is not None or self._cancelled.is_set():
                continue
            try:
                stage(work)
            except CancelledError:
                continue
            except BaseException as error:
                LOG.debug("the stage %s failed", name, exc_info=True)
                self._failure = self._failure or error
                continue
            if following:
                self._put(following, work)
        if following:
            self._put(following, None)

    def _put(self, name: str, work: InFlight | None) -> None:
        self._queues[name].put(work)

    def _decode(self, work: InFlight) -> None:
        values = [message.value() for message in work.batch.messages]
        deadline = time.monotonic() + self.config.registry.seconds
        while True:
            try:
                with self.stats.stage("decode"):
                    work.alerts, work.dead_letters = self.stages.decode(values)
                for number, dead_letter in enumerate(work.dead_letters):
                    message: Any = work.batch.messages[dead_letter.index]
                    if isinstance(message, UnreadableMessage):
                        work.dead_letters[number] = DeadLetter(dead_letter.index, message.reason, UNREADABLE)
                return
            except RegistryError as error:  # no alert is at fault: wait; fetching is paused meanwhile
                if self._stopping.is_set():
                    raise
                if isinstance(self._registry, HttpRegistry) and self._registry.blames(error):
                    LOG.warning("messages with schema %d become dead letters: %s", error.identifier, error)
                    continue
                if time.monotonic() > deadline:
                    raise
                LOG.warning("%s; trying again", error)
                self._stopping.wait(REGISTRY_RETRY)

    def _classify(self, work: InFlight) -> None:
        before = self.stages.classifiers.seconds
        rows, dead_letters = self.stages.classify(work.alerts)
        for stage, seconds in self.stages.classifiers.seconds.items():
            self.stats.observe(stage, seconds - before[stage])
        work.dead_letters += dead_letters
        work.index = rows["offset"].to_numpy()
        work.rows = with_positions(rows, work.batch, work.index)
        work.alerts = []

    def _publish(self, work: InFlight) -> None:
        with self.stats.stage("route"):
            results = self._results(work)
            batch, rows, index = work.batch, work.rows, work.index
            assert rows is not None
            dead_letters = sorted(work.dead_letters, key=lambda dead_letter: dead_letter.index)
            assert len(index) + len(dead_letters) == len(batch)
            published, dead = np.zeros(len(batch), np.bool_), np.zeros(len(batch), np.bool_)
            published[index if self.archive else [message.alert_index for message in results]] = True
        with self.source.publishing:
            owned = self.source.owned(batch)
            if not owned.any():
                return
            self._limits.check(dead_letters, len(batch))
            if self.archive is not None:
                keep = owned[index]
                self.archive.write(rows.filter(pa.array(keep)), positions_of(batch, index[keep]))
            messages = [message for message in results if owned[message.alert_index]]
            messages += [self._outgoing(dead_letter, work) for dead_letter in dead_letters if owned[dead_letter.index]]
            dead[[dead_letter.index for dead_letter in dead_letters]] = True

            def instead(refused: Refused) -> list[Outgoing]:
                """If brokers refuse results for good, their alert becomes a dead letter: one, however many outputs
                refuse it."""
                mine = self.config.dead_letters.topic
                found = [without_content(message, reason) for message, reason in refused if message.topic == mine]
                reasons: dict[int, list[str]] = {}
                for message, reason in refused:
                    if message.topic != mine and not dead[message.alert_index]:
                        reasons.setdefault(message.alert_index, []).append(reason)
                for number, texts in reasons.items():
                    dead_letters.append(DeadLetter(number, f"the result cannot be sent: {'; '.join(texts)}"))
                    dead[number] = True
                    found.append(self._outgoing(dead_letters[-1], work))
                return found

            try:
                with self.stats.stage("publish"):
                    self.publisher.publish(messages, next_offsets(batch, owned), instead)
            except LostError as error:  # the ledger is updated when the partitions are revoked
                LOG.warning("another member will process a batch of %d alerts again: %s", len(batch), error)
                return
            self._account(work, owned, published & ~dead, dead, dead_letters)

    def _results(self, work: InFlight) -> list[Outgoing]:
        """Return the messages of a batch's rows. If the program fails on a row, its alert becomes a dead letter."""
        if self.router is None or len(work.index) == 0:
            return []
        try:
            return self._route(work)
        except EdgekitError:
            raise
        except Exception:
            LOG.warning("writing the results of a batch failed; each is written alone now", exc_info=True)
        results: list[Outgoing] = []
        good: list[int] = []
        assert work.rows is not None
        for row, index in enumerate(work.index.tolist()):
            alone = InFlight(work.batch, rows=work.rows.slice(row, 1), index=work.index[row : row + 1])
            try:
                results += self._route(alone)
                good.append(row)
            except Exception as error:
                reason = f"the result cannot be written ({type(error).__name__}: {error})"
                work.dead_letters.append(DeadLetter(index, reason, stack=stack_digest(error)))
        work.rows, work.index = work.rows.take(pa.array(good, pa.int64())), work.index[good]
        return results

    def _route(self, work: InFlight) -> list[Outgoing]:
        assert self.router is not None
        messages, index = work.batch.messages, work.index.tolist()
        packets = [messages[k].value() or b"" for k in index] if self._attaches else None
        headers = [position_headers(messages[k]) for k in index]
        routed = self.router(work.rows, packets, self.stages.schema_text)
        return [
            Outgoing(message.topic, message.value, headers[message.row], index[message.row], message.key)
            for message in routed.messages
        ]

    def _outgoing(self, dead_letter: DeadLetter, work: InFlight) -> Outgoing:
        return outgoing(dead_letter, work.batch.messages[dead_letter.index], self.config.dead_letters.topic)

    def _account(
        self,
        work: InFlight,
        owned: npt.NDArray[np.bool_],
        published: npt.NDArray[np.bool_],
        dead: npt.NDArray[np.bool_],
        dead_letters: Sequence[DeadLetter],
    ) -> None:
        """Write the outcome of each alert into the ledger and the statistics."""
        ledger, batch, stats = self.stats.ledger, work.batch, self.stats
        columns = {"published": published, "dead_lettered": dead, "filtered": ~published & ~dead}
        for name, chosen in columns.items():
            for where, number in batch.counts(chosen & owned).items():
                ledger.add(where, **{name: number})
        stats.observe("end-to-end", time.monotonic() - batch.received, int(owned.sum()))
        stats.dead_letters(category_of(dead_letter.reason) for dead_letter in dead_letters if owned[dead_letter.index])
        assert work.rows is not None
        for item in work.rows["best_class"].drop_null().value_counts().to_pylist():
            stats.classes[item["values"]] += item["counts"]
        stats.progress()


def open_classifiers(config: Config, bundle: Bundle | None, budget: Budget | None = None) -> Classifiers:
    """Open the models. If the configuration says so, each reuses its last classification of an object."""
    same = config.model.reuse
    threads = config.model.threads or None
    if same == "off":
        return Classifiers(bundle, config.model.runtime, threads=threads, budget=budget)
    wrap = functools.partial(Reuse, same=same)
    return Classifiers(bundle, config.model.runtime, threads=threads, wrap=wrap, columns=COLUMNS, budget=budget)


def positions_of(batch: MessageBatch, index: npt.NDArray[np.int64]) -> Positions:
    """Return the positions of these messages of the batch."""
    topics = [topic for topic, _ in batch.partitions]
    numbers = np.array([number for _, number in batch.partitions], np.int64)
    of = batch.partition[index]
    stamps = np.array([batch.messages[k].timestamp()[1] for k in index.tolist()], np.int64)
    return Positions([topics[k] for k in of.tolist()], numbers[of], batch.offset[index], stamps)


def with_positions(rows: pa.RecordBatch, batch: MessageBatch, index: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """Return the rows with their message's topic and partition in `file`, and its offset in `offset`."""
    texts = pa.array([f"{topic}[{number}]" for topic, number in batch.partitions], pa.string())
    files = pa.DictionaryArray.from_arrays(pa.array(batch.partition[index]), texts).cast(pa.string())
    columns: dict[str, Any] = {"file": files, "offset": pa.array(batch.offset[index])}
    arrays = [columns.get(name, rows[name]) for name in rows.schema.names]
    return pa.RecordBatch.from_arrays(arrays, schema=rows.schema)


def open_pipeline(
    config: Config,
    stats: Stats,
    stop: Callable[[], bool] = lambda: False,
    notify: Callable[[str], None] = lambda message: None,
) -> Pipeline | None:
    """Wait for the broker, then open models, topics and clients; None if `stop` comes before the broker answers."""
    client = reach(config.kafka_settings(), stop)
    if client is None:
        return None
    require_topics(client, config)
    return Pipeline(config, stats, notify=notify)


@contextmanager
def client_errors() -> Iterator[None]:
    """Turn an error of the Kafka client that nothing else has explained into one for the user."""
    try:
        yield
    except KafkaException as error:
        raise EdgekitError(f"the Kafka client failed: {reason_of(error)}; start again to continue") from error


def run(
    config: Config, stats: Stats, stop: Callable[[], bool], notify: Callable[[str], None] = lambda message: None
) -> None:
    """Wait for the broker, then consume until `stop` or, if so configured, the end."""
    with client_errors():
        pipeline = open_pipeline(config, stats, stop, notify)
        if pipeline is not None:
            pipeline.run(stop)
