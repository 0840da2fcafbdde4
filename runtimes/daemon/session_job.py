"""The job of a session: rows for one model, in batches of what is waiting, by a deadline or in turns.

It is for a device that one thread must share, such as a GPU. On a CPU the daemon runs bundles in threads of their own
(`batching.BatchLoop`), and the system schedules them.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.tensors import Arrays
from edgekit.errors import EdgekitError
from edgekit.session import NextStep, Priority, Session, check_inputs
from runtimes.llm.lookup import StepTime

GUARD = 0.1  # share of the objective that is kept for what the predictions miss
WINDOW = 2.0  # seconds over which the rate of rows is averaged
Receive = Callable[[Arrays | Exception], None]


@dataclass(frozen=True, slots=True)
class _Waiting:
    arrays: Mapping[str, npt.NDArray[Any]]
    rows: int
    deadline: float
    receive: Receive


class SessionJob:
    """Requests to one session. seconds: the objective: a request is answered within this time of its arrival, as
    real-time work; None: interactive work in turns. rows: the most in a batch; clock: that of the arbiter, in seconds;
    wake: tells the arbiter of new work."""

    def __init__(
        self,
        name: str,
        session: Session,
        *,
        seconds: float | None = None,
        rows: int = 256,
        clock: Callable[[], float] = time.monotonic,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        if seconds is not None and not seconds > 0:
            raise EdgekitError(f"{name}: the objective is {seconds} seconds; expected a number above 0")
        if rows < 1:
            raise EdgekitError(f"{name}: rows = {rows}; expected at least 1")
        self.name, self.session, self.objective, self.rows = name, session, seconds, rows
        self._clock, self._wake, self._time = clock, wake, StepTime()
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Lock()
        self._rate, self._rate_at = 0.0, clock()  # rows per second, and when it was computed

    def submit(self, arrays: Mapping[str, npt.NDArray[Any]], receive: Receive, deadline: float = math.inf) -> None:
        """Take a request. Any thread may call this. receive: gets the outputs or an error, in the arbiter's thread;
        deadline: of the arbiter's clock, if it is earlier than the objective. Raises if the session cannot run it."""
        rows, now = check_inputs(self.session.inputs, arrays), self._clock()
        if not 1 <= rows <= self.rows:
            raise EdgekitError(f"{self.name}: a request of {rows} rows; expected 1 to {self.rows}")
        due = min(deadline, math.inf if self.objective is None else now + self.objective)
        with self._lock:
            self._rate, self._rate_at = self._rate_now(now) + rows / WINDOW, now
            self._waiting.append(_Waiting(arrays, rows, due, receive))
        self._wake()

    def next_step(self, *, batch: bool) -> NextStep | None:
        with self._lock:
            if not self._waiting:
                return None
            rows, due = self._queued(), min(item.deadline for item in self._waiting)
        priority = Priority.INTERACTIVE if self.objective is None else Priority.REAL_TIME
        return NextStep(priority, self._seconds(min(rows, self.rows)), due)

    def run(self, between: Callable[[], None]) -> None:
        chosen = self._take()
        started = self._clock()
        try:
            outputs = self.session.run(
                {name: np.concatenate([item.arrays[name] for item in chosen]) for name in chosen[0].arrays}
            )
        except Exception as error:
            for item in chosen:
                item.receive(error)
            return
        rows = sum(item.rows for item in chosen)
        self._time.add(rows, self._clock() - started)
        first = 0
        for item in chosen:
            item.receive({name: array[first : first + item.rows] for name, array in outputs.items()})
            first += item.rows

    def slack(self) -> float:
        """See `Job.slack`. Rows that come while the device is busy make the next batch longer."""
        if self.objective is None:
            return math.inf
        now = self._clock()
        with self._lock:
            queued, rate = self._queued(), self._rate_now(now)
            left = min((item.deadline for item in self._waiting), default=now + self.objective) - now
        left -= GUARD * self.objective + self._seconds(queued + 1)
        return max(0.0, left / (1 + rate * (self._time.slope if self._time.known else 0.0)))

    def backlog(self) -> float:
        with self._lock:
            return 0.0 if self.objective is not None else self._seconds(self._queued())

    def _take(self) -> list[_Waiting]:
        """Return the requests of the next batch, those with the earliest deadlines."""
        with self._lock:
            ordered = sorted(self._waiting, key=lambda item: item.deadline)  # stable: in turns without deadlines
            chosen, rows = [], 0
            while ordered and rows + ordered[0].rows <= self.rows:
                rows += ordered[0].rows
                chosen.append(ordered.pop(0))
            self._waiting = deque(ordered)
        return chosen

    def _queued(self) -> int:
        return sum(item.rows for item in self._waiting)

    def _seconds(self, rows: int) -> float:
        return self._time.of(rows) if rows and self._time.known else 0.0

    def _rate_now(self, now: float) -> float:
        return self._rate * math.exp((self._rate_at - now) / WINDOW)
