"""Time calls that are compared: in turns, in one run. Machines are shared and their clocks change, so that two times
taken one after the other differ by more than the calls do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Clock = Callable[[], float]  # seconds: time.thread_time, time.process_time or time.perf_counter
Timed = Callable[[], tuple[float, ...]]  # makes one call and returns the seconds that it took by each clock
Seconds = npt.NDArray[np.float64]
GRAIN = 1e-9  # the clock's shortest step: a ratio must not divide by zero


def timed(call: Callable[[], object], *clocks: Clock) -> Timed:
    """Return a function that makes the call and returns the seconds that it took by each clock."""

    def once() -> tuple[float, ...]:
        started = [clock() for clock in clocks]
        call()
        return tuple(clock() - start for clock, start in zip(clocks, started, strict=True))

    return once


def in_turns(
    calls: Sequence[Timed], *, seconds: float = 0.0, least: int = 7, most: int = 400, warmup: int = 2
) -> Seconds:
    """Return (rounds, calls, clocks) seconds. Each round makes every call once.

    Another call begins each round, so that no call always finds the cache in the state that the same call left. The
    first `warmup` rounds are discarded; the last of them tells how many rounds fit in `seconds` by the first clock,
    between `least` and `most`.
    """
    assert calls
    assert warmup >= 1
    for _ in range(warmup):
        taken = np.array([call() for call in calls])
    rounds = int(np.clip(seconds / max(float(taken[:, 0].sum()), 1e-6), least, most))
    found = np.empty((rounds, *taken.shape))
    for number in range(rounds):
        for turn in range(len(calls)):
            index = (turn + number) % len(calls)
            found[number, index] = calls[index]()
    return found


def ratio_interval(before: Seconds, after: Seconds, seed: int = 0) -> tuple[float, float, float]:
    """Return the median of after / before over the rounds, and its 95 % bootstrap interval."""
    ratios = np.maximum(after, GRAIN) / np.maximum(before, GRAIN)
    draws = np.median(ratios[np.random.default_rng(seed).integers(0, len(ratios), (400, len(ratios)))], axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def thread_seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds that one call takes in this thread."""
    return timed(call, time.thread_time)()[0]
