"""Prometheus' own parser reads the page."""

import re
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from alert_broker.stream import metrics
from alert_broker.stream.dead_letters import LONGEST_CATEGORY, category_of
from alert_broker.stream.metrics import page
from alert_broker.stream.stats import MOST_REASONS, OTHER, SECONDS, Stats
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.sample import busy_stats


def read(stats: Stats) -> dict[str, dict[tuple[str, ...], float]]:
    """Return {sample name: {label values: number}} of the page; labels are in falling order: topic, partition; stage,
    le."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(page(stats.snapshot()).decode()):
        for name, labels, value, *_ in family.samples:
            series = found.setdefault(name, {})
            at = tuple(labels[label] for label in sorted(labels, reverse=True))
            assert at not in series, f"{name}{labels} twice"
            series[at] = value
    return found


@pytest.fixture
def stats() -> Stats:
    return busy_stats()


def test_the_ledger_adds_up_on_the_page(stats):
    found = read(stats)
    assert found["edgekit_alerts_consumed_total"] == {("ztf", "0"): 1007, ("ztf", "1"): 250}
    assert found["edgekit_alerts_published_total"] == {("ztf", "0"): 900, ("ztf", "1"): 238}
    fates = ("published_total", "filtered_total", "dead_lettered_total", "revoked_total", "in_flight")
    for at, consumed in found["edgekit_alerts_consumed_total"].items():
        assert consumed == sum(found[f"edgekit_alerts_{fate}"][at] for fate in fates)


def test_counters_never_fall_when_a_partition_is_revoked(stats):
    stats.ledger.add(("ztf", 1), consumed=5)
    before = read(stats)["edgekit_alerts_consumed_total"]
    assert stats.ledger.revoke(("ztf", 1)) == 17
    assert read(stats)["edgekit_alerts_consumed_total"] == before
    assert read(stats)["edgekit_alerts_revoked_total"]["ztf", "1"] == 17


def check_inference(stats: Stats) -> None:
    """Check the buckets for the times in `busy_stats`: 3 ms 30 times, 20 ms 60 times, 80 ms 9 times, 700 ms once."""
    found = read(stats)
    buckets = {bound: n for (stage, bound), n in found["edgekit_stage_seconds_bucket"].items() if stage == "inference"}
    assert [float(bound) for bound in buckets] == [*SECONDS, float("inf")]
    assert [buckets[bound] for bound in ("0.0025", "0.005", "0.01", "0.025", "0.1", "0.5")] == [0, 30, 30, 90, 99, 99]
    assert buckets["1.0"] == buckets["+Inf"] == found["edgekit_stage_seconds_count"]["inference",] == 100
    expected = 30 * 0.003 + 60 * 0.02 + 9 * 0.08 + 0.7
    assert found["edgekit_stage_seconds_sum"]["inference",] == pytest.approx(expected)


def test_histograms_are_those_of_the_stats(stats):
    check_inference(stats)
    found = read(stats)
    assert found["edgekit_batch_alerts_bucket"]["128.0",] == 2
    assert found["edgekit_batch_alerts_sum"] == {(): 329}


def test_a_histogram_off_by_one_bucket_is_caught(stats, monkeypatch):
    now = stats.snapshot()
    right = now.stages["inference"]
    shifted = replace(now, stages={"inference": replace(right, counts=[0, *right.counts[:-1]])})
    monkeypatch.setattr(stats, "snapshot", lambda: shifted)
    with pytest.raises(AssertionError):
        check_inference(stats)


def test_the_other_numbers(stats):
    stats.paused = True
    found = read(stats)
    assert found["edgekit_consumer_lag"] == {("ztf", "0"): 40, ("ztf", "1"): 2}
    assert found["edgekit_queue_depth"] == {("decode",): 3, ("publish",): 0}
    assert found["edgekit_classes_total"] == {("SNIa",): 700, ("AGN",): 438}
    assert found["edgekit_dead_letters_total"] == {("does not decode",): 8, ('schema "x"\\ unknown\n',): 2}
    assert found["edgekit_cutouts_total"] == {("scored",): 1131, ("the packet lacks an image",): 7}
    assert found["edgekit_model_info"] == {("t2-gr", "ab" * 32): 1}
    assert found["edgekit_ready"] == found["edgekit_paused"] == {(): 1}
    assert 0 <= found["edgekit_progress_age_seconds"][()] <= found["edgekit_uptime_seconds"][()] < 60
    assert found["process_resident_memory_bytes"][()] > 1e7
    assert found["process_cpu_seconds_total"][()] > 0


def test_the_documented_names_are_those_on_the_page(stats):
    documented = set(re.findall(r"(?:edgekit|process)_[a-z_]*[a-z](?=[{ ,\n])", metrics.__doc__))
    columns = re.search(r"edgekit_alerts_\{(.*?)\}_total", metrics.__doc__)[1].split(",")
    documented |= {f"edgekit_alerts_{column}_total" for column in columns}
    found = {re.sub(r"_(bucket|sum|count)$", "", name) for name in read(stats)}
    assert {name for name in documented if name.startswith("edgekit")} == {n for n in found if n.startswith("edgekit")}
    assert {name for name in documented if name.startswith("process")} < found


def test_reasons_are_bounded_and_keep_their_label():
    stats, before = Stats(), {}
    for number in range(3 * MOST_REASONS):
        stats.dead_letters([f"byte {chr(97 + number % 26)}{number} ", "common", "common"])
        found = read(stats)["edgekit_dead_letters_total"]
        assert len(found) == len(stats.reasons) <= MOST_REASONS + 1
        assert sum(found.values()) == 3 * (number + 1)
        assert all(found[label] >= value for label, value in before.items())
        before = found
    assert before["common",] == 6 * MOST_REASONS
    assert before[OTHER,] == 2 * MOST_REASONS + 1


@given(st.dictionaries(st.text(max_size=3 * LONGEST_CATEGORY), st.integers(1, 9), max_size=50))
def test_any_text_can_be_a_reason(reasons):
    stats = Stats()
    for reason, number in reasons.items():
        stats.dead_letters([category_of(reason)] * number)
    found = read(stats).get("edgekit_dead_letters_total", {})
    assert sum(found.values()) == sum(reasons.values())
    assert all(len(label) <= LONGEST_CATEGORY for (label,) in found)


def test_before_anything_has_come():
    found = read(Stats())
    assert found["edgekit_ready"] == {(): 0}
    assert found["edgekit_stage_seconds_count"]["decode",] == 0
    assert "edgekit_alerts_consumed_total" not in found


def test_without_the_package_the_error_names_the_extra(monkeypatch, stats):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(EdgekitError, match=r"needs prometheus_client.*pip install 'edgekit\[stream\]'"):
        page(stats.snapshot())
