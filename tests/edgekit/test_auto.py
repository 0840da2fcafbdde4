"""The search: what it finds keeps to its targets on rows it never saw, and a killed search goes on."""

import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from edgekit import recipe
from edgekit.bundle import Manifest, TensorSpec, assemble_graph
from edgekit.compress import plan, run
from edgekit.errors import EdgekitError
from edgekit.graph import serialised
from edgekit.pack import pack
from edgekit.search import auto
from edgekit.search.auto import Outcome, Targets, held_out, search, sensitivities, suggest
from edgekit.targets import profile
from tests.edgekit.passes import graphs


@pytest.fixture
def job(tiny_job):
    return tiny_job([])


def silent(what, done, total):
    pass


def test_the_search_finds_a_smaller_model_within_its_targets(job, tmp_path):
    said = []
    found = search(job, Targets(max_loss=0.05), tmp_path / "w", trials=5, notify=said.append)
    assert len(pack(found.bundle)) < 0.7 * len(pack(job.source))
    summary = found.bundle.manifest.metrics["compression"]
    assert summary["change"]["value"] <= 0.05
    assert len(found.outcomes) == 5
    assert any(outcome.on_front for outcome in found.outcomes)
    chosen = found.bundle.manifest.metrics["search"]["chosen"]
    assert chosen in {outcome.number for outcome in found.outcomes}
    assert sum(line.startswith("recipe ") for line in said) == 5


def test_its_recipe_gives_the_same_bytes_again(job, tmp_path):
    found = search(job, Targets(max_loss=0.05), tmp_path / "w", trials=3)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(found.recipe))
    again = run(replace(job, recipe=recipe.read(path)), tmp_path / "elsewhere")
    assert again.contents == {name: found.bundle.contents[name] for name in again.contents}


def test_a_search_goes_on_where_it_was(job, tmp_path):
    first = search(job, Targets(max_loss=0.05), tmp_path / "w", trials=2)
    said = []
    more = search(job, Targets(max_loss=0.05), tmp_path / "w", trials=4, notify=said.append)
    assert said[0] == "resuming the search after 2 trials"
    assert more.outcomes[:2] == tuple(
        replace(o, on_front=n.on_front) for o, n in zip(first.outcomes, more.outcomes[:2], strict=True)
    )
    assert len({tuple(map(str, outcome.recipe)) for outcome in more.outcomes}) > 1


def test_targets_that_cannot_be_met_are_an_error_that_says_how_near_it_came(job, tmp_path):
    with pytest.raises(EdgekitError, match=r"no recipe keeps to max-loss 0.05, max-size 10"):
        search(job, Targets(max_loss=0.05, max_size=10), tmp_path / "w", trials=2)


def test_trials_never_see_the_test_rows(job):
    inner = held_out(job)
    seen = {row.tobytes() for part in (inner.train, inner.test) for row in part.inputs["light_curve"]}
    assert not seen & {row.tobytes() for row in job.test.inputs["light_curve"]}
    assert len(inner.train) + len(inner.test) == len(job.train)
    assert not {row.tobytes() for row in inner.train.inputs["light_curve"]} & {
        row.tobytes() for row in inner.test.inputs["light_curve"]
    }


def test_one_row_cannot_be_split(job):
    with pytest.raises(EdgekitError, match="hold out; the data has 1"):
        held_out(replace(job, train=job.train.take(np.arange(1))))


def test_the_weight_that_matters_most_comes_first(job):
    import torch

    model = job.source.model()
    with torch.no_grad():  # planted: one outlier leaves three bits of the classifier nothing for the rest
        model.classifier.weight[0, 0] += 200
    from edgekit.bundle import assemble

    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    bundle = assemble(job.source.manifest, weights, {}, job.source.golden())
    rng = np.random.default_rng(0)
    rows = job.test.take(rng.permutation(len(job.test))[:60])
    ranked = sensitivities(replace(job, source=bundle, test=rows), silent)
    assert {item.name for item in ranked} == {name for name, value in model.named_parameters() if value.ndim >= 2}
    assert [item.change for item in ranked] == sorted((item.change for item in ranked), reverse=True)


def test_what_fits():
    outcome = Outcome(0, (), loss=0.01, bytes=1000, speedup=1.2, latency_ms=3.0)
    assert outcome.fits(Targets(0.01, 1000, 3.0))
    for targets in (Targets(0.009), Targets(0.01, 999), Targets(0.01, None, 2.9)):
        assert not outcome.fits(targets)
    assert not replace(outcome, loss=math.nan).fits(Targets(1.0))


def test_only_recipes_that_can_be_built_are_suggested(job):
    import optuna

    ranked = [auto.Sensitivity(name, 0.0) for name in ("embed.weight", "classifier.weight")]
    for seed in range(30):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        for step in suggest(study.ask(), job, ranked, auto.SHORT):
            step.build()


