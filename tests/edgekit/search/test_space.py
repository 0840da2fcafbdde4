"""The recipes that the search may suggest: they can be built, and each form appears only if it is allowed."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekit.bundle.family import build
from edgekit.bundle.format import Manifest, assemble_graph
from edgekit.bundle.onnx_file import serialized
from edgekit.bundle.tensors import TensorSpec
from edgekit.compression import decisions
from edgekit.compression.guard import Limits
from edgekit.compression.job import Job
from edgekit.compression.recipe import Step
from edgekit.compression.run import plan
from edgekit.compression.trials import Sensitivity
from edgekit.errors import EdgekitError
from edgekit.search import space as module
from edgekit.search.sensitivity import sensitivities
from edgekit.search.space import FULL, PLAIN, SHORT, Space, explored, forms, lengthened, smoothable, starts, suggest
from edgekit.targets import local, profile
from tests.edgekit.passes import graphs
from tests.edgekit.passes.networks import arguments_of, bundled, sequences


@pytest.fixture(scope="module")
def deep():
    """Return a job with an untrained transformer of four blocks that a Python function builds."""
    torch.manual_seed(0)
    arguments = {**arguments_of("transformer"), "arguments": {"depth": 4}}
    train, test = sequences(64, 1), sequences(32, 2)
    bundle = bundled("transformer", arguments, build("module", arguments), test)
    return Job(bundle, [], train, test, Limits(batches=(1, 16)), runtime="onnxruntime")


@pytest.fixture(scope="module")
def room(deep):
    return explored(deep, tuple(sensitivities(deep, lambda what, done, total: None)))


class Choice:
    """Returns the given choices, and the first allowed one otherwise, and records the allowed ones."""

    def __init__(self, **choices):
        self.choices, self.seen = choices, {}

    def suggest_categorical(self, name, values):
        self.seen[name] = list(values)
        chosen = self.choices.get(name, values[0])
        assert chosen in values, f"{name} = {chosen!r} is not offered: {values}"
        return chosen

    def suggest_int(self, name, low, high):
        self.seen[name] = (low, high)
        chosen = self.choices.get(name, low)
        assert low <= chosen <= high, name
        return chosen


def suggested(space, **choices):
    return suggest(Choice(**choices), space)


def names(steps):
    return [step.name for step in steps]


def test_only_recipes_that_can_be_run_are_suggested(room):
    """For each type of network, the test draws recipes at random; each must have a plan, not only be built."""
    import optuna

    met = defaultdict(int)
    for seed in range(30):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        steps = suggest(study.ask(), room)
        for step in steps:
            step.build()
            met[step.name] += 1
        if seed < 6:
            plan(replace(room.job, recipe=steps))
    assert {"dependency_prune", "remove_layers", "cluster", "quantize", "dynamic_int8", "qat_int8"} <= set(met)


def test_of_a_family_too(tiny_job):
    import optuna

    job = tiny_job([])
    space = explored(job, tuple(Sensitivity(name, 0.0) for name in ("embed.weight", "classifier.weight")))
    assert space.groups == ()
    assert space.stack == ("", 0)
    for seed in range(30):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        assert "remove_layers" not in names(suggest(study.ask(), space))


def test_a_start_fixes_every_choice_that_it_meets(room, tiny_job):
    """The search would draw an open choice at random, and the expert's recipe would be another one."""
    for space in (room, explored(tiny_job([]), ()), explored(tiny_job([], runtime="onnxruntime"), ())):
        for start in starts(space):
            trial = Choice(**start)
            suggest(trial, space)
            assert set(trial.seen) <= set(start), start
    recipes = [names(suggest(Choice(**start), room)) for start in starts(room)]
    assert recipes[0] == ["dynamic_int8"]
    assert ["dependency_prune", "dynamic_int8"] in recipes
    assert ["dependency_prune", "remove_layers", "dynamic_int8"] in recipes
    fast = replace(room, job=replace(room.job, limits=Limits(objective="latency")))
    assert all(start["form"] != "cluster" for start in starts(fast)), "codes take no time off"
    assert any(start["form"] == "cluster" for start in starts(room))
    planted = {key: value for key, value in starts(room)[1].items() if key != "shares"}
    trial = Choice(**planted)
    suggest(trial, room)
    assert not set(trial.seen) <= set(planted)


