"""Numbers for Prometheus: histograms that a program keeps, and families of samples in its text format."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from edgekit.errors import missing_extra

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
Samples = Iterable[tuple[tuple[str, ...], float]]  # the label values and the number of each sample


class Collector(Protocol):
    """Gives the families of a page, as prometheus_client asks for them."""

    def collect(self) -> Iterable[Metric]: ...


@dataclass(slots=True)
class Histogram:
    """Counts in buckets with these upper bounds, as in Prometheus, and a last count for values above all bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Return the upper bound of the bucket that contains this share of the values; 0 if there are no values."""
        reached, wanted = 0, share * self.count
        for bound, number in zip((*self.bounds, float("inf")), self.counts, strict=True):
            reached += number
            if number and reached >= wanted:
                return bound
        return 0.0

    def copy(self) -> Histogram:
        return Histogram(self.bounds, list(self.counts), self.total)


def page(collector: Collector) -> bytes:
    """Return the page in Prometheus' text format, with the process' own numbers."""
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), "stream", "the metrics page") from None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    ProcessCollector(registry=registry)
    return generate_latest(registry)


def counter(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    """Return a counter; the page adds edgekit_ before its name and _total behind it."""
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(f"edgekit_{name}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def gauge(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"edgekit_{name}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def histograms(name: str, text: str, label: str | None, found: Mapping[str, Histogram]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(f"edgekit_{name}", text, labels=[label] if label else [])
    for value, histogram in found.items():
        buckets, reached = [], 0
        for bound, number in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            reached += number
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), reached))
        family.add_metric([value] if label else [], buckets, histogram.total)
    return family
