"""Records and summaries: every value survives the manifest, and a value of the wrong type is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.bundle.store import open_bundle
from edgekit.compression.guard import Agreement, Latency, Limits, State
from edgekit.compression.metrics import Measurement
from edgekit.compression.recipe import Step
from edgekit.compression.record import PassRecord, Summary, records_of, search_of, summary_of
from edgekit.compression.trials import Constraints, Outcome, SearchRecord, Sensitivity
from edgekit.cost.memory import Memory
from edgekit.errors import EdgekitError
from edgekit.passes.change import Change

STORED = Path(__file__).parents[1] / "bundle" / "stored"
QUALITY = Measurement(0.5, 0.4, 0.6, 10)
LATENCY = Latency(1, 2.0, 1.0, 0.5, 0.4, 0.6)
RECORD = PassRecord(
    name="cluster",
    parameters={"bits": 4},
    before=State(QUALITY, 1000, 10),
    kept=True,
    reason="smaller",
    seed=3,
    parent="abc",
    seconds=1.5,
    plan=(Change("a", "b", "c"),),
    after=State(QUALITY, 500, 10),
    loss=Measurement(0.01, 0.0, 0.02, 10),
    latency=(LATENCY, replace(LATENCY, batch=16, against_best=0.9, against_best_low=0.8)),
    agreement=(Agreement("onnxruntime", 1, 1e-7), Agreement("onnxruntime", 16, math.inf, None, "bad")),
    other_outputs={"codes": math.inf},
    estimated_on="jetson-nano",
)
FAILED = PassRecord(name="half", parameters={}, before=State(QUALITY, 1000, 10), kept=False, reason="failed")
SUMMARY = Summary(
    metric="log-loss",
    original=QUALITY,
    change=Measurement(0.01, 0.0, 0.02, 10),
    latency=(LATENCY,),
    limits=Limits(max_loss=math.inf, max_slowdown=math.inf, min_gain=-math.inf, batches=(1, 16)),
    runtime="onnxruntime",
    machine={"cpu": "x", "cores": 2},
    agreement=(Agreement("onnxruntime", 1, 1e-7),),
    memory=Memory(1.0, 2.0, "node", 3.0, 5.0),
    memory_batch=16,
)
SEARCH = SearchRecord(
    (
        Outcome(0, (Step("cluster", {"bits": 4}, seed=7),), 0.1, 10, 1.5, 0.2, on_front=True, low=0.05),
        Outcome(1, (), math.inf, 9, 1.5, 0.2, fits_memory=False, low=0.0),
    ),
    (Sensitivity("w", 0.3), Sensitivity("v", math.inf)),
    0,
    Constraints(0.2, 100),
)


def through(value):
    return type(value).from_json(json.loads(json.dumps(value.to_json(), allow_nan=False)))


@pytest.mark.parametrize("value", [RECORD, FAILED, SUMMARY, SEARCH], ids=["record", "failed", "summary", "search"])
def test_every_value_survives_the_manifest(value):
    assert through(value) == value


@pytest.mark.parametrize(
    "other",
    [
        replace(RECORD, kept=False),
        replace(RECORD, estimated_on=None),
        replace(RECORD, after=None),
        replace(RECORD, other_outputs={}),
        replace(RECORD, latency=RECORD.latency[:1]),
        replace(SUMMARY, memory=None, memory_batch=None),
        replace(SUMMARY, limits=Limits()),
        replace(SEARCH, chosen=1),
    ],
)
def test_a_difference_survives_too(other):
    assert through(other) not in (RECORD, SUMMARY, SEARCH)


def test_nan_comes_back_as_nan():
    broken = replace(RECORD, loss=Measurement(math.nan, math.nan, math.nan, 10))
    assert math.isnan(through(broken).loss.value)


def test_a_bundle_of_long_ago_is_read():
    bundle = open_bundle(STORED / "clustered.edge")
    (record,) = records_of(bundle)
    assert (record.name, record.kept, record.before.bytes, record.after.bytes) == ("cluster", True, 5355, 2468)
    assert record.plan[0].tensor == "embed.weight"
    assert record.to_json() == bundle.manifest.records[0]
    assert summary_of(bundle).change.samples == 192
    assert search_of(bundle) is None


def test_a_bundle_that_was_never_compressed_has_no_summary(tiny_bundle):
    assert summary_of(tiny_bundle) is None
    assert records_of(tiny_bundle) == ()


@pytest.mark.parametrize("damage", [{"before": None}, {"surprise": 1}, {"latency": [{}]}])
def test_a_damaged_record_is_refused_by_name(tiny_bundle, damage):
    manifest = replace(tiny_bundle.manifest, records=({**RECORD.to_json(), **damage},))
    with pytest.raises(EdgekitError, match=r"tiny/edgekit\.json: a record cannot be read"):
        records_of(replace(tiny_bundle, manifest=manifest))
