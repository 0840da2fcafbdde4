"""The alerts beside the daemon: `edgekit alerts consume` in a process of its own, which the daemon supervises.

A process of its own keeps the interpreter locks and the crashes of both apart, and no measurement showed a cost. It is
in the daemon's session, because Linux compares the priorities of threads within a session only (sched_autogroup). Its
settings are those of its own file, broker.toml. It is started again, after growing pauses, when it ends with status 75
or by a signal; any other end is an error that a new process would repeat, so it is reported and the alerts stay down.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekit.errors import EdgekitError
from edgekit.settings import read_toml

LOG = logging.getLogger("edgekit.serve")
TRY_AGAIN = 75  # EX_TEMPFAIL: a new process can go on
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the first start again, doubled each time
WELL_AFTER = 60.0  # seconds that a process must run for the next pause to be the first one again
DRAIN_SECONDS = 30.0  # after SIGTERM; the consumer's own limit is source.stop_seconds + 10
BATCH_SHARE = 0.48  # of the objective that a batch may wait: 24 ms of 50 ms, which gave a p99 of 38 ms at 256/s
SCRAPE_SECONDS = 2.0  # for the metrics of a process that is busy
# the consumer ends with this process, however that ends
CODE = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv.pop(1)) or sys.exit(0); from edgekit.cli import main; main()"
)
State = Literal["starting", "running", "waiting", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class AlertSettings:
    """The table [alerts] of serve.toml: alerts that are classified in the same machine."""

    config: str = field(
        default="", metadata={"help": "The consumer's file, broker.toml; without it there are no alerts."}
    )
    slo_ms: float = field(
        default=50.0,
        metadata={"help": "The objective: milliseconds from the producer to a reader of the results."},
    )

    def check(self) -> AlertSettings:
        """Return these settings. Raises EdgekitError if they cannot work."""
        if self.config and not Path(self.config).is_file():
            raise EdgekitError(f"alerts.config: {self.config}: no such file; expected the consumer's broker.toml")
        if not 0 < self.slo_ms < 1e6:
            raise EdgekitError(f"alerts.slo_ms is {self.slo_ms}; expected a number of milliseconds above 0")
        return self


class AlertProcess:
    """The consumer's process and the thread that supervises it. command: of the process, for tests; first_pause: before
    the first start again, in seconds; drain_seconds: after which a consumer that does not end is killed."""

    def __init__(
        self,
        settings: AlertSettings,
        *,
        command: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        first_pause: float = FIRST_PAUSE,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        self.settings, self._clock, self._drain_seconds = settings.check(), clock, drain_seconds
        self.port = _free_port()
        self._command = command or consumer_command(settings, self.port)
        self._first_pause = first_pause
        self.state: State = "starting"
        self.starts, self.error = 0, ""
        self.report: Mapping[str, Any] = {}  # the last one that a consumer printed at its end
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # for the process and the request to stop
        # a daemon thread would end with the interpreter and leave the process behind
        self._thread = threading.Thread(target=self._supervise, name="edgekit-alerts")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the consumer: the alerts in flight are published and committed, within the consumer's own limit."""
        with self._lock:
            self._stop.set()
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
        if self._thread.ident is not None:
            self._thread.join()
        if self.state != "failed":
            self.state = "stopped"

    def metrics(self) -> bytes:
        """Return the consumer's page for Prometheus; empty while it does not answer."""
        if self.state != "running":
            return b""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=SCRAPE_SECONDS) as answer:
                page: bytes = answer.read()
                return page
        except OSError:
            return b""

    def status(self) -> dict[str, Any]:
        """Return what the daemon shows of the alerts."""
        return {
            "state": self.state,
            "starts": self.starts,
            "error": self.error or None,
            "slo_ms": self.settings.slo_ms,
            "ledger": self.report.get("ledger", {}).get("total"),
            **numbers_of(self.metrics().decode(errors="replace")),
        }

    # --- the thread

    def _supervise(self) -> None:
        pause = self._first_pause
        while not self._stop.is_set():
            began = self._clock()
            code = self._run()
            if self._stop.is_set() or code == 0:
                break
            self.error = f"the consumer of alerts ended {_ending(code)}"
            if code != TRY_AGAIN and code >= 0:
                self.state = "failed"
                LOG.error("%s; the log above has the reason; correct it and start the daemon again", self.error)
                return
            if self._clock() - began > WELL_AFTER:
                pause = self._first_pause
            self.state = "waiting"
            LOG.warning("%s; it is started again in %.3g s", self.error, pause)
            self._stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self.state = "stopped"

    def _run(self) -> int:
        """Run one process to its end; return its status, minus the number of the signal that ended it."""
        with self._lock:
            if self._stop.is_set():
                return 0
            self.starts += 1
            self._process = process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
            )
        self.state = "running"
        killer = threading.Thread(target=self._kill_late, args=(process,), daemon=True)
        killer.start()
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line if line.strip() else last
        code = process.wait()
        process.stdout.close()
        self._take_report(last)
        return code

    def _kill_late(self, process: subprocess.Popen[str]) -> None:
        """Kill a process that has not ended in time after a stop."""
        while process.poll() is None:
            if self._stop.wait(1.0):
                try:
                    process.wait(self._drain_seconds)
                except subprocess.TimeoutExpired:
                    LOG.error(
                        "the consumer of alerts has not ended within %g s and is killed; what it had not committed is "
                        "read again",
                        self._drain_seconds,
                    )
                    process.kill()
                return

    def _take_report(self, line: str) -> None:
        try:
            found = json.loads(line)
        except ValueError:  # a process that was killed prints none
            return
        if isinstance(found, dict):
            self.report = found
            self.error = str(found.get("failed") or "")


def consumer_command(settings: AlertSettings, port: int) -> list[str]:
    """Return the command of the consumer. Unless its file says how long a batch may wait, that follows from the
    objective: the wait is the largest part of an alert's latency."""
    seconds = BATCH_SHARE * settings.slo_ms / 1e3
    file_says = "seconds" in read_toml(Path(settings.config)).get("batch", {})
    return [
        *(sys.executable, "-c", CODE, str(os.getpid()), "alerts", "consume"),
        *("--config", settings.config, "--metrics-listen", f"127.0.0.1:{port}", "--json"),
        *(() if file_says else ("--batch-seconds", f"{seconds:g}")),
    ]


def numbers_of(page: str) -> dict[str, Any]:
    """Return the counts of the ledger, over all partitions, in a page for Prometheus; nothing if it has none."""
    counts: dict[str, float] = {}
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("edgekit_alerts_") and "{" in name:
            key = name.partition("{")[0].removeprefix("edgekit_alerts_").removesuffix("_total")
            counts[key] = counts.get(key, 0.0) + float(value)
    return {"alerts": {key: int(value) for key, value in counts.items()}} if counts else {}


def _ending(code: int) -> str:
    if code >= 0:
        return f"with status {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
