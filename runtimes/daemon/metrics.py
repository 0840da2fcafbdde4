"""The daemon's numbers as a page for Prometheus, and as JSON for the page of the daemon itself.

    edgekit_serve_requests_total{route,status}
    edgekit_serve_answers_total{model,end}         how answers ended: stop, length, cancelled, or the code of an error
    edgekit_serve_tokens_total{model}, edgekit_serve_prompt_tokens_total{model}, edgekit_serve_loads_total{model}
    edgekit_serve_step_seconds{model}, _first_token_seconds, _between_tokens_seconds, _answer_seconds   histograms
    edgekit_serve_batch{model}                     histogram: rows of a run, tokens of a step
    edgekit_serve_queue{model}, edgekit_serve_loaded{model}, edgekit_serve_memory_bytes{model}
    edgekit_serve_blocks{model,state}              of a language model's cache: used, free
    edgekit_serve_preempted_total{model}
    edgekit_ready, edgekit_build_info{version}, edgekit_uptime_seconds, process_...

The labels are bounded: by the configuration's models, by the daemon's routes, and by its codes of errors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgekit import __version__, machine
from runtimes.daemon.models import Entry, Language, Models
from runtimes.daemon.stats import TIMES, ModelStats, Stats
from runtimes.exposition import Samples, counter, gauge, histograms

if TYPE_CHECKING:
    from prometheus_client.core import Metric

GAUGES = {
    "queue": "Answers that wait or run",
    "loaded": "1 if the model is in memory",
    "memory_bytes": "Bytes that the loaded model was admitted with",
}
COUNTERS = {"tokens": "Tokens of answers", "prompt_tokens": "Tokens of prompts", "loads": "How often it was loaded"}


class Page:
    """A collector in the sense of prometheus_client."""

    def __init__(self, models: Models, stats: Stats, ready: bool) -> None:
        self._entries, self._ready, self._started = list(models.entries.values()), ready, stats.started
        self._stats, self._requests = stats.snapshot([entry.name for entry in self._entries])

    def collect(self) -> Iterator[Metric]:
        requests = (((route, str(status)), float(number)) for (route, status), number in self._requests.items())
        yield counter("serve_requests", "Requests by route and status", ["route", "status"], requests)
        ends = (((name, end), float(number)) for name, of in self._stats.items() for end, number in of.ended.items())
        yield counter("serve_answers", "Answers by how they ended", ["model", "end"], ends)
        for name, text in COUNTERS.items():
            yield counter(f"serve_{name}", text, ["model"], self._each(name))
        for name, text in TIMES.items():
            found = {model: of.times[name] for model, of in self._stats.items()}
            yield histograms(f"serve_{name}_seconds", text, "model", found)
        found = {model: of.rows for model, of in self._stats.items()}
        yield histograms("serve_batch", "Rows of a run, or tokens of a step", "model", found)
        now = {entry.name: _of_entry(entry) for entry in self._entries}
        for name, text in GAUGES.items():
            yield gauge(f"serve_{name}", text, ["model"], (((model,), float(of[name])) for model, of in now.items()))
        yield gauge("serve_blocks", "Blocks of the cache", ["model", "state"], _blocks(self._entries))
        preempted = (
            ((entry.name,), float(entry.loaded.queue.job.scheduler.preempted))
            for entry in self._entries
            if isinstance(entry.loaded, Language)
        )
        yield gauge("serve_preempted", "Answers of the loaded model that gave their blocks back", ["model"], preempted)
        yield gauge("ready", "1 once the daemon serves, 0 while it stops", [], [((), float(self._ready))])
        yield gauge("build_info", "The version of edgekit", ["version"], [((__version__,), 1.0)])
        yield gauge("uptime_seconds", "Seconds since the start", [], [((), time.monotonic() - self._started)])

    def _each(self, name: str) -> Samples:
        return (((model,), float(getattr(of, name))) for model, of in self._stats.items())


def _of_entry(entry: Entry) -> dict[str, float]:
    loaded = entry.loaded
    return {
        "queue": 0 if loaded is None else loaded.queue.held,
        "loaded": loaded is not None,
        "memory_bytes": entry.needs.total if loaded is not None and entry.needs is not None else 0,
    }


def _blocks(entries: list[Entry]) -> Samples:
    for entry in entries:
        if isinstance(entry.loaded, Language):
            blocks = entry.loaded.queue.engine.blocks
            yield (entry.name, "used"), float(blocks.number - blocks.free)
            yield (entry.name, "free"), float(blocks.free)


def as_json(models: Models, stats: Stats, state: str) -> dict[str, Any]:
    """Return the numbers for `/stats`. Counters and times are since the start; a reader takes differences."""
    entries = models.entries
    found, requests = stats.snapshot(list(entries))
    total, free = machine.memory_bytes()
    return {
        "version": __version__,
        "state": state,
        "uptime_seconds": time.monotonic() - stats.started,
        "memory": {"total_bytes": total, "free_bytes": free, "models_bytes": models.taken()},
        "requests": {"total": sum(requests.values()), "refused": sum(n for (_, s), n in requests.items() if s >= 400)},
        "models": {name: _model(entries[name], of) for name, of in found.items()},
    }


def _model(entry: Entry, of: ModelStats) -> dict[str, Any]:
    found: dict[str, Any] = {
        "task": entry.task,
        "state": entry.state,
        "error": entry.error,
        "queue": 0 if entry.loaded is None else entry.loaded.queue.held,
        "needs": None if entry.needs is None else str(entry.needs),
        "needs_bytes": 0 if entry.needs is None else entry.needs.total,
        "tokens": of.tokens,
        "prompt_tokens": of.prompt_tokens,
        "loads": of.loads,
        "ended": dict(of.ended),
        "times": {
            name: {"count": item.count, "sum": item.total, "p50": _finite(item.quantile(0.5)),
                   "p99": _finite(item.quantile(0.99))}
            for name, item in of.times.items()
        },
    }  # fmt: skip
    if isinstance(entry.loaded, Language):
        engine, scheduler = entry.loaded.queue.engine, entry.loaded.queue.job.scheduler
        found["blocks"] = {"used": engine.blocks.number - engine.blocks.free, "total": engine.blocks.number}
        found |= {"preempted": scheduler.preempted, "drafted": scheduler.drafted, "accepted": scheduler.accepted}
    return found


def _finite(seconds: float) -> float | None:
    return seconds if seconds < float("inf") else None
