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
    """Measures how long a process takes, without the time in which it could work and waited for a core: of its threads,
    the one that waited longest counts. On an idle machine it shows the time that has passed. Where the system does not
    count such waits (only Linux does), it shows that time always."""

    def __init__(self, pid: int | None = None) -> None:
        self._tasks = Path(f"/proc/{os.getpid() if pid is None else pid}/task")
        self._waits: dict[str, int] = {}  # nanoseconds of each thread, also of those that have ended
        self.look()
        self._before, self._started = dict(self._waits), time.monotonic()

    def look(self) -> None:
        """Note how long the threads have waited. Call it often if threads or the process may end meanwhile."""
        with suppress(OSError):  # the process has ended, or this is not Linux
            for thread in self._tasks.iterdir():
                with suppress(OSError):  # the thread has ended
                    self._waits[thread.name] = int((thread / "schedstat").read_text().split()[1])

    def seconds(self) -> float:
        passed = time.monotonic() - self._started
        self.look()
        waits = (nanoseconds - self._before.get(thread, 0) for thread, nanoseconds in self._waits.items())
        return passed - 1e-9 * max(waits, default=0)


def seconds_to_end(process: Popen, most: float = 120.0) -> float:
    """Wait until the process has ended; return how long that took, as a `Stopwatch` measures it."""
    stopwatch, deadline = Stopwatch(process.pid), time.monotonic() + most
    while process.poll() is None:
        assert time.monotonic() < deadline, f"the process has not ended within {most:g} s"
        stopwatch.look()
        time.sleep(0.005)
    return stopwatch.seconds()