@pytest.mark.parametrize("form", ["dynamic_int8", "static_int8"])
def test_int8_leaves_the_most_sensitive_weights_of_a_network_alone(tiny_job, form):
    """A pass on a graph needs names of nodes. With the weight's name it would fail, and the search would lose one
    form."""
    job = tiny_job([], runtime="onnxruntime")
    job = replace(job, target=profile.find("x86-avx512"), test=job.test.take(np.arange(16)))
    ranked = sensitivities(job, lambda what, done, total: None)
    steps = suggested(Space(job, tuple(ranked)), exempt=1, form=form)
    ((_, changes),) = plan(replace(job, recipe=steps))
    (spared,) = ranked[0].nodes
    assert {item.tensor for item in changes if not item.after.startswith("int8")} >= {spared}
    assert any(item.after.startswith("int8") for item in changes)
    planted = (replace(steps[0], parameters={"exclude": [ranked[0].name]}),)
    with pytest.raises(EdgekitError, match="unknown node"):
        plan(replace(job, recipe=planted))


def test_matrices_may_become_thin_and_outliers_move_before_int8(tiny_job):
    job = tiny_job([], runtime="onnxruntime")
    assert "low_rank" in forms(job)
    thin = suggested(Space(job), form="low_rank", energy=0.9, **{"low_rank int8": True})
    assert names(thin) == ["low_rank", "dynamic_int8"]
    assert names(suggested(Space(job, smooth=True), form="dynamic_int8", smoothed=True)) == [
        "smooth_quant",
        "dynamic_int8",
    ]
    assert not smoothable(job)  # t2 adds the residual before it normalizes: nothing to balance
    assert names(suggested(Space(job), form="dynamic_int8")) == ["dynamic_int8"]
    nano = replace(job, target=profile.find("jetson-nano"))
    assert names(suggested(Space(nano), form="low_rank")) == ["low_rank"]


def test_outliers_are_balanced_where_a_product_follows_a_normalization(tiny_job):
    weights = {"g": np.ones(8, np.float32), "b": np.zeros(8, np.float32), "w": graphs.normal(1, 8, 4)}
    nodes = [("LayerNormalization", "x g b", "n", {}), ("MatMul", "n w", "y", {})]
    candidate = graphs.graph(nodes, weights, {"x": ("batch", 8)}, {"y": ("batch", 4)})
    x = graphs.normal(2, 8, 8)
    manifest = Manifest("even", "onnx", {}, (TensorSpec("x", ("batch", 8)),), (TensorSpec("y", ("batch", 4)),))
    bundle = assemble_graph(manifest, serialized(candidate.model), ({"x": x}, {"y": graphs.run(candidate, x)}))
    job = replace(tiny_job([]), source=bundle)
    assert smoothable(job)
    assert not set(forms(job)) & {"qat_int8", "cluster", "quantize"}, "a graph is not trained"
    space = explored(job, ())
    assert (space.groups, space.stack) == ((), ("", 0))
    trial = Choice(form="static_int8")
    suggest(trial, space)
    assert not set(trial.seen) & {"removed", "blocks", "shares"}


def test_training_through_int8_where_the_runtime_runs_its_graph(tiny_job, monkeypatch):
    runs = tiny_job([], runtime="onnxruntime")
    assert "qat_int8" in forms(runs)
    (step,) = suggested(Space(runs), form="qat_int8")
    assert step.parameters == {"epochs": SHORT["qat_int8"]}
    ranked = (Sensitivity("classifier.weight", 1.0), Sensitivity("embed.weight", 0.0))
    (spared,) = suggested(Space(runs, ranked), form="qat_int8", exempt=1)
    assert spared.parameters["include"] == ["embed.weight"]
    assert "qat_int8" not in forms(tiny_job([]))  # a runtime that takes networks
    assert "qat_int8" not in forms(replace(runs, target=profile.find("jetson-nano")))  # it has no int8
    assert "qat_int8" in forms(replace(runs, target=profile.find("rtx-3060-12gb")))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "qat_int8" not in forms(runs)  # nothing installed that could


def test_two_of_four_only_where_it_pays_and_can_be_seen(tiny_job, monkeypatch):
    job = tiny_job([], runtime="onnxruntime")
    rtx, p40 = (replace(job, target=profile.find(name)) for name in ("rtx-3060-12gb", "tesla-p40"))
    assert "sparsify" not in forms(job)
    assert "sparsify" not in forms(rtx), "an estimate counts every product"
    monkeypatch.setattr(decisions, "is_here", lambda target: True)
    monkeypatch.setattr(local, "is_here", lambda target: True)
    assert "sparsify" in forms(rtx)
    assert "sparsify" not in forms(p40), "it has no such units"
    first, second = suggested(Space(rtx), form="sparsify")
    assert (first.name, first.parameters) == ("sparsify", {"pattern": "2:4"})
    assert (second.name, second.parameters) == ("half", {})


