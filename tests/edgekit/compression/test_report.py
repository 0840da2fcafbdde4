"""The report: complete and true for every kind of record, self-contained, reproducible."""

import copy
import re
from dataclasses import replace

import pytest

from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.compression import report
from edgekit.compression.guard import Latency
from edgekit.compression.trials import SearchRecord

PLACES = re.compile(r"""(?:src|href|action|url)\s*[=(]\s*["']?\s*(?:https?:)?//""")


def state(size, quality=0.5, parameters=600):
    return {
        "quality": {"value": quality, "low": quality - 0.04, "high": quality + 0.05, "samples": 1234},
        "bytes": size,
        "parameters": parameters,
    }


def record(name, before, after, *, kept=True, loss=0.002, ratio=0.8):
    return {
        "pass": name,
        "parameters": {"bits": 4, "keep": {"heads": 2}},
        "before": before,
        "after": after,
        "plan": [{"tensor": "embed.weight", "before": "16 x 32 bit", "after": "16 x 4 bit"}],
        "loss": {"value": loss, "low": loss - 0.001, "high": loss + 0.001, "samples": 1234},
        "latency": [
            {
                "batch": batch,
                "before_ms": 0.4 * batch,
                "after_ms": 0.4 * batch * ratio,
                "ratio": ratio,
                "low": ratio - 0.05,
                "high": ratio + 0.05,
            }
            for batch in (1, 16)
        ],
        "kept": kept,
        "reason": "2.00 times smaller" if kept else "costs +0.3000 in quality",
        "seconds": 1.5,
    }


KEPT = record("cluster", state(4000), state(2000, 0.502))
LOST = record("magnitude_prune", state(2000, 0.502), state(1500, 0.8), kept=False, loss=0.3)
FAILED = {
    "pass": "structured_prune",
    "parameters": {},
    "before": state(2000, 0.502),
    "kept": False,
    "reason": "keep.heads = 99; expected 1 to 4",
    "seconds": 0.0,
}
NAN = copy.deepcopy(LOST)  # as the manifest holds it: JSON has no NaN
NAN["after"]["quality"] |= {"value": None, "low": None, "high": None}
NAN["loss"] |= {"value": None, "low": None, "high": None}
COMPRESSION = {
    "original": {"value": 0.5, "low": 0.46, "high": 0.55, "samples": 1234},
    "change": {"value": 0.002, "low": 0.001, "high": 0.003, "samples": 1234},
    "metric": "class-averaged log-loss",
    "runtime": "onnxruntime",
    "limits": {"max_loss": 0.01, "batches": [1, 16]},
    "latency": [{"batch": 1, "before_ms": 0.4, "after_ms": 0.31, "ratio": 0.77, "low": 0.75, "high": 0.79}],
    "machine": {"cpu": "A <fast> CPU", "cores": 2, "system": "Linux x86_64"},
}


def compressed(source, *records, **values):
    values = {"parent": source.digest, "seed": 3, "versions": {"edgekit": "9.9"}, "data": "toy", **values}
    return replace(source, manifest=replace(source.manifest, records=tuple(records), **values))


@pytest.fixture
def no_pictures(monkeypatch):
    """Draw no pictures: the tests of the text do not need them, and drawing takes most of the time."""
    monkeypatch.setattr(report, "_pictures", lambda values: {"latency": ""})


def test_the_best_float_form_stands_beside_what_was_before(tiny_bundle, no_pictures):
    html = report.render(compressed(tiny_bundle, KEPT), tiny_bundle)
    assert "best float32 form" not in html
    measured = copy.deepcopy(KEPT)
    measured["latency"][0] |= {"against_best": 0.87, "against_best_low": 0.85}
    measured["latency"][1] |= {"against_best": None, "against_best_low": None}
    html = report.render(compressed(tiny_bundle, measured), tiny_bundle)
    assert html.count("; 0.87 times that of the original's best float32 form") == 1
    assert html.count("best float32 form") == 1


@pytest.mark.parametrize(
    ("records", "metrics"),
    [
        ((), {}),
        ((KEPT,), {}),
        ((LOST,), {}),
        ((FAILED,), {}),
        ((FAILED, LOST), {}),
        ((NAN,), {"compression": COMPRESSION}),
        ((KEPT, LOST, FAILED, NAN), {"compression": COMPRESSION}),
    ],
    ids=["none", "kept", "lost", "failed", "failed, lost", "nan", "all"],
)
def test_every_kind_of_record_is_told(tiny_bundle, records, metrics):
    html = report.render(compressed(tiny_bundle, *records, metrics=metrics), tiny_bundle)
    assert html.count("<article>") == len(records)
    assert html.count('<span class="badge lost">rolled back</span>') == sum(not item["kept"] for item in records)
    assert all(item["reason"] in html for item in records)
    assert tiny_bundle.digest in html
    assert "9.9" in html
    assert ("not measured" in html) == (FAILED in records or not records)
    assert html.count("<svg") == 2 * any(item in records for item in (KEPT, LOST)) + bool(metrics or KEPT in records)
    assert "None" not in html
    assert "nan" not in html.lower().split("<article>")[0].replace("not a number", "")


def test_headline_is_the_last_kept_pass_and_not_the_one_rolled_back(tiny_bundle, no_pictures):
    values = report.summary(compressed(tiny_bundle, KEPT, LOST), tiny_bundle)
    assert values["sizes"] == [4000, 2000]
    assert values["after"].quality.value == 0.502
    assert values["change"].value == 0.002
    html = report.render(compressed(tiny_bundle, KEPT, LOST), tiny_bundle)
    assert "4,000 → 2,000 bytes" in html
    assert "2.00 times smaller" in html
    assert "0.5000 → 0.5020" in html


