"""The decisions of a target: passes that must not run, open parameters, estimated latency, memory."""

from dataclasses import replace

import pytest

from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.compression import decisions
from edgekit.compression.bench import float_graph
from edgekit.compression.decisions import allowed, estimated, fitted, needed, rounded, with_defaults
from edgekit.compression.recipe import Step
from edgekit.compression.run import plan, run
from edgekit.compression.trials import Constraints, Outcome
from edgekit.errors import EdgekitError
from edgekit.search.auto import search
from edgekit.search.space import Space, forms, starts, suggest
from edgekit.targets import local, profile
from edgekit.targets.profile import Figure

P40, NANO, RTX, ORIN = (
    profile.find(name) for name in ("tesla-p40", "jetson-nano", "rtx-3060-12gb", "jetson-orin-nano-8gb")
)
AVX512, PI = profile.find("x86-avx512"), profile.find("raspberry-pi-5")
CLUSTER = ("cluster", {"bits": 5, "epochs": 1})


@pytest.mark.parametrize(
    ("target", "step", "reason"),
    [
        (P40, Step("half", {}), r"pass 1 \('half'\): tesla-p40 must not be given float16: .*1/64"),
        (P40, Step("half", {"dtype": "bf16"}), "tesla-p40 must not be given bfloat16"),
        (NANO, Step("static_int8", {}), r"jetson-nano must not be given int8: .*dp4a"),
        (NANO, Step("dynamic_int8", {}), "jetson-nano must not be given int8"),
        (NANO, Step("weight_only", {"bits": 8}), "jetson-nano must not be given int8"),
        (NANO, Step("weight_only", {"bits": 4}), "jetson-nano must not be given int4"),
        (RTX, Step("dynamic_int8", {}), r"reads no DynamicQuantizeLinear .*use static_int8"),
        (AVX512, Step("half", {}), "x86-avx512 must not be given float16"),
    ],
)
def test_a_pass_that_is_not_for_the_target_is_refused(target, step, reason):
    with pytest.raises(EdgekitError, match=reason):
        fitted(target, [step])
    assert not allowed(target, step)
    assert allowed(None, step), "without a target nothing is refused"


@pytest.mark.parametrize(
    ("target", "step"),
    [
        (P40, Step("half", {"storage": True})), (P40, Step("static_int8", {})), (P40, Step("dynamic_int8", {})),
        (NANO, Step("half", {})), (NANO, Step("quantize", {"bits": 8, "epochs": 0})),
        (NANO, Step("cluster", {"bits": 4})), (RTX, Step("half", {})), (RTX, Step("half", {"dtype": "bf16"})),
        (RTX, Step("static_int8", {})), (AVX512, Step("dynamic_int8", {})), (ORIN, Step("weight_only", {"bits": 8})),
    ],
)  # fmt: skip
def test_a_pass_that_is_for_the_target_is_not(target, step):
    assert allowed(target, step)


def test_a_step_that_is_wrong_is_an_error_and_not_a_pass_that_the_target_forbids():
    with pytest.raises(EdgekitError, match=r"unknown parameter 'bist'"):
        allowed(RTX, Step("cluster", {"bist": 4}))


def test_the_number_of_the_pass_is_said():
    with pytest.raises(EdgekitError, match=r"pass 2 \('half'\)"):
        fitted(P40, [Step(*CLUSTER), Step("half", {})])


@pytest.mark.parametrize(("target", "multiple"), [(P40, 4), (RTX, 8), (AVX512, 16)])
def test_channels_are_kept_in_the_targets_multiples(target, multiple):
    step = Step("dependency_prune", {"sparsity": 0.5})
    assert with_defaults(target, step).build().round_to == multiple
    own = Step("dependency_prune", {"sparsity": 0.5, "round_to": 3})
    assert with_defaults(target, own) == own, "the recipe says otherwise"


