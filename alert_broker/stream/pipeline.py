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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from alert_broker.stream.archive import Archive
from alert_broker.stream.classifiers import open_all_classifiers
from alert_broker.stream.config import Config
from alert_broker.stream.dead_letters import UNREADABLE, DeadLetter, DeadLetterLimits
from alert_broker.stream.in_flight import InFlight, positions_of, with_positions
from alert_broker.stream.offset_commits import COMMIT_SECONDS
from alert_broker.stream.outcome import Outcome, ResultWriter
from alert_broker.stream.outputs import Registry
from alert_broker.stream.publication import Owned, Publication
from alert_broker.stream.publish import open_publisher
from alert_broker.stream.registry import HttpRegistry, RegistryError, open_registry
from alert_broker.stream.routing import Route, Router
from alert_broker.stream.source import Source
from alert_broker.stream.stages import Stages
from alert_broker.stream.stats import Stats
from alert_broker.stream.unreadable import UnreadableMessage
from alert_broker.work_budget import Budget, CancelledError
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
PAUSE_AFTER = (
    1.0  # seconds of full queues before fetching is paused; a pause drops the messages that librdkafka has read ahead
)
IDLE_POLL = 0.01  # seconds between checks for requests of the publishing thread
ANSWER_STEP = 0.005  # seconds between looks for the brokers' answers to what was published
REGISTRY_RETRY = 1.0  # seconds between attempts to reach a registry that does not answer


class Pipeline:
    """The consumer's threads. `run` returns after `stop` has returned true, or at the end of the topic. At the end of
    the topic everything is published and committed. After `stop`, what is in flight has `source.stop_seconds` to be
    published and committed; the rest is given up without a commit, and the next run reads it again. `run` raises if a
    stage failed or if the ledger does not add up."""

    def __init__(self, config: Config, stats: Stats, *, notify: Callable[[str], None] = lambda message: None) -> None:
        self.config, self.stats = config, stats
        self._cancelled = threading.Event()  # set when the batches in flight are given up
        budget = Budget(config.model.alert_seconds, self._cancelled.is_set)
        classifiers = open_all_classifiers(config, budget, notify)
        for item in classifiers.opened.values():
            stats.models[item.bundle.manifest.name] = item.bundle.digest
        self._stopping = threading.Event()  # set when no stage should wait for the registry any more
        registry = self._open_registry() if config.registry.url else None
        self._registry = registry
        self.stages = Stages(classifiers, registry.schema if registry else None, budget)
        routes = [Route(item.topic, item.where, item.format, item.attach) for item in config.output]
        router = Router(routes, classifiers.schema, registry=registry) if routes else None
        if router is not None:
            router.warm_up()
        self._writer = ResultWriter(config, router, self.stages.schema_text)
        self.archive = Archive(Path(config.archive.folder), classifiers.schema) if config.archive.folder else None
        self.source = Source(config, stats)
        try:
            self.publisher = open_publisher(config, self.source.membership, budget)
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
        self.source.membership.while_draining = self._keep_moving
        self.source.membership.cancelled = self._cancelled.is_set

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
            threading.Thread(target=serve, args=arguments, name=f"edgekit-{name}", daemon=True)
            for name, serve, arguments in (
                ("decode", self._serve, ("decode", self._decode, "classify")),
                ("classify", self._serve, ("classify", self._classify, "publish")),
                ("publish", self._serve_publisher, ()),
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
                self._commit_rest()
                self.source.close()
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

    def _commit_rest(self) -> None:
        """Commit what was published, before this member leaves the group."""
        hurried = self._failure is not None or self._is_stopped()
        seconds = self.config.source.stop_seconds if hurried else COMMIT_SECONDS
        try:
            if self.source.membership.commits.finish(seconds):
                return
            text = f"the broker has not answered to the last commit within {seconds:g} s"
            if not hurried:
                raise EdgekitError(f"{text}; what was published since the commit before will be published again")
            LOG.warning("%s: what was published since the commit before will be published again", text)
        except Exception as error:
            self._failure = self._failure or error

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

    def _serve(self, name: str, stage: Callable[[InFlight], None], following: str) -> None:
        """Process batches from this stage's queue and pass them on, until None arrives."""
        source = self._queues[name]
        while (work := source.get()) is not None:
            self.stats.queue_depths[name] = source.qsize()
            if self._attempt(name, stage, work):
                self._put(following, work)
        self._put(following, None)

    def _serve_publisher(self) -> None:
        """Publish batches until None arrives, and act on the brokers' answers meanwhile."""
        source, publisher = self._queues["publish"], self.publisher
        while True:
            try:
                work = source.get(timeout=ANSWER_STEP if publisher.busy else None)
            except queue.Empty:
                self._attempt("publish", publisher.serve)
                continue
            if work is None:
                break
            self.stats.queue_depths["publish"] = source.qsize()
            self._attempt("publish", self._publish, work)
        self._attempt("publish", publisher.finish)
        if self._failure is not None or self._cancelled.is_set():
            try:
                publisher.give_up()
            except Exception as error:
                self._failure = self._failure or error

    def _attempt(self, name: str, call: Callable[..., None], *arguments: InFlight) -> bool:
        """Return whether the call succeeded. After a failure, or once the work in flight is given up, nothing is called
        any more: every later batch is dropped, so that none is committed."""
        if self._failure is not None or self._cancelled.is_set():
            return False
        try:
            call(*arguments)
        except CancelledError:
            return False
        except BaseException as error:
            LOG.debug("the stage %s failed", name, exc_info=True)
            self._failure = self._failure or error
            return False
        return True

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
        batch, membership = work.batch, self.source.membership
        with self.stats.stage("route"):
            results = self._writer.results(work)
            outcome = Outcome(work, results, self.config, archived=self.archive is not None)
        self.publisher.make_room()
        with membership.publishing:
            owned = membership.owned(batch)
            if not owned.any():
                return
            self._limits.check(outcome.dead_letters, len(batch))
            if self.archive is not None:
                keep = owned[work.index]
                assert work.rows is not None
                self.archive.write(work.rows.filter(pa.array(keep)), positions_of(batch, work.index[keep]))
        messages = outcome.messages(owned)
        account = functools.partial(self._account, outcome, time.monotonic())
        self.publisher.publish(Publication(batch, messages, outcome.instead, account))

    def _account(self, outcome: Outcome, started: float, owned: Owned) -> None:
        self.stats.observe("publish", time.monotonic() - started)
        outcome.account(self.stats, owned)
