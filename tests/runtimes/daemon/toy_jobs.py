"""Jobs on a virtual clock: work of known length, which comes at known times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgekit.session import NextStep, Priority
from runtimes.daemon.arbiter import Arbiter


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@dataclass
class Work:
    """seconds: of the device, in `pauses` + 1 equal parts; deadline: infinity unless it is real-time work."""

    comes: float
    seconds: float
    deadline: float = math.inf
    pauses: int = 0
    began: float | None = None
    ended: float | None = None


@dataclass
class ToyJob:
    """A job that does its work in the order of its coming, or of its deadlines if it is real-time."""

    name: str
    priority: Priority
    clock: Clock
    work: list[Work]
    divisible: bool = True

    def waiting(self):
        found = [item for item in self.work if item.began is None and item.comes <= self.clock.now]
        return sorted(found, key=lambda item: (item.deadline, item.comes))

    def next_step(self, *, batch):
        if not (waiting := self.waiting()) or (self.priority is Priority.BATCH and not batch):
            return None
        return NextStep(self.priority, waiting[0].seconds, waiting[0].deadline)

    def run(self, between):
        item = self.waiting()[0]
        item.began = self.clock.now
        for part in range(item.pauses + 1):
            if part and self.divisible:
                between()
            self.clock.now += item.seconds / (item.pauses + 1)
        item.ended = self.clock.now

    def slack(self):
        return math.inf

    def backlog(self):
        interactive = self.priority is Priority.INTERACTIVE
        return sum(item.seconds for item in self.waiting()) if interactive else 0.0


def run_until_done(arbiter: Arbiter, clock: Clock, jobs: list[ToyJob]) -> None:
    """Run until no job has work, and let the clock pass to the next work where there is none now."""
    while True:
        if arbiter.step():
            continue
        coming = [item.comes for job in jobs for item in job.work if item.comes > clock.now]
        if not coming:
            return
        clock.now = min(coming)
