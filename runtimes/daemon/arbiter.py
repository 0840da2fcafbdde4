"""The arbiter decides which job has the device, one step at a time, and when new work must wait or is refused.

Real-time work runs first, the earliest deadline before the others (Liu and Layland 1973). Interactive work comes next,
batch work last; within a class, jobs take turns. A step that can pause lets more urgent work run in its pauses, so that
a deadline waits for one pause at most.

Overload is measured by the wait of a new interactive request: the backlog of interactive work, on what real-time work
leaves of the device. From half of `most_wait` on, batch work is held back; it stays in its job and is finished later.
From `most_wait` on, interactive requests are refused, with the time after which one will be accepted.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgekit.errors import EdgekitError
from edgekit.session import Job, NextStep, Priority

WINDOW = 5.0  # seconds over which the share of real-time work is averaged
LEAST_REST = 0.05  # of the device that counts as left by real-time work, so that the predicted wait stays finite
CAUTION = 1.1  # the share of real-time work varies, so a refused request is told to wait a little longer than predicted
IDLE_SECONDS = 1.0  # the arbiter's thread looks for work this often even if nobody wakes it


class OverloadedError(EdgekitError):
    """Interactive work is refused. retry_after: seconds after which a request is predicted to be accepted."""

    def __init__(self, wait: float, most_wait: float) -> None:
        self.retry_after = max(1, math.ceil(CAUTION * (wait - most_wait)))
        super().__init__(
            f"the device is overloaded: a new request would wait {wait:.1f} s, and {most_wait:g} s are allowed; try "
            f"again in {self.retry_after} s, or send it as batch work"
        )


@dataclass(slots=True)
class Served:
    """What a job has had. seconds: of the device, without pauses; longest: seconds of a step without its pauses;
    missed: steps that ended after their deadline."""

    steps: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    missed: int = 0


class Arbiter:
    """The jobs of one device. most_wait: seconds that a new interactive request may wait; clock: seconds; failed: is
    told of a job that raised an error; such a job is removed, and the others go on. Without it the error is raised."""

    def __init__(
        self,
        *,
        most_wait: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        failed: Callable[[Job, Exception], None] | None = None,
    ) -> None:
        if not most_wait > 0:
            raise EdgekitError(f"most_wait is {most_wait}; expected a number of seconds above 0")
        self._most_wait, self._clock, self._failed = most_wait, clock, failed
        self._jobs: dict[str, Job] = {}
        self._turns: dict[str, int] = {}  # by job: when it had its last turn
        self._running: list[str] = []  # the jobs whose steps have begun, the one that has the device last
        self._paused: list[float] = []  # seconds that each of them has waited in pauses
        self._turn = 0
        self._share, self._share_at = 0.0, clock()  # of real-time work, and when it was computed
        self._changed = threading.Condition()
        self._called = False  # whether somebody called `wake` since the thread last looked for work
        self.served: dict[str, Served] = {}

    def add(self, job: Job) -> None:
        """Let a job share the device, from the next step on."""
        if job.name in self._jobs:
            raise EdgekitError(f"a job {job.name!r} has this device already; give the other one another name")
        self._jobs = {**self._jobs, job.name: job}  # a new mapping, as other threads may be reading the old one
        self.served.setdefault(job.name, Served())
        self.wake()

    def remove(self, name: str) -> None:
        """Let a job run no further step. A step that has begun is finished."""
        self._jobs = {other: job for other, job in self._jobs.items() if other != name}

    # --- which job has the device

    def step(self) -> bool:
        """Run one step of the most urgent job; return whether any job had work."""
        chosen = self._choose(None)
        if chosen is None:
            return False
        self._run(*chosen)
        return True

    def run(self, stop: Callable[[], bool]) -> None:
        """Run steps until `stop` returns true. Call `wake` behind each change that `stop` or a job should notice."""
        while not stop():
            if self.step():
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._called, IDLE_SECONDS)
                self._called = False

    def wake(self) -> None:
        """Say that a job may have new work. Any thread may call this."""
        with self._changed:
            self._called = True
            self._changed.notify_all()

    def slack(self) -> float:
        """Return for how many seconds a step without pauses may have the device, so that no deadline is missed."""
        return min((job.slack() for job in self._jobs.values()), default=math.inf)

    def _choose(self, running: NextStep | None) -> tuple[Job, NextStep] | None:
        """Return the most urgent job and its step. running: the step whose pause this is; only more urgent ones
        count."""
        batch = not self.holds_batch
        found: list[tuple[tuple[int, float, int], Job, NextStep]] = []
        for job in self._jobs.values():
            if job.name in self._running:
                continue
            try:
                step = job.next_step(batch=batch)
            except Exception as error:
                self._give_up(job, error)
                continue
            if step is not None:
                found.append(((step.priority, _deadline(step), self._turns.get(job.name, 0)), job, step))
        if not found:
            return None
        rank, job, step = min(found, key=lambda item: item[0])
        if running is not None and rank[:2] >= (running.priority, _deadline(running)):
            return None
        return job, step

    def _run(self, job: Job, step: NextStep) -> None:
        self._turn += 1
        self._turns[job.name] = self._turn
        self._running.append(job.name)
        self._paused.append(0.0)
        started = self._clock()
        try:
            job.run(lambda: self._pause(step))
        except Exception as error:
            self._give_up(job, error)
        finally:
            self._running.pop()
            ended, paused = self._clock(), self._paused.pop()
            self._note(self.served[job.name], step, ended, ended - started - paused)

    def _give_up(self, job: Job, error: Exception) -> None:
        """Remove a job that has failed."""
        self.remove(job.name)
        if self._failed is None:
            raise error
        self._failed(job, error)

    def _pause(self, step: NextStep) -> None:
        """Run what is more urgent than the step that pauses."""
        began = self._clock()
        while (chosen := self._choose(step)) is not None:
            self._run(*chosen)
        self._paused[-1] += self._clock() - began

    def _note(self, served: Served, step: NextStep, ended: float, seconds: float) -> None:
        served.steps += 1
        served.seconds += seconds
        served.longest = max(served.longest, seconds)
        served.missed += ended > step.deadline
        if step.priority is Priority.REAL_TIME:
            self._share, self._share_at = self._share_now(ended) + seconds / WINDOW, ended

    # --- overload

    @property
    def wait(self) -> float:
        """Return the seconds that a new interactive request would wait for the device, as predicted."""
        rest = max(LEAST_REST, 1.0 - self._share_now(self._clock()))
        return sum(job.backlog() for job in self._jobs.values()) / rest

    @property
    def holds_batch(self) -> bool:
        """Whether batch work is held back."""
        return self.wait > self._most_wait / 2

    def admit(self, priority: Priority) -> None:
        """Raise OverloadedError if a new request of this class cannot be taken now. Any thread may call this."""
        if priority is Priority.INTERACTIVE and (wait := self.wait) > self._most_wait:
            raise OverloadedError(wait, self._most_wait)

    def _share_now(self, now: float) -> float:
        return self._share * math.exp((self._share_at - now) / WINDOW)

    @property
    def jobs(self) -> Sequence[str]:
        """Return the names of the jobs."""
        return tuple(self._jobs)


def _deadline(step: NextStep) -> float:
    """Return the time by which steps of one class are ordered: only real-time work is ordered by a deadline."""
    return step.deadline if step.priority is Priority.REAL_TIME else math.inf