@pytest.mark.parametrize(
    ("target", "scheme", "bits"), [(P40, "s8s8", 8), (RTX, "s8s8", 8), (AVX512, "u8s8", 7), (PI, "s8s8", 7)]
)
def test_int8_graphs_are_in_the_targets_scheme(target, scheme, bits):
    built = with_defaults(target, Step("static_int8", {})).build()
    assert (built.scheme, built.weight_bits) == (scheme, bits)
    other = {"scheme": "u8s8" if scheme == "s8s8" else "s8s8", "weight_bits": 15 - bits}
    given = with_defaults(target, Step("static_int8", other)).build()
    assert (given.scheme, given.weight_bits) == tuple(other.values()), "the recipe says otherwise"


def test_the_form_of_another_pass_is_left_alone():
    """A pass with a parameter `form` of its own, such as weight_only, keeps its value."""
    assert with_defaults(RTX, Step("weight_only", {})) == Step("weight_only", {})


def test_units_to_keep_are_rounded():
    assert [rounded(RTX, count, 128) for count in (80, 77, 84, 3)] == [80, 80, 80, 8]
    assert rounded(RTX, 3, 5) == 3, "there are fewer units than the multiple"
    assert rounded(None, 77, 128) == 77


def test_without_a_target_nothing_changes(tiny_job, tmp_path):
    """The bytes and the records stay the same, and a run that was stopped before targets existed continues."""
    job = tiny_job([CLUSTER])
    assert job.on_target() is job
    assert not job.estimated
    made = run(job, tmp_path).bundle
    assert made.manifest.target is None
    assert "estimated_on" not in made.manifest.records[0]
    assert "memory" not in made.manifest.metrics["compression"]
    assert replace(job, target=RTX).key() != job.key()
    assert replace(job, target=RTX).key() != replace(job, target=P40).key()


def test_a_refused_pass_is_an_error_before_the_work_starts(tiny_job, tmp_path):
    job = tiny_job([CLUSTER, ("half", {})], target=P40)
    with pytest.raises(EdgekitError, match=r"pass 2 \('half'\): tesla-p40 must not be given float16"):
        run(job, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EdgekitError, match="tesla-p40 must not be given float16"):
        plan(job)


def test_latency_elsewhere_is_an_estimate_that_says_so(tiny_job, tmp_path):
    keep = {"heads": 2, "ff_dim": 8}
    job = tiny_job([("structured_prune", {"keep": keep, "epochs": 2}), CLUSTER], max_loss=0.5, target=RTX)
    made = run(job, tmp_path).bundle
    assert made.manifest.target == "rtx-3060-12gb"
    for record in made.manifest.records:
        assert record["estimated_on"] == "rtx-3060-12gb"
        assert record["reason"].endswith("(latency: an estimate for rtx-3060-12gb)")
    summary = made.manifest.metrics["compression"]
    assert summary["estimated_on"] == "rtx-3060-12gb"
    assert [item["low"] == item["ratio"] == item["high"] for item in summary["latency"]] == [True, True]
    expected = estimated(RTX, float_graph(job.source), float_graph(made), job.source.golden()[0], (1, 16))
    assert summary["latency"][1]["after_ms"] == pytest.approx(expected[1].after_ms)
    assert expected[1].ratio < 1, "half of the units take less time"
    assert summary["memory"]["fits"]
    again = write_bundle(made, tmp_path / "out.edge")
    assert open_bundle(again.path).manifest.target == "rtx-3060-12gb"


def test_latency_here_is_measured_as_ever(tiny_job, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "is_here", lambda target: True)
    monkeypatch.setattr(decisions, "is_here", lambda target: True)
    made = run(tiny_job([CLUSTER], target=AVX512), tmp_path).bundle
    assert made.manifest.target == "x86-avx512"
    assert "estimated_on" not in made.manifest.records[0]
    latency = made.manifest.metrics["compression"]["latency"][0]
    assert latency["low"] <= latency["ratio"] <= latency["high"]


def test_planted_a_pass_that_makes_the_model_slower_there_is_rolled_back(tiny_job, tmp_path, monkeypatch):
    def slower(target, before, after, inputs, batches):
        real = estimated(target, before, after, inputs, batches)
        return [replace(item, after_ms=2 * item.after_ms, ratio=2.0, low=2.0, high=2.0) for item in real]

    monkeypatch.setattr(decisions, "estimated", slower)
    made = run(tiny_job([CLUSTER], target=RTX), tmp_path).bundle
    (record,) = made.manifest.records
    assert not record["kept"]
    assert record["reason"].startswith("slower at batch 1: 2.00 times")


