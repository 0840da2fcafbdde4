"""The pipeline's statistics: histograms, bounded reasons, and snapshots that do not change afterwards."""

import pytest

from alert_broker.stream import stats as module
from alert_broker.stream.stats import MOST_REASONS, OTHER, Histogram, Stats


def test_a_value_on_a_bound_is_in_that_bucket():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]
    assert (histogram.count, histogram.total) == (5, 7.5)


@pytest.mark.parametrize(("share", "bound"), [(0.4, 1.0), (0.5, 2.0), (0.8, 2.0), (0.81, float("inf"))])
def test_a_quantile_is_the_bound_of_its_bucket(share, bound):
    histogram = Histogram((1.0, 2.0))
    for value, times in ((0.5, 4), (1.5, 4), (9.0, 2)):
        histogram.add(value, times)
    assert histogram.quantile(share) == bound


def test_a_histogram_without_values_has_the_quantile_0():
    assert Histogram((1.0,)).quantile(0.5) == 0.0


def test_reasons_are_bounded_and_none_is_lost():
    stats = Stats()
    stats.dead_letters(f"reason {number}" for number in range(MOST_REASONS + 5))
    stats.dead_letters(["reason 0", "reason of its own"])
    reasons = stats.snapshot().reasons
    assert len(reasons) == MOST_REASONS + 1
    assert (reasons["reason 0"], reasons[OTHER]) == (2, 6)
    assert sum(reasons.values()) == MOST_REASONS + 7


def test_a_snapshot_does_not_change_afterwards():
    stats = Stats()
    before = stats.snapshot()
    stats.observe("decode", 0.1, 3)
    stats.batch(7)
    stats.classes["SNIa"] += 1
    stats.ledger.add(("topic", 0), consumed=5)
    after = stats.snapshot()
    assert (before.stages["decode"].count, before.batch_sizes.count, before.classes["SNIa"]) == (0, 0, 0)
    assert before.ledger.total().consumed == 0
    assert (after.stages["decode"].count, after.batch_sizes.count, after.classes["SNIa"]) == (3, 1, 1)
    assert after.ledger.total().consumed == 5


def test_a_stage_that_fails_is_timed_too(monkeypatch):
    now = iter(range(0, 100, 2))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    stats = Stats()
    with pytest.raises(ZeroDivisionError), stats.stage("decode"):
        _ = 1 / 0
    assert stats.snapshot().stages["decode"].total == 2


def test_progress_resets_its_age(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    stats = Stats()
    clock[0] = 130.0
    assert (stats.snapshot().uptime, stats.snapshot().progress_age) == (30.0, 30.0)
    stats.progress()
    assert (stats.snapshot().uptime, stats.snapshot().progress_age) == (30.0, 0.0)
