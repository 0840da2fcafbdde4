"""The pipeline's statistics. The stages write them; the dashboard, the Prometheus page and the health checks read a
`Snapshot` and do not know the pipeline."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from alert_broker.stream.ledger import Ledger, Partition
from runtimes.exposition import SECONDS as SECONDS
from runtimes.exposition import Histogram as Histogram

# the last one lasts from poll to delivery report
STAGES = ("decode", "features", "inference", "route", "publish", "end-to-end")
MOST_REASONS, OTHER = 32, "other"  # a reason may quote anything from a packet; reasons after the first 32 count as one
SIZES = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The statistics at one moment. lag: messages between the position and the end of each assigned partition, as the
    broker reports them; progress_age: seconds since an alert's outcome last became final, or since there was last
    nothing to do."""

    uptime: float
    progress_age: float
    ready: bool  # partitions are assigned and the model is loaded
    ledger: Ledger
    lag: dict[Partition, int]
    stages: dict[str, Histogram]  # seconds, by stage
    batch_sizes: Histogram
    queue_depths: dict[str, int]
    classes: Counter[str]
    reasons: Counter[str]  # of dead letters
    models: dict[str, str]  # name to digest
    cutouts: dict[
        str, int
    ]  # alerts whose images were scored, and by reason those whose were not; empty without a model
    paused: bool  # by back-pressure


class Stats:
    """Statistics that the stages write, a batch at a time, under one lock."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.ledger = ledger or Ledger()
        self.lag: dict[Partition, int] = {}
        self.queue_depths: dict[str, int] = {}
        self.models: dict[str, str] = {}
        self.cutouts: dict[str, int] = {}
        self.classes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.ready = self.paused = False
        self._stages = {name: Histogram(SECONDS) for name in STAGES}
        self._sizes = Histogram(SIZES)
        self._started = self._progress = time.monotonic()
        self._lock = Lock()

    def time_also(self, stages: Iterable[str]) -> None:
        """Add stages that run between the classifier and the routes."""
        with self._lock:
            names = list(self._stages)
            at = names.index("route")
            for name in (*names[:at], *stages, *names[at:]):
                self._stages[name] = self._stages.pop(name) if name in self._stages else Histogram(SECONDS)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as one batch's pass through a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.observe(name, time.monotonic() - started)

    def observe(self, name: str, seconds: float, times: int = 1) -> None:
        with self._lock:
            self._stages[name].add(seconds, times)

    def batch(self, size: int) -> None:
        with self._lock:
            self._sizes.add(size)

    def dead_letters(self, reasons: Iterable[str]) -> None:
        """Count these reasons. Once there are `MOST_REASONS` different ones, new ones are counted together."""
        with self._lock:
            for reason in reasons:
                known = reason in self.reasons or len(self.reasons) < MOST_REASONS
                self.reasons[reason if known else OTHER] += 1

    def progress(self) -> None:
        """Record that something was finished, or that there is nothing to do."""
        self._progress = time.monotonic()

    def snapshot(self) -> Snapshot:
        with self._lock:
            now = time.monotonic()
            return Snapshot(
                uptime=now - self._started,
                progress_age=now - self._progress,
                ready=self.ready,
                ledger=self.ledger.copy(),
                lag=dict(self.lag),
                stages={name: histogram.copy() for name, histogram in self._stages.items()},
                batch_sizes=self._sizes.copy(),
                queue_depths=dict(self.queue_depths),
                classes=Counter(self.classes),
                reasons=Counter(self.reasons),
                models=dict(self.models),
                cutouts=dict(self.cutouts),
                paused=self.paused,
            )
