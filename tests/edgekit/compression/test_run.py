"""Running a recipe: planted bad passes are rolled back, a stopped run continues, the same job gives the same bytes."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from edgekit.bundle.format import GOLDEN, WEIGHTS
from edgekit.bundle.pack import pack
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.compression import metrics, recipe
from edgekit.compression.run import plan, run
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.nn.training import probabilities
from edgekit.passes.base import Candidate, Change, Pass
from edgekit.passes.cluster import Cluster

CLUSTER = ("cluster", {"bits": 5, "epochs": 1})
RECIPE = [("magnitude_prune", {"sparsity": 0.5, "epochs": 2}), CLUSTER, ("quantize", {"bits": 4, "epochs": 1})]


def computed(bundle):
    """Return the files with which a bundle computes, without its history."""
    return bundle.contents[WEIGHTS], bundle.contents[GOLDEN], bundle.manifest.arguments, bundle.manifest.bits


def verdicts(bundle):
    return [(record["pass"], record["kept"]) for record in bundle.manifest.records]


@pytest.fixture(scope="module")
def made():
    """The bundles of runs that several tests compare others with; the first test that needs one makes it."""
    return {}


@pytest.fixture
def straight(made, tiny_job, tmp_path_factory):
    """straight(steps): the bundle of an uninterrupted run of these steps."""

    def bundle(steps):
        if (key := json.dumps(steps)) not in made:
            made[key] = run(tiny_job(steps), tmp_path_factory.mktemp("straight")).bundle
        return made[key]

    return bundle


@dataclass(frozen=True, slots=True)
class Shrink(Pass[Candidate]):
    """A test pass: it clusters, so that there is a gain, and then applies `mischief` to the candidate."""

    name: ClassVar[str] = "planted"
    summary: ClassVar[str] = "what a bad pass would do"

    def plan(self, candidate):
        return [Change("all", "good", "bad")]

    def apply(self, candidate, context):
        return self.mischief(Cluster(bits=4, epochs=0).apply(candidate, context))

    def mischief(self, candidate):
        return candidate


class Destroys(Shrink):
    def mischief(self, candidate):
        model = candidate.copy_model()
        with torch.no_grad():
            model.classifier.weight.mul_(-1)
        return Candidate(candidate.family, candidate.arguments, model)


class MakesNan(Shrink):
    def mischief(self, candidate):
        model = candidate.copy_model()
        with torch.no_grad():
            model.blocks[0].expand.bias[3] = math.nan
        return Candidate(candidate.family, candidate.arguments, model)


class Raises(Shrink):
    def mischief(self, candidate):
        raise EdgekitError("training diverged in epoch 1")


class Crashes(Shrink):
    def mischief(self, candidate):
        return candidate.arguments["no such thing"]


class GivesNothing(Shrink):
    def mischief(self, candidate):
        return None


class PlanCrashes(Shrink):
    def plan(self, candidate):
        return [1 // 0]


class PlanRaises(Shrink):
    def plan(self, candidate):
        raise EdgekitError("no such tower")


class GainsNothing(Shrink):
    def apply(self, candidate, context):
        return Candidate(candidate.family, candidate.arguments, candidate.copy_model(), candidate.encodings)


class Prepares(GainsNothing):
    prepares: ClassVar[bool] = True


class PreparesBadly(Prepares, Destroys):
    def apply(self, candidate, context):
        return self.mischief(candidate)


def test_a_pass_that_prepares_others_is_kept_if_it_loses_nothing(tiny_job, register, tmp_path):
    register("edgekit.passes", "planted", Prepares)
    assert verdicts(run(tiny_job([("planted", {})]), tmp_path / "a").bundle) == [("planted", True)]
    register("edgekit.passes", "planted", PreparesBadly)
    assert verdicts(run(tiny_job([("planted", {})]), tmp_path / "b").bundle) == [("planted", False)]


def test_a_bundles_recipe_gives_its_bytes_again(tiny_job, straight, tmp_path):
    made = straight(RECIPE)
    steps = recipe.of_bundle(write_bundle(made, tmp_path / "made.edge"))
    assert [step.seed for step in steps] == [number for number, (_, kept) in enumerate(verdicts(made), 1) if kept]
    again = run(replace(tiny_job([]), recipe=steps, replay=True), tmp_path / "b").bundle
    assert computed(again) == computed(made)
    other = [replace(step, seed=99) for step in steps]  # planted: the seed matters
    assert computed(run(replace(tiny_job([]), recipe=other, replay=True), tmp_path / "c").bundle) != computed(made)


def test_the_shrinking_that_the_planted_passes_do_is_kept_on_its_own(tiny_job, register, tmp_path):
    register("edgekit.passes", "planted", Shrink)
    assert verdicts(run(tiny_job([("planted", {})]), tmp_path / "w").bundle) == [("planted", True)]


PLANTED = {
    "destroys the accuracy": (Destroys, r"costs \+\d.* in quality"),
    "gives NaN": (MakesNan, "NaN"),
    "raises": (Raises, "training diverged in epoch 1"),
    "raises while planning": (PlanRaises, "no such tower"),
    "crashes": (Crashes, "failed: KeyError: 'no such thing'"),
    "crashes while planning": (PlanCrashes, "failed: ZeroDivisionError"),
    "gives nothing": (GivesNothing, "gave a NoneType"),
    "gains nothing": (GainsNothing, "gains nothing"),
}


@pytest.mark.parametrize(("kind", "words"), PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("first", [[], [CLUSTER]], ids=["first", "after a good pass"])
def test_a_planted_bad_pass_is_rolled_back(kind, words, first, tiny_job, straight, register, tmp_path):
    register("edgekit.passes", "planted", kind)
    with_it = run(tiny_job([*first, ("planted", {})]), tmp_path / "with").bundle
    assert computed(with_it) == computed(straight(first))
    record = with_it.manifest.records[-1]
    assert record["kept"] is False
    with pytest.raises(EdgekitError, match=words):
        raise EdgekitError(record["reason"])
    json.dumps(record, allow_nan=False)


def test_what_comes_after_a_bad_pass_still_runs(tiny_job, register, tmp_path):
    register("edgekit.passes", "planted", Destroys)
    bundle = run(tiny_job([("planted", {}), CLUSTER]), tmp_path / "w").bundle
    assert verdicts(bundle) == [("planted", False), ("cluster", True)]


class SlowWhenClustered:
    """Mixed into the fake session: a codebook takes twice the time, because some runtimes dequantize slowly."""

    def __init__(self, bundle, *, threads=None, chunk=None):
        super().__init__(bundle, threads=threads)
        self.seconds *= 2 if bundle.encodings() else 1


class BatchDependent:
    """Mixed into the fake session: wrong from 16 rows on, once there is a codebook."""

    def __init__(self, bundle, *, threads=None, chunk=None):
        super().__init__(bundle, threads=threads)
        self.broken = bool(bundle.encodings())

    def run(self, arrays):
        outputs = super().run(arrays)
        shift = 0.01 if self.broken and len(next(iter(arrays.values()))) >= 16 else 0.0
        return {name: value + np.float32(shift) for name, value in outputs.items()}


@pytest.mark.parametrize(
    ("mixin", "words"), [(SlowWhenClustered, "slower at batch .*: 2.0"), (BatchDependent, "outputs at batch 16 differ")]
)
def test_a_runtime_that_does_not_like_the_result_rolls_it_back(
    mixin, words, tiny_job, register, fake_runtime, tmp_path
):
    register("edgekit.sessions", "picky", type("Picky", (mixin, fake_runtime), {}))
    bundle = run(tiny_job([CLUSTER], runtime="picky"), tmp_path / "w").bundle
    assert verdicts(bundle) == [("cluster", False)]
    with pytest.raises(EdgekitError, match=words):
        raise EdgekitError(bundle.manifest.records[0]["reason"])
    assert bundle.encodings() == {}
    assert verdicts(run(tiny_job([CLUSTER]), tmp_path / "w2").bundle) == [("cluster", True)], (
        "on another runtime it is kept"
    )


def test_a_metric_that_gives_nan_rolls_everything_back_and_the_bundle_can_be_written(tiny_job, monkeypatch, tmp_path):
    class Broken:
        name = "broken"
        labelled = True

        def value(self, probabilities, labels):
            return math.nan

    monkeypatch.setitem(metrics.METRICS, "broken", Broken())
    bundle = run(tiny_job([CLUSTER], metric="broken"), tmp_path / "w").bundle
    assert verdicts(bundle) == [("cluster", False)]
    assert "not a number" in bundle.manifest.records[0]["reason"]
    assert bundle.manifest.records[0]["after"]["quality"]["value"] is None
    write_bundle(bundle, tmp_path / "out.edge")
    assert open_bundle(tmp_path / "out.edge").digest == bundle.digest


def test_a_good_run_and_its_records(tiny_job, tmp_path):
    job = tiny_job(RECIPE)
    said = []
    bundle = run(job, tmp_path / "w", notify=said.append).bundle
    assert all(kept for _, kept in verdicts(bundle)[:2])
    assert len(pack(bundle)) < 0.6 * len(pack(job.source))
    assert bundle.manifest.parent == job.source.digest
    assert bundle.manifest.seed == 0
    assert bundle.manifest.recipe == {"pass": [{"name": name, **parameters} for name, parameters in RECIPE]}
    for record, (name, parameters) in zip(bundle.manifest.records, RECIPE, strict=True):
        assert (record["pass"], record["parameters"]) == (name, parameters)
        assert record["plan"]
        assert record["before"]["bytes"] > 0
        assert {item["batch"] for item in record["latency"]} == {1, 16}
    first, second = bundle.manifest.records[:2]
    assert second["before"] == first["after"]
    assert [line for line in said if line.startswith("pass ")] == [
        f"pass {number} of 3: {name}" for number, (name, _) in enumerate(RECIPE, start=1)
    ]
    # golden outputs are those of the shipped weights, on rows of the test data
    inputs, outputs = bundle.golden()
    rows = np.linspace(0, len(job.test) - 1, 8).astype(int)
    assert np.array_equal(inputs["light_curve"], job.test.inputs["light_curve"][rows])
    again = probabilities(bundle.model(), Dataset(inputs, np.zeros(8, np.int64)))
    assert np.abs(again - outputs["probabilities"]).max() < 1e-6
    change = bundle.manifest.metrics["compression"]["change"]
    assert change["value"] <= 0.05
    assert change["samples"] == 192


def test_two_runs_give_the_same_bytes_and_another_seed_others(tiny_job, straight, tmp_path):
    second, third = (run(tiny_job(RECIPE, seed=seed), tmp_path / str(seed)).bundle for seed in (0, 1))
    assert computed(straight(RECIPE)) == computed(second)
    assert computed(straight(RECIPE)) != computed(third)


class StoppedError(BaseException):
    """Ctrl-C."""


@pytest.mark.parametrize("stopped_at", [2, 3])
def test_a_stopped_run_goes_on_after_its_last_finished_pass(stopped_at, tiny_job, straight, tmp_path):
    def stop(message):
        if message.startswith(f"pass {stopped_at} "):
            raise StoppedError

    with pytest.raises(StoppedError):
        run(tiny_job(RECIPE), tmp_path / "w", notify=stop)
    said = []
    resumed = run(tiny_job(RECIPE), tmp_path / "w", notify=said.append).bundle
    assert said[0] == f"resuming after pass {stopped_at - 1} of 3"
    assert not any(line.startswith(f"pass {stopped_at - 1} ") for line in said), "a finished pass was run again"
    assert computed(resumed) == computed(straight(RECIPE))
    assert verdicts(resumed) == verdicts(straight(RECIPE))


def passes_run(job, work):
    said = []
    run(job, work, notify=said.append)
    return [line.split(": ")[1] for line in said if line.startswith("pass ")]


def test_only_what_changed_is_run_again(tiny_job, tmp_path):
    work = tmp_path / "w"
    assert passes_run(tiny_job(RECIPE), work) == ["magnitude_prune", "cluster", "quantize"]
    assert passes_run(tiny_job(RECIPE), work) == []
    other_end = [*RECIPE[:2], ("quantize", {"bits": 3, "epochs": 1})]
    assert passes_run(tiny_job(other_end), work) == ["quantize"]
    assert passes_run(tiny_job(RECIPE[:2]), work) == []
    assert passes_run(tiny_job([CLUSTER]), work) == ["cluster"]


def test_a_tuple_in_a_recipe_is_no_other_recipe(tiny_job, tmp_path):
    job = tiny_job([("cluster", {"bits": 4, "epochs": 1, "include": ("blocks.*",)})])
    assert passes_run(job, tmp_path / "w") == ["cluster"]
    assert passes_run(job, tmp_path / "w") == []


@pytest.mark.parametrize("other", [{"seed": 1}, {"max_loss": 0.2}, {"metric": "error-rate"}])
def test_the_state_of_another_job_is_not_taken_for_this_ones(other, tiny_job, tmp_path):
    assert passes_run(tiny_job([CLUSTER]), tmp_path / "w") == ["cluster"]
    assert passes_run(tiny_job([CLUSTER], **other), tmp_path / "w") == ["cluster"]
    assert passes_run(tiny_job([CLUSTER]), tmp_path / "w") == []


def test_a_damaged_state_is_computed_again(tiny_job, tmp_path):
    first = run(tiny_job(RECIPE[:2]), tmp_path / "w").bundle
    for weights in (tmp_path / "w").glob(f"*.edge/{WEIGHTS}"):
        weights.write_bytes(b"")
    assert computed(run(tiny_job(RECIPE[:2]), tmp_path / "w").bundle) == computed(first)


def test_a_folder_with_other_things_in_it_is_left_alone(tiny_job, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    run(tiny_job([CLUSTER]), tmp_path)
    run(tiny_job([CLUSTER], seed=2), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "..."


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [
        ([("clustr", {})], {}, "unknown pass 'clustr'"),
        ([CLUSTER, ("cluster", {"bits": 77})], {}, "bits = 77"),
        ([CLUSTER], {"runtime": "no-such"}, "unknown runtime 'no-such'"),
        ([CLUSTER], {"metric": "no-such"}, "unknown metric 'no-such'"),
    ],
)
def test_the_users_mistake_is_an_error_and_not_a_pass_rolled_back(steps, options, words, tiny_job, tmp_path):
    said = []
    with pytest.raises(EdgekitError, match=words):
        run(tiny_job(steps, **options), tmp_path / "w", notify=said.append)
    assert not any("kept" in line or "rolled back" in line for line in said)


def test_a_test_set_smaller_than_the_golden_rows(tiny_job, tmp_path):
    job = tiny_job([CLUSTER])
    small = replace(job, test=job.test.take(np.arange(6)))
    inputs, outputs = run(small, tmp_path / "w").bundle.golden()
    assert np.array_equal(inputs["light_curve"], small.test.inputs["light_curve"])
    assert len(outputs["probabilities"]) == 6


def test_a_compressed_bundle_can_be_compressed_further(tiny_job, tmp_path):
    once = run(tiny_job([CLUSTER]), tmp_path / "w1").bundle
    job = replace(tiny_job([("quantize", {"bits": 2, "epochs": 0})], max_loss=10), source=once)
    twice = run(job, tmp_path / "w2").bundle
    assert [record["pass"] for record in twice.manifest.records] == ["cluster", "quantize"]
    assert twice.manifest.parent == once.digest
    assert passes_run(job, tmp_path / "w2") == []


def test_the_plan_follows_the_shapes_and_changes_nothing(tiny_job, tmp_path):
    steps = [
        ("distill", {"student": {"heads": 3, "ff_dim": 12}, "epochs": 500}),
        ("structured_prune", {"keep": {"heads": 2}, "epochs": 500}),
        ("magnitude_prune", {"sparsity": 0.5, "epochs": 500}),
        ("cluster", {"bits": 4, "epochs": 500}),
    ]
    job = tiny_job(steps)
    before = computed(job.source)
    planned = plan(job)
    assert [step.name for step, _ in planned] == [name for name, _ in steps]
    changes = {
        name: {item.tensor: item for item in items} for (name, _), (_, items) in zip(steps, planned, strict=True)
    }
    query = "blocks.0.attention.query.weight"
    assert changes["structured_prune"][query].before == "(6, 16)"
    assert changes["structured_prune"][query].after.startswith("(4, 16)")
    assert changes["magnitude_prune"][query].before == "64 weights"
    assert changes["cluster"]["blocks.0.expand.weight"].before == f"{12 * 16} x 32 bit"
    assert computed(job.source) == before
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_later_pass_is_found_by_the_plan(tiny_job):
    steps = [("distill", {"student": {"heads": 2}}), ("structured_prune", {"keep": {"heads": 3}})]
    with pytest.raises(EdgekitError, match=r"keep\.heads = 3"):
        plan(tiny_job(steps))


def test_infinite_limits_can_be_recorded(tiny_job, tmp_path):
    bundle = run(tiny_job([CLUSTER], max_loss=math.inf), tmp_path / "w").bundle
    assert bundle.manifest.metrics["compression"]["limits"]["max_loss"] is None
    assert len(bundle.digest) == 64
