"""Wait for a condition instead of a fixed time, and measure time, so that a busy machine breaks no test."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import Popen


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not become true within {seconds:g} s"
        time.sleep(0.01)


class Stopwatch:
    """Measures how long something takes, without the time in which these processes (by default this one) could work and
    waited for a core: of the threads of each process, the one that waited longest counts. On an idle machine it shows
    the time that has passed. Where the system does not count such waits (only Linux does), it shows that time always.
    """

    def __init__(self, *pids: int) -> None:
        self._waits: dict[int, dict[str, int]] = {pid: {} for pid in pids or [os.getpid()]}  # nanoseconds, by thread
        self.look()
        self._before, self._started = {pid: dict(waits) for pid, waits in self._waits.items()}, time.monotonic()

    def look(self) -> None:
        """Note how long the threads have waited. Call it often if threads or processes may end meanwhile."""
        for pid, waits in self._waits.items():
            with suppress(OSError):  # the process has ended, or this is not Linux
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    with suppress(OSError):  # the thread has ended
                        waits[thread.name] = int((thread / "schedstat").read_text().split()[1])

    def seconds(self) -> float:
        passed = time.monotonic() - self._started
        self.look()
        for pid, waits in self._waits.items():
            before = self._before[pid]
            passed -= 1e-9 * max((now - before.get(thread, 0) for thread, now in waits.items()), default=0)
        return passed


def seconds_to_end(process: Popen, most: float = 120.0) -> float:
    """Wait until the process has ended; return how long that took, as a `Stopwatch` measures it."""
    stopwatch, deadline = Stopwatch(process.pid), time.monotonic() + most
    while process.poll() is None:
        assert time.monotonic() < deadline, f"the process has not ended within {most:g} s"
        stopwatch.look()
        time.sleep(0.005)
    return stopwatch.seconds()
