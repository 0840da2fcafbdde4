"""Dynamic batching of a bundle: requests that come close together share one run, as rows of one batch.

A request waits at most `seconds` for others, and less if its deadline is near. Only requests whose rows have the same
shapes share a run. If a run of several fails, each runs alone, so that one request cannot fail another.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError
from edgekit.session import Session, check_inputs, run_in_batches
from runtimes.daemon.refusal import RefusedError, from_error, stopping
from runtimes.daemon.stats import Stats

LOG = logging.getLogger("edgekit.serve")
MOST_ROWS = 1000  # of a run; a request of more is cut
SPENT = 0.7  # of its time that a request may wait for others: the clock and other programs take the rest
SMOOTHING = 0.2  # of the newest run, in the mean time of a run


@dataclass(slots=True, eq=False)
class Waiting:
    """A request. until: monotonic seconds at which its run must have begun."""

    arrays: Mapping[str, npt.NDArray[Any]]
    rows: int
    until: float
    answer: Future[Arrays] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.arrays[name].shape[1:] for name in sorted(self.arrays))


class BatchLoop:
    """The thread that runs a bundle. batch: most rows of a run; seconds: how long a request waits for others; most: how
    many requests may wait or run."""

    def __init__(self, name: str, session: Session, *, batch: int, seconds: float, most: int, stats: Stats) -> None:
        self.name, self.session, self.most, self._stats = name, session, most, stats
        self._free = can_share(session.inputs, session.outputs)
        self._batch = batch if self._free else 1
        self._seconds, self._mean = seconds, 0.0
        self._changed = Condition()
        self._waiting: deque[Waiting] = deque()
        self._running = 0
        self._closing = False
        self.step_began: float | None = None
        self._thread = Thread(target=self._work, name=f"edgekit-{name}", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        return len(self._waiting) + self._running

    def submit(self, arrays: Mapping[str, npt.NDArray[Any]], until: float) -> Future[Arrays]:
        """Queue a request; return its outputs to come. Raises at once if the arrays are not the model's inputs, or if
        the queue is full."""
        rows = check_inputs(self.session.inputs, arrays)
        if not rows:
            raise RefusedError(400, "the inputs have no rows; expected at least one")
        found = Waiting(arrays, rows, until)
        with self._changed:
            if self._closing:
                raise stopping()
            if self.held >= self.most:
                raise RefusedError(
                    503,
                    f"the model {self.name!r} has {self.held} requests on their way, and limits.queue is {self.most}; "
                    "try again later",
                    retry_after=1,
                )
            self._waiting.append(found)
            self._changed.notify()
        return found.answer

    def end_all(self, error: RefusedError) -> None:
        """End all requests that wait with an error; the one that runs gets its answer."""
        with self._changed:
            for item in self._waiting:
                item.answer.set_exception(error)
            self._waiting.clear()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self.end_all(stopping())

    def _work(self) -> None:
        while (group := self._next()) is not None:
            if group:
                self._run(group)
            with self._changed:
                self._running = 0

    def _next(self) -> list[Waiting] | None:
        """Return the requests of the next run; None at the end."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            while not self._closing and (left := self._wait_for()) > 0:
                self._changed.wait(left)
            if self._closing:
                return None
            group = self._group()
            for item in group:
                self._waiting.remove(item)
            self._running = len(group)
        now = time.monotonic()
        return [item for item in group if self._in_time(item, now)]

    def _group(self) -> list[Waiting]:
        """Return the first request that waits, and those that fit into its run."""
        if not self._waiting:
            return []
        group, rows = [self._waiting[0]], self._waiting[0].rows
        for item in list(self._waiting)[1:]:
            if item.key == group[0].key and rows + item.rows <= self._batch:
                group.append(item)
                rows += item.rows
        return group

    def _wait_for(self) -> float:
        """Return how long the next run may still wait for more requests."""
        group = self._group()
        if not group or sum(item.rows for item in group) >= self._batch:
            return 0.0
        latest = (item.since + SPENT * (item.until - item.since) - self._mean for item in group)
        ends = min(group[0].since + self._seconds, *latest)
        return ends - time.monotonic()

    def _in_time(self, item: Waiting, now: float) -> bool:
        """Whether a request may run. One whose client has gone is cancelled, and does not."""
        if not item.answer.set_running_or_notify_cancel():
            self._stats.end(self.name, "cancelled", now - item.since)
            return False
        if now > item.until:
            item.answer.set_exception(RefusedError(504, "the run had not begun at the request's deadline"))
            self._stats.end(self.name, "deadline_exceeded", now - item.since)
            return False
        return True

    def _run(self, group: Sequence[Waiting]) -> None:
        self.step_began = started = time.monotonic()
        rows = sum(item.rows for item in group)
        try:
            arrays = {name: np.concatenate([item.arrays[name] for item in group]) for name in group[0].arrays}
            found = run_in_batches(self.session, arrays, MOST_ROWS) if self._free else self.session.run(arrays)
        except Exception as error:
            if len(group) > 1:
                for item in group:
                    self._run([item])
                return
            if not isinstance(error, EdgekitError):
                LOG.error("the model %s has failed", self.name, exc_info=error)
            self._finish(group[0], from_error(error))
            return
        finally:
            self.step_began = None
        seconds = time.monotonic() - started
        self._mean += SMOOTHING * (seconds - self._mean)
        self._stats.step(self.name, seconds, rows)
        first = 0
        for item in group:
            part = slice(first, first + item.rows) if len(group) > 1 else slice(None)
            self._finish(item, {name: array[part] for name, array in found.items()})
            first += item.rows

    def _finish(self, item: Waiting, result: Arrays | RefusedError) -> None:
        self._stats.end(self.name, "stop" if isinstance(result, dict) else result.code, time.monotonic() - item.since)
        if isinstance(result, dict):
            item.answer.set_result(result)
        else:
            item.answer.set_exception(result)


def can_share(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Return whether rows of several requests may run together: the first axis of every array is the same free one."""
    firsts = {spec.shape[0] if spec.shape else None for spec in (*inputs, *outputs)}
    return len(firsts) == 1 and isinstance(next(iter(firsts)), str)