def test_blocks_go_after_units_and_nothing_is_named_that_was_renumbered(room):
    assert room.stack == ("blocks", 4)
    steps = suggested(room, removed=0.5, blocks=0.25, exempt=2, form="dynamic_int8")
    assert names(steps) == ["dependency_prune", "remove_layers", "dynamic_int8"]
    assert steps[1].parameters == {"count": 1, "blocks": "blocks", "epochs": 2}
    assert steps[2].parameters == {}, "which block took the number of another is not known yet"
    plan(replace(room.job, recipe=steps))
    named = [node for item in room.ranked for node in item.nodes if node.startswith("blocks.3.")]
    assert named, [item.nodes for item in room.ranked]
    with pytest.raises(EdgekitError, match="unknown node"):  # planted: a node of the block that is no more
        plan(replace(room.job, recipe=(*steps[:2], Step("dynamic_int8", {"exclude": named[:1]}))))
    (codes,) = suggested(room, blocks=0.5, exempt=2, form="cluster", **{"cluster bits": 4, "wider": 2})[1:]
    assert codes.parameters == {"bits": 4, "epochs": 1}
    whole = Space(replace(room.job), room.ranked, stack=("", 0))
    trial = Choice(form="float32")
    suggest(trial, whole)
    assert "blocks" not in trial.seen, "too few blocks"


def test_shares_by_sensitivity(room):
    """The most sensitive groups lose half as much; or all groups compete in one ranking."""
    change = {item.name: item.change for item in room.ranked}
    most = [max(value for name, value in change.items() if name.startswith(f"{group}.")) for group in room.groups]
    assert most == sorted(most, reverse=True)
    (even,) = suggested(room, removed=0.5, form="float32")
    (ranked,) = suggested(room, removed=0.5, form="float32", shares="ranked")
    (spared,) = suggested(room, removed=0.5, form="float32", shares="spared")
    assert not {"layers", "global_ranking"} & set(even.parameters)
    assert ranked.parameters["global_ranking"] is True
    quarter = -(-len(room.groups) // 4)
    assert spared.parameters["layers"] == dict.fromkeys(room.groups[:quarter], 0.25)
    ((_, changes),) = plan(replace(room.job, recipe=(spared,)))
    left = {item.after.split(": ", 1)[1] for item in changes if ": " in item.after}
    assert any(f"of {room.groups[0]}" in text for text in left), left


def test_a_family_gives_each_kind_of_unit_a_share_of_its_own(tiny_job):
    job = tiny_job([])
    space = explored(job, ())
    shapes = []
    for apart in (-0.125, 0.0, 0.125):
        (step,) = suggested(space, removed=0.25, apart=apart, form="float32")
        shapes.append(step.parameters["keep"])
        assert plan(replace(job, recipe=(step,)))
    first = next(iter(shapes[0]))
    assert shapes[0][first] >= shapes[1][first] >= shapes[2][first]
    assert shapes[0][first] > shapes[2][first]
    assert len({tuple(sorted((name, left) for name, left in keep.items() if name != first)) for keep in shapes}) == 1


def test_bits_by_sensitivity(room):
    """Exempt weights get 8 bits, and the more sensitive half of the others gets more bits; one pass does both if they
    are equal."""
    order = [item.name for item in room.ranked]
    most, more, exact = suggested(room, form="quantize", exempt=2, wider=1, **{"quantize bits": 4})
    coded = order[2:]
    half = len(coded) // 2
    assert (most.parameters["bits"], most.parameters["include"]) == (4, coded[half:])
    assert (more.parameters["bits"], more.parameters["include"]) == (5, coded[:half])
    assert (exact.parameters["bits"], exact.parameters["include"]) == (8, order[:2])
    (same,) = suggested(room, form="quantize", wider=2, **{"quantize bits": 8})
    assert same.parameters["include"] == order
    assert len(suggested(room, form="quantize", wider=0, **{"quantize bits": 4})) == 1


def test_recovery_is_longer_at_the_end():
    trial = Step("dependency_prune", {"sparsity": 0.5, "epochs": SHORT["dependency_prune"]})
    assert lengthened(trial).parameters["epochs"] == FULL["dependency_prune"]
    assert lengthened(trial, 12).parameters["epochs"] == 12 * SHORT["dependency_prune"]
    assert lengthened(lengthened(trial, 12)).parameters["epochs"] == 24, "never shorter than what was judged"
    untrained = Step("quantize", {"bits": 8, "epochs": 0})
    assert lengthened(untrained) == untrained
    assert lengthened(Step("dynamic_int8", {})) == Step("dynamic_int8", {})
    assert set(SHORT) == set(FULL)
    assert all(SHORT[name] < FULL[name] for name in FULL)
    assert PLAIN["removed"] == 0
