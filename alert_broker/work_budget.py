"""Bound the time that compiled code spends on one object, and stop the work on request.

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

# Columns of the shared memory: the object that the worker works on, counted from 1, and the command for the worker.
AT, COMMAND = range(2)
STOP = -1  # the command to end all work; any other command is the number of the object to give up, counted from 1
STEP_SECONDS = 0.02  # between checks by the calling thread

Shared = npt.NDArray[np.int64]


class CancelledError(Exception):
    """The work was stopped on request. It says nothing about the objects."""


def never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Budget:
    """seconds: the limit for an object; an object that takes longer is given up, and its status says so. cancelled:
    once it returns true, the work stops within some milliseconds with a CancelledError."""

    seconds: float = math.inf
    cancelled: Callable[[], bool] = never

    def check(self) -> None:
        if self.cancelled():
            raise CancelledError

    def run(self, work: Callable[[int, Shared], None], workers: int) -> None:
        """Call work(number, shared row) for every worker, each in a thread of its own, and watch them.

        This thread counts its checks and not seconds, so that time during which the whole process was suspended does
        not count.
        """
        self.check()
        shared = np.zeros((workers, 8), np.int64)  # a cache line for each worker
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work, number, shared[number]) for number in range(workers)]
            try:
                self._watch(futures, shared)
            finally:
                shared[:, COMMAND] = STOP  # the pool waits for its threads, which must not finish their work first
        for future in futures:
            future.result()
        self.check()

    def _watch(self, futures: Sequence[Future[None]], shared: Shared) -> None:
        seen, checks = shared[:, AT].copy(), np.zeros(len(futures), np.int64)
        while wait(futures, STEP_SECONDS).not_done:
            self.check()
            now = shared[:, AT].copy()
            checks = np.where(now == seen, checks + 1, 0)
            seen = now
            late = checks * STEP_SECONDS >= self.seconds
            shared[late, COMMAND] = now[late]