def suggested(job, ranked, smooth=False, **values):
    import optuna

    return suggest(optuna.trial.FixedTrial({"removed": 0.0, **values}), job, ranked, auto.SHORT, smooth=smooth)


@pytest.mark.parametrize("form", ["dynamic_int8", "static_int8"])
def test_int8_leaves_the_most_sensitive_weights_of_a_network_alone(tiny_job, form):
    """A pass on the graph knows nodes. Given the weight's name, it fails, and the search has one form less."""
    job = tiny_job([], runtime="onnxruntime")
    job = replace(job, target=profile.find("x86-avx512"), test=job.test.take(np.arange(16)))
    ranked = sensitivities(job, silent)
    steps = suggested(job, ranked, exempt=1, form=form)
    ((_, changes),) = plan(replace(job, recipe=steps))
    (spared,) = ranked[0].nodes
    assert {item["tensor"] for item in changes if not item["after"].startswith("int8")} >= {spared}
    assert any(item["after"].startswith("int8") for item in changes)
    planted = (replace(steps[0], parameters={"exclude": [ranked[0].name]}),)
    with pytest.raises(EdgekitError, match="unknown node"):
        plan(replace(job, recipe=planted))


def test_matrices_may_become_thin_and_outliers_move_before_int8(tiny_job):
    job = tiny_job([], runtime="onnxruntime")
    assert "low_rank" in auto.forms(job)
    thin = suggested(job, [], exempt=0, form="low_rank", energy=0.9, **{"low_rank int8": True})
    assert [step.name for step in thin] == ["low_rank", "dynamic_int8"]
    even = suggested(job, [], smooth=True, exempt=0, form="dynamic_int8", smoothed=True)
    assert [step.name for step in even] == ["smooth_quant", "dynamic_int8"]
    assert not auto.smoothable(job)  # t2 adds the residual before it normalises: nothing to balance
    assert [step.name for step in suggested(job, [], exempt=0, form="dynamic_int8")] == ["dynamic_int8"]
    nano = replace(job, target=profile.find("jetson-nano"))
    assert [step.name for step in suggested(nano, [], exempt=0, form="low_rank", energy=0.9)] == ["low_rank"]


def test_outliers_are_balanced_where_a_product_follows_a_normalisation(tiny_job):
    weights = {"g": np.ones(8, np.float32), "b": np.zeros(8, np.float32), "w": graphs.normal(1, 8, 4)}
    nodes = [("LayerNormalization", "x g b", "n", {}), ("MatMul", "n w", "y", {})]
    candidate = graphs.graph(nodes, weights, {"x": ("batch", 8)}, {"y": ("batch", 4)})
    x = graphs.normal(2, 8, 8)
    manifest = Manifest("even", "onnx", {}, (TensorSpec("x", ("batch", 8)),), (TensorSpec("y", ("batch", 4)),))
    bundle = assemble_graph(manifest, serialised(candidate.model), ({"x": x}, {"y": graphs.run(candidate, x)}))
    assert auto.smoothable(replace(tiny_job([]), source=bundle))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_search_loses_at_most_its_trial(tiny_file, data_file, tmp_path, record_property):
    """The real command, killed twice at random moments of the search; then it goes to the end."""
    trials, seed = 6, int.from_bytes(os.urandom(4), "little")
    record_property("seed", seed)
    rng = np.random.default_rng(seed)
    command = [
        sys.executable, "-c", "from edgekit.cli import main; main()", "compress", str(tiny_file),
        "--auto", "--trials", str(trials), "--max-loss", "0.5",
        "--batch", "1", "--data", str(data_file), "--runtime", "torch", "-o", str(tmp_path / "out.edge"),
    ]  # fmt: skip
    environment = {**os.environ, "EDGEKIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    told = resumed = 0
    for kill in range(2):
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        timer = threading.Timer(rng.uniform(0, 1), child.kill)
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("resuming the search after"):
                resumed = int(line.split()[4])
                assert told <= resumed <= told + 1, f"seed {seed}: a finished trial was lost"  # told is told after it
                told = resumed
            if line.startswith("recipe "):
                told += 1
            if told > kill and timer.ident is None:
                timer.start()  # into a search that has something to lose
        timer.cancel()
        child.wait()
        assert child.returncode == -signal.SIGKILL, f"seed {seed}: it ended by itself"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resumed = next(int(line.split()[4]) for line in done.stderr.splitlines() if line.startswith("resuming the search"))
    assert told <= resumed <= told + 1, f"seed {seed}: a finished trial was lost"
    lines = [line for line in done.stderr.splitlines() if line.startswith("recipe ")]
    assert len(lines) == trials - resumed
    assert (tmp_path / "out.edge" / "recipe.toml").is_file()