def test_latency_measured_on_source_and_result_beats_the_product_over_passes(tiny_bundle, no_pictures):
    direct = compressed(tiny_bundle, KEPT, metrics={"compression": COMPRESSION})
    assert [item.ratio for item in report.summary(direct, tiny_bundle)["latency"]] == [0.77]
    assert "original and result timed in turns" in report.render(direct, tiny_bundle)
    product = compressed(tiny_bundle, KEPT, KEPT, LOST)
    assert [item.ratio for item in report.summary(product, tiny_bundle)["latency"]] == pytest.approx([0.64, 0.64])
    assert "product of the kept passes" in report.render(product, tiny_bundle)


def test_chained_latency_joins_intervals_of_logarithms():
    one, two = Latency(1, 10.0, 8.0, 0.8, 0.8 / 1.03, 0.8 * 1.03), Latency(1, 8.0, 4.0, 0.5, 0.5 / 1.04, 0.5 * 1.04)
    (item,) = report.chained([[one], [two]])
    assert (item.before_ms, item.after_ms, item.ratio) == pytest.approx((10, 4, 0.4))
    spread = 1.0497  # exp(sqrt(ln 1.03 ** 2 + ln 1.04 ** 2)); adding them up would give 1.0712
    assert (item.low, item.high) == pytest.approx((0.4 / spread, 0.4 * spread), rel=1e-3)
    assert report.chained([]) == []


def test_inherited_records_are_told_apart(tiny_bundle, no_pictures):
    source = compressed(tiny_bundle, KEPT)
    again = record("quantize", state(2000, 0.502), state(1800, 0.503))
    values = report.summary(compressed(source, KEPT, again), source)
    assert [item.name for item in values["inherited"]] == ["cluster"]
    assert values["sizes"] == [2000, 1800]
    assert "inherited from the source" in report.render(compressed(source, KEPT, again), source)
    assert "inherited from the source" not in report.render(compressed(tiny_bundle, KEPT, again), tiny_bundle)


def test_one_file_without_the_network(tiny_bundle):
    html = report.render(compressed(tiny_bundle, KEPT, LOST, metrics={"compression": COMPRESSION}), tiny_bundle)
    assert not PLACES.search(html)
    assert "<script" not in html
    assert "<link" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert PLACES.search('<img src="https://example.org/x.png">')  # the search finds what it is for
    assert PLACES.search("background: url(//example.org/x.png)")


def test_text_from_bundles_is_escaped(tiny_bundle):
    evil = {**KEPT, "pass": "<script>alert(1)</script>", "reason": "<b>"}
    source = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, name="<img src=x>"))
    html = report.render(compressed(source, evil, metrics={"compression": COMPRESSION}), source)
    assert "<script" not in html
    assert "<img" not in html
    assert "A &lt;fast&gt; CPU" in html


def test_the_same_bundle_gives_the_same_bytes(tiny_bundle, tmp_path):
    bundle = compressed(tiny_bundle, KEPT, LOST, metrics={"compression": COMPRESSION})
    first, second = (report.with_report(bundle, tiny_bundle) for _ in range(2))
    assert first.contents[report.NAME] == second.contents[report.NAME]
    assert first.digest == second.digest != bundle.digest
    other = report.with_report(compressed(tiny_bundle, KEPT), tiny_bundle)
    assert first.contents[report.NAME] != other.contents[report.NAME]
    write_bundle(first, tmp_path / "t.edge")  # hashes of the report are in the manifest, so opening verifies it
    assert open_bundle(tmp_path / "t.edge").contents[report.NAME] == first.contents[report.NAME]
    assert "<!doctype html>" in (tmp_path / "t.edge" / report.NAME).read_text(encoding="utf-8")


def test_recipe_is_shown_as_toml(tiny_bundle, no_pictures):
    recipe = {"pass": [{"name": "cluster", "bits": 4, "include": ["*.weight"]}]}
    html = report.render(compressed(tiny_bundle, KEPT, recipe=recipe), tiny_bundle)
    assert "[[pass]]\nname = &#34;cluster&#34;\nbits = 4\ninclude = [&#34;*.weight&#34;]" in html


SEARCH = {
    "trials": [
        {"number": 0, "recipe": [], "loss": 0.004, "bytes": 2000, "speedup": 1.2, "latency_ms": 0.3, "on_front": True},
        {"number": 1, "recipe": [], "loss": 0.9, "bytes": 900, "speedup": 2.5, "latency_ms": 0.2, "on_front": True},
        {"number": 2, "recipe": [], "loss": None, "bytes": 900, "speedup": 2.5, "latency_ms": 0.2, "on_front": False},
    ],
    "sensitivity": [{"name": "embed.weight", "change": 0.3}, {"name": "<b>", "change": None}],
    "chosen": 0,
    "targets": {"max_loss": 0.01, "max_size": None, "max_latency": None},
}


def test_a_search_shows_its_front_and_what_was_sensitive(tiny_bundle):
    metrics = {"compression": COMPRESSION, "search": SEARCH}
    html = report.render(compressed(tiny_bundle, KEPT, metrics=metrics), tiny_bundle)
    without = report.render(compressed(tiny_bundle, KEPT, metrics={"compression": COMPRESSION}), tiny_bundle)
    assert html.count("<svg") == without.count("<svg") + 2
    assert [trial.number for trial in SearchRecord.from_json(SEARCH).front] == [
        0,
        1,
    ]  # the best first, and no trial behind it
    for words in ("3 trials of the search", "embed.weight", "chosen, 1.20 x as fast", "Pareto front of the search"):
        assert words in html
        assert words not in without.split("<h2>Passes")[0]
    assert not PLACES.search(html)
