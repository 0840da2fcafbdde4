"""The consumer: poll -> decode -> classify -> route -> publish -> commit, over batches of alerts.

The calling thread polls, and each of the three stages has a thread of its own. Compiled code (the Avro decoder, the
Gaussian process, the network) releases the interpreter lock, so the stages overlap. Queues of a few batches are between
them; when they are full, fetching is paused, so that memory is bounded. The order of the messages is kept throughout,
so it is safe to commit the offset after the last message of a batch.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from alert_broker.stream.batch_stages import BatchStages
from alert_broker.stream.config import Config
from alert_broker.stream.in_flight import InFlight
from alert_broker.stream.offset_commits import COMMIT_SECONDS
from alert_broker.stream.publish import open_publisher
from alert_broker.stream.source import Source
from alert_broker.stream.stats import Stats
from alert_broker.work_budget import Budget, CancelledError
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
# Seconds of full queues before fetching is paused. A pause drops the messages that librdkafka has read ahead.
PAUSE_AFTER = 1.0
IDLE_POLL = 0.01  # seconds between checks for requests of the publishing thread
ANSWER_STEP = 0.01  # seconds between looks for the brokers' answers to what was published


class Pipeline:
    """The consumer's threads. `run` returns after `stop` has returned true, or at the end of the topic. At the end of
    the topic everything is published and committed. After `stop`, what is in flight has `source.stop_seconds` to be
    published and committed; the rest is given up without a commit, and the next run reads it again. `run` raises if a
    stage failed or if the ledger does not add up."""

    def __init__(self, config: Config, stats: Stats, *, notify: Callable[[str], None] = lambda message: None) -> None:
        self.config, self.stats = config, stats
        self._cancelled = threading.Event()  # set when the batches in flight are given up
        self._stopping = threading.Event()  # set when no stage should wait for the registry any more
        budget = Budget(config.model.alert_seconds, self._cancelled.is_set)
        self.stages = BatchStages(config, stats, budget, self._stopping, notify)
        self.source = Source(config, stats)
        try:
            self.publisher = open_publisher(config, self.source.membership, budget)
        except BaseException:
            self.source.close()
            raise
        self._failure: BaseException | None = None
        self._queues = {
            name: queue.Queue[InFlight | None](config.batch.queue) for name in ("decode", "classify", "publish")
        }
        self._stopped_at: float | None = None  # monotonic seconds at which `stop` returned true
        self._waiting: deque[InFlight] = deque()  # batches that were read and not yet given to a stage
        self._stop: Callable[[], bool] = lambda: False
        self.source.membership.while_draining = self._keep_moving
        self.source.membership.cancelled = self._cancelled.is_set

    def run(self, stop: Callable[[], bool]) -> None:
        self._stop = self.source.stopping = stop
        threads = [
            threading.Thread(target=serve, args=arguments, name=f"edgekit-{name}", daemon=True)
            for name, serve, arguments in (
                ("decode", self._serve, ("decode", self.stages.decode, "classify")),
                ("classify", self._serve, ("classify", self.stages.classify, "publish")),
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
                try:
                    self.source.serve()
                except Exception as error:  # such as a commit that is refused: the source must still be closed
                    self._failure = self._failure or error
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
                    idle = self.stats.ledger.total().in_flight == 0
                    if idle and self.source.caught_up:
                        self.stats.progress()
                    # not before: what is in flight may be lost with its partition, and is read again then
                    if idle and self.config.source.until_eos and self.source.at_end:
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

    def _publish(self, work: InFlight) -> None:
        self.stages.publish(work, self.source.membership, self.publisher)
