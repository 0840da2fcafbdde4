"""What the daemon counts, under one lock. The metrics, `/stats` and the page read it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from runtimes.exposition import SECONDS, Histogram

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TIMES = {
    "step": "Seconds of a step of the engine, or of a run of a bundle",
    "first_token": "Seconds from a request to its first token",
    "between_tokens": "Seconds from a token to the next one of the same answer",
    "answer": "Seconds from a request to its end",
}


@dataclass(slots=True)
class ModelStats:
    """Of one model. ended: answers by how they ended; rows: of a run of a bundle, or tokens of a step."""

    prompt_tokens: int = 0
    tokens: int = 0
    loads: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    times: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram(SECONDS) for name in TIMES})
    rows: Histogram = field(default_factory=lambda: Histogram(ROWS))

    def copy(self) -> ModelStats:
        times = {name: histogram.copy() for name, histogram in self.times.items()}
        return ModelStats(self.prompt_tokens, self.tokens, self.loads, Counter(self.ended), times, self.rows.copy())


class Stats:
    """Of the daemon. The numbers of a model go on when it is dropped and loaded again."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._lock = Lock()
        self._models: dict[str, ModelStats] = {}
        self._requests: Counter[tuple[str, int]] = Counter()  # by route and status

    def requests(self, route: str, status: int) -> None:
        with self._lock:
            self._requests[route, status] += 1

    def observe(self, model: str, name: str, seconds: float, times: int = 1) -> None:
        with self._lock:
            self._of(model).times[name].add(seconds, times)

    def step(self, model: str, seconds: float, rows: int) -> None:
        with self._lock:
            of = self._of(model)
            of.times["step"].add(seconds)
            of.rows.add(rows)

    def add(self, model: str, *, prompt_tokens: int = 0, tokens: int = 0, loads: int = 0) -> None:
        with self._lock:
            of = self._of(model)
            of.prompt_tokens += prompt_tokens
            of.tokens += tokens
            of.loads += loads

    def end(self, model: str, how: str, seconds: float) -> None:
        with self._lock:
            of = self._of(model)
            of.ended[how] += 1
            of.times["answer"].add(seconds)

    def snapshot(self, names: Sequence[str]) -> tuple[dict[str, ModelStats], Counter[tuple[str, int]]]:
        """Return copies: the numbers of these models, and the requests by route and status."""
        with self._lock:
            return {name: self._of(name).copy() for name in names}, Counter(self._requests)

    def _of(self, model: str) -> ModelStats:
        return self._models.setdefault(model, ModelStats())
