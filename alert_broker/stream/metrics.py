"""A `Snapshot` as a page for Prometheus. The names must not change, because dashboards and alert rules use them.

    edgekit_alerts_{consumed,published,filtered,dead_lettered,revoked,expired}_total{topic,partition}
    edgekit_alerts_in_flight{topic,partition}      consumed = published + filtered + dead_lettered + revoked + in_flight
    edgekit_consumer_lag{topic,partition}          messages up to the end of the partition, as the broker tells it
    edgekit_stage_seconds{stage}                   histogram; the stages are `stats.STAGES`, the last from poll to end,
                                                   and with a model of cutouts `cutouts` and `cutout-inference`
    edgekit_batch_alerts                           histogram
    edgekit_queue_depth{queue}
    edgekit_classes_total{class}                   alerts by their most probable class
    edgekit_cutouts_total{outcome}                 alerts whose images were `scored`, or the reason why they were not
    edgekit_dead_letters_total{reason}             N replaces numbers; reasons after the first 32 count as `other`
    edgekit_model_info{model,digest}, edgekit_build_info{version}
    edgekit_ready, edgekit_paused                  0 or 1
    edgekit_uptime_seconds, edgekit_progress_age_seconds
    process_cpu_seconds_total, process_resident_memory_bytes, process_open_fds, ...

Counters begin at 0 with the process. The number of label values is bounded: by the partitions, by the classes of the
models, and for reasons by `stats.MOST_REASONS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alert_broker.stream.stats import Snapshot
from edgekit import __version__
from runtimes import exposition
from runtimes.exposition import CONTENT_TYPE as CONTENT_TYPE
from runtimes.exposition import Samples, counter, gauge, histograms

if TYPE_CHECKING:
    from prometheus_client.core import Metric

COLUMNS = {
    "consumed": "Alerts taken from the topic",
    "published": "Alerts whose result was delivered",
    "filtered": "Alerts that a filter rejected",
    "dead_lettered": "Alerts delivered to the dead-letter topic",
    "revoked": "Alerts in flight when their partition was revoked; their new owner consumes them again",
    "expired": "Offsets that retention deleted before they were read; their alerts are lost",
}
GAUGES = {
    "ready": "1 once partitions are assigned and the model is loaded",
    "paused": "1 while back-pressure pauses consumption",
    "uptime_seconds": "Seconds since the start",
    "progress_age_seconds": "Seconds since an alert's outcome last became final, or since there was last nothing to do",
}


def page(snapshot: Snapshot) -> bytes:
    """Return the page in Prometheus' text format."""
    return exposition.page(_Reader(snapshot))


class _Reader:
    """A collector in the sense of prometheus_client, for one snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot
        yield from _partitions(now)
        yield histograms("stage_seconds", "Seconds that a batch spent in a stage", "stage", now.stages)
        yield histograms("batch_alerts", "Alerts in a batch", None, {"": now.batch_sizes})
        yield gauge("queue_depth", "Batches that wait for a stage", ["queue"], _single(now.queue_depths))
        yield counter("classes", "Alerts by their most probable class", ["class"], _single(now.classes))
        yield counter("cutouts", "Alerts by what became of their images", ["outcome"], _single(now.cutouts))
        yield counter("dead_letters", "Dead letters by their reason", ["reason"], _single(now.reasons))
        models = (((name, digest), 1.0) for name, digest in now.models.items())
        yield gauge("model_info", "The models that are loaded, with their SHA-256", ["model", "digest"], models)
        yield gauge("build_info", "The version of edgekit", ["version"], [((__version__,), 1.0)])
        values = (now.ready, now.paused, now.uptime, now.progress_age)
        for (name, text), value in zip(GAUGES.items(), values, strict=True):
            yield gauge(name, text, [], [((), float(value))])


def _partitions(now: Snapshot) -> Iterator[Metric]:
    labels = ["topic", "partition"]
    entries = {(topic, str(number)): entry for (topic, number), entry in sorted(now.ledger.entries.items())}
    for column, text in COLUMNS.items():
        # Revoked alerts leave the ledger, but they were consumed, and a counter must never fall.
        extra = {at: entry.revoked if column == "consumed" else 0 for at, entry in entries.items()}
        samples = ((at, float(getattr(entry, column) + extra[at])) for at, entry in entries.items())
        yield counter(f"alerts_{column}", text, labels, samples)
    in_flight = ((at, float(entry.in_flight)) for at, entry in entries.items())
    yield gauge("alerts_in_flight", "Alerts whose outcome is not final yet", labels, in_flight)
    lag = (((topic, str(number)), float(behind)) for (topic, number), behind in sorted(now.lag.items()))
    yield gauge("consumer_lag", "Messages up to the end of each assigned partition", labels, lag)


def _single(numbers: dict[str, int]) -> Samples:
    return (((name,), float(number)) for name, number in numbers.items())
