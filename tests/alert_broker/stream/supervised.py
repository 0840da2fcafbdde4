"""The consumer as a supervisor runs it: a process that ends is started again, and its status is counted."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable

from tests.alert_broker.stream.rig import START_SECONDS, Rig
from tests.alert_broker.stream.test_faults import BATCH, PUBLISH, REPEATED, Feed, committed

# The default sizes take half an hour together. EDGEKIT_TEST_LONG runs the sizes that a release is judged by.
LONG = bool(os.environ.get("EDGEKIT_TEST_LONG"))
EXACTLY = {"mode": "exactly-once", "transactional_id": "edgekit-test", "seconds": 30.0}
MODES = {"at-least-once": {"seconds": 30.0, **PUBLISH}, "exactly-once": EXACTLY}
STUCK_SECONDS = 150.0  # a minute for the watchdog, the transaction of a dead process, and a restart on a busy machine


class Supervised:
    """A consumer with a lasting name, started again whenever it ends. statuses: of the processes that have ended; log:
    their lines."""

    def __init__(self, rig: Rig, mode: str):
        source = {"until_eos": False, "instance": "one"}
        self.changes = {"source": source, "batch": {"size": BATCH}, "publish": MODES[mode]}
        self.rig, self.statuses = rig, Counter()
        self.last = ""
        self._ended: list[str] = []
        self.running = rig.start(**self.changes)

    @property
    def log(self) -> list[str]:
        """The lines of all processes so far."""
        return [*self._ended, *self.running.log]

    def look(self) -> None:
        """Start the process again if it has ended."""
        if not self.running.running:
            status, _, log = self.running.wait()
            self.statuses[status] += 1
            self.last = log.strip().splitlines()[-1] if log.strip() else ""
            print(f"ended with {status}: {self.last[-300:]}")
            self._ended += log.splitlines()
            self.running = self.rig.start(**self.changes)

    def watch(self, seconds: float) -> int:
        """Look again and again for so long; return the most memory that the process had, in bytes."""
        deadline, most = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            self.look()
            most = max(most, self.running.memory)
            time.sleep(0.25)
        return most

    def wait_until_committed(self, sent: int) -> None:
        wait_until_committed(self.rig, sent, self.look, lambda: self.last)

    def end(self) -> None:
        self.look()
        assert self.running.assigned.wait(START_SECONDS)
        self.running.terminate()
        status, _, log = self.running.wait()
        assert status == 0, log[-2000:]


def wait_until_committed(
    rig: Rig, sent: int, look: Callable[[], None] = lambda: None, last: Callable[[], str] = lambda: ""
) -> None:
    """Fails if nothing is committed for a time in which everything that can happen has happened."""
    before, since = -1, time.monotonic()
    while (done := sum(committed(rig))) < sent:
        look()
        if done != before:
            before, since = done, time.monotonic()
        assert time.monotonic() - since < STUCK_SECONDS, f"stuck at {done} of {sent}: {last()}"
        time.sleep(0.5)


def survive(rig: Rig, values: list[bytes], rate: float, mode: str, crashes: int, crash: Callable[[], None]) -> Counter:
    """Send these messages while a supervised consumer works and `crash` is called so many times, and check the counts.
    Return the statuses of the processes that have ended."""
    feed = Feed(rig, values, rate)
    feed.start()
    supervised = Supervised(rig, mode)
    for _ in range(crashes):
        crash()
        supervised.look()
    feed.join(600)
    assert feed.error is None
    supervised.wait_until_committed(feed.sent)
    supervised.end()
    check(supervised, feed.sent, mode, crashes)
    return supervised.statuses


def check(supervised: Supervised, sent: int, mode: str, faults: int) -> None:
    """No process was ended by a signal, nothing is lost, and no more is doubled than the mode promises."""
    done = supervised.rig.outcome(sent)
    print(
        f"{mode}, {faults} faults, {sent} alerts: {done.lost} lost, {done.duplicates} twice; "
        f"processes ended: {dict(supervised.statuses)}"
    )
    assert set(supervised.statuses) <= {1, 75}, supervised.statuses  # a signal's is below 0
    assert done.lost == 0
    faults += supervised.statuses.total()
    assert done.duplicates <= (0 if mode == "exactly-once" else faults * REPEATED)


def check_said_once_a_minute(log: Iterable[str], seconds: float, most: int = 24) -> None:
    """Each warning came at most once a minute, and so did at most this number of different ones."""
    minutes = math.ceil(seconds / 60.0) + 1
    lines = [json.loads(line) for line in log if line.startswith("{")]
    said = Counter(line["message"].partition(" (after")[0] for line in lines if line["level"] != "info")
    assert not [text for text, times in said.items() if times > minutes], said.most_common(5)
    assert said.total() <= most * minutes, said
