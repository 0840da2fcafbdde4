"""A bound on the time that compiled code spends on one object, and a way to stop it.

Compiled code runs in worker threads and cannot be interrupted from outside. It therefore writes the number of its
object into a row of memory that it shares with the calling thread, and reads a command from there every few
milliseconds. The calling thread watches and writes the commands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

AT, COMMAND = range(2)  # columns of the shared memory: object being worked on, counted from 1; command for the worker
STOP = -1  # command: work on no object any more; any other number: give this object up, counted from 1
STEP_SECONDS = 0.02  # between looks of the calling thread

Shared = npt.NDArray[np.int64]


class CancelledError(Exception):
    """The work was stopped on request. It says nothing about the objects."""


def never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Budget:
    """seconds: after so long, an object is given up, and its status says so; cancelled: once it returns true, the
    work stops within some milliseconds with a CancelledError."""

    seconds: float = math.inf
    cancelled: Callable[[], bool] = never

    def check(self) -> None:
        if self.cancelled():
            raise CancelledError

    def run(self, work: Callable[[int, Shared], None], workers: int) -> None:
        """Call work(number, shared row) for every worker, each in a thread of its own, and watch them.

        Seconds are counted in looks of this thread, so that time during which the whole process was suspended is not
        counted.
        """
        self.check()
        shared = np.zeros((workers, 8), np.int64)  # a cache line for each worker
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work, number, shared[number]) for number in range(workers)]
            try:
                self._watch(futures, shared)
            finally:
                shared[:, COMMAND] = STOP  # the pool waits for its threads: do not let it wait for their work
        for future in futures:
            future.result()
        self.check()

    def _watch(self, futures: Sequence[Future[None]], shared: Shared) -> None:
        seen, looks = shared[:, AT].copy(), np.zeros(len(futures), np.int64)
        while wait(futures, STEP_SECONDS).not_done:
            self.check()
            now = shared[:, AT].copy()
            looks = np.where(now == seen, looks + 1, 0)
            seen = now
            late = looks * STEP_SECONDS >= self.seconds
            shared[late, COMMAND] = now[late]