def test_half_precision_pays_where_there_are_units_for_it(tiny_job, tmp_path, monkeypatch):
    """The gain is that of an RTX 3060, by its data sheet. Measured on a CPU, the pass would be slower, and would be
    rolled back."""
    big = replace(RTX, launch=Figure(1e-12, "assumed: none"))  # a toy is bound by launches
    made = run(tiny_job([("half", {})], runtime="onnxruntime", target=big, max_loss=0.5), tmp_path).bundle
    (record,) = made.manifest.records
    assert record["kept"], record["reason"]


def test_memory_is_that_of_the_largest_batch(tiny_bundle):
    graph, inputs = float_graph(tiny_bundle), tiny_bundle.golden()[0]
    batch, found = needed(P40, graph, inputs, (1, 64, 16))
    assert batch == 64
    assert found.activations > needed(P40, graph, inputs, (1,))[1].activations


def test_a_weakly_typed_network_runs_in_the_plans_precision(tiny_bundle):
    """TensorRT 8.2 chooses half precision itself; a strongly typed network and onnxruntime follow the graph."""
    assert decisions.as_written(NANO) == "float16"
    assert decisions.as_written(RTX) == "float32"
    assert decisions.as_written(P40) == "float32"


class Trial:
    """Returns a given choice and records the allowed ones."""

    def __init__(self, **choices):
        self.choices, self.seen = choices, {}

    def suggest_categorical(self, name, values):
        self.seen[name] = list(values)
        return self.choices.get(name, values[0])

    def suggest_int(self, name, low, high):
        return self.choices.get(name, low)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, ["float32", "cluster", "quantize", "dynamic_int8", "half", "low_rank", "static_int8", "qat_int8"]),
        (P40, ["float32", "cluster", "quantize", "dynamic_int8", "half", "low_rank", "static_int8", "qat_int8"]),
        (NANO, ["float32", "cluster", "quantize", "half", "low_rank"]),
        (RTX, ["float32", "cluster", "quantize", "half", "low_rank", "static_int8", "qat_int8"]),
    ],
)
def test_the_search_tries_only_what_is_allowed(tiny_job, target, expected):
    job = tiny_job([], runtime="onnxruntime", target=target)
    assert forms(job) == expected
    assert all(start["form"] in expected for start in starts(Space(job)))
    trial = Trial(form="half")
    (half,) = [step for step in suggest(trial, Space(job)) if step.name == "half"]
    storage = target is None or target is P40
    assert half.parameters == ({"storage": True} if storage else {})
    assert trial.seen["form"] == expected


def test_the_search_keeps_units_in_multiples(tiny_job):
    for target, left in ((None, 6), (RTX, 8)):
        job = tiny_job([], target=target)
        (step,) = suggest(Trial(removed=0.625, apart=0.0, form="float32"), Space(job))
        assert step.parameters["keep"]["ff_dim"] == left


def test_the_search_keeps_to_an_estimated_latency(tiny_job, tmp_path):
    job = tiny_job([], target=NANO, max_loss=0.5)
    generous = estimated(NANO, float_graph(job.source), float_graph(job.source), job.source.golden()[0], (1,))[
        0
    ].after_ms
    found = search(job, Constraints(max_loss=0.5, max_latency=1.01 * generous), tmp_path, trials=2)
    assert found.bundle.manifest.metrics["compression"]["estimated_on"] == "jetson-nano"
    assert all(step.name not in ("dynamic_int8", "static_int8") for o in found.search.trials for step in o.recipe)
    with pytest.raises(EdgekitError, match=r"max-latency 1e-06 .*ms \(estimate\)|no trial came near"):
        search(job, Constraints(max_loss=0.5, max_latency=1e-6), tmp_path, trials=1)


def test_an_outcome_that_does_not_fit_is_no_result():
    outcome = Outcome(0, (), 0.0, 10, 1.0, 1.0)
    assert outcome.fits(Constraints(1.0))
    assert not replace(outcome, fits_memory=False).fits(Constraints(1.0))
    assert "fits_memory" in outcome.to_json()
