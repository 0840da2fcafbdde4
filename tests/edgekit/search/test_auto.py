"""The search: its result keeps to the constraints on rows that it never saw, and a killed search continues."""

import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from edgekit.bundle.pack import pack
from edgekit.compression import metrics, recipe, record
from edgekit.compression.guard import State
from edgekit.compression.recipe import Step, of_bundle
from edgekit.compression.record import PassRecord
from edgekit.compression.run import run
from edgekit.compression.trials import Constraints, Outcome
from edgekit.errors import EdgekitError
from edgekit.search import auto
from edgekit.search.auto import LONGER, held_out, search
from edgekit.search.outcomes import finalists, promising
from edgekit.search.sensitivity import sensitivities


@pytest.fixture
def job(tiny_job):
    return tiny_job([])


def silent(what, done, total):
    pass


def test_the_search_finds_a_smaller_model_within_its_targets(job, tmp_path):
    said = []
    found = search(job, Constraints(max_loss=0.05), tmp_path / "w", trials=5, notify=said.append)
    assert len(pack(found.bundle)) < 0.7 * len(pack(job.source))
    assert found.summary.change.value <= 0.05
    assert len(found.search.trials) == 5
    assert any(trial.on_front for trial in found.search.trials)
    assert found.search.chosen in {trial.number for trial in found.search.trials}
    assert record.search_of(found.bundle).chosen == found.search.chosen
    assert sum(line.startswith("recipe ") for line in said) == 5


def test_its_recipe_gives_the_same_bytes_again(job, tmp_path):
    found = search(job, Constraints(max_loss=0.05), tmp_path / "w", trials=3)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(recipe.of_bundle(found.bundle)))
    again = run(replace(job, recipe=recipe.read(path)), tmp_path / "elsewhere").bundle
    assert again.contents == {name: found.bundle.contents[name] for name in again.contents}


def test_a_search_goes_on_where_it_was(job, tmp_path):
    first = search(job, Constraints(max_loss=0.05), tmp_path / "w", trials=2)
    said = []
    more = search(job, Constraints(max_loss=0.05), tmp_path / "w", trials=4, notify=said.append)
    assert said[0] == "resuming the search after 2 trials"
    assert more.search.trials[:2] == tuple(
        replace(o, on_front=n.on_front) for o, n in zip(first.search.trials, more.search.trials[:2], strict=True)
    )
    assert len({tuple(map(str, outcome.recipe)) for outcome in more.search.trials}) > 1


def test_a_metric_under_which_more_is_better_is_refused_before_any_trial(job, tmp_path, monkeypatch):
    accuracy = metrics.Custom("accuracy", lambda found, wanted: float((found.argmax(1) == wanted).mean()))
    monkeypatch.setattr(metrics, "metric", lambda name: accuracy)
    monkeypatch.setattr(auto, "run", lambda *_, **__: pytest.fail("a trial has begun"))
    with pytest.raises(EdgekitError, match="lower must be better"):
        search(job, Constraints(max_loss=0.05), tmp_path / "w", trials=1)


def test_targets_that_cannot_be_met_are_an_error_that_says_how_near_it_came(job, tmp_path):
    with pytest.raises(EdgekitError, match=r"no recipe keeps to max-loss 0.05, max-size 10"):
        search(job, Constraints(max_loss=0.05, max_size=10), tmp_path / "w", trials=2)


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
    from edgekit.bundle.format import assemble

    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    bundle = assemble(job.source.manifest, weights, {}, job.source.golden())
    rng = np.random.default_rng(0)
    rows = job.test.take(rng.permutation(len(job.test))[:60])
    ranked = sensitivities(replace(job, source=bundle, test=rows), silent)
    assert {item.name for item in ranked} == {name for name, value in model.named_parameters() if value.ndim >= 2}
    assert [item.change for item in ranked] == sorted((item.change for item in ranked), reverse=True)


def test_what_fits():
    outcome = Outcome(0, (), loss=0.01, bytes=1000, speedup=1.2, latency_ms=3.0)
    assert outcome.fits(Constraints(0.01, 1000, 3.0))
    for constraints in (Constraints(0.009), Constraints(0.01, 999), Constraints(0.01, None, 2.9)):
        assert not outcome.fits(constraints)
    assert not replace(outcome, loss=math.nan).fits(Constraints(1.0))


PRUNED = (Step("structured_prune", {"keep": {"heads": 1}, "epochs": 2}),)


def speed(outcome):
    return outcome.speedup


def test_only_a_loss_that_recovery_may_mend_is_worth_a_longer_one():
    near = Outcome(1, PRUNED, loss=0.05, bytes=1000, speedup=3.0, latency_ms=1.0)
    best = Outcome(0, PRUNED, loss=0.0, bytes=1000, speedup=2.0, latency_ms=1.0)
    assert promising(near, Constraints(0.02), [best], speed)
    assert promising(near, Constraints(0.02), [], speed)
    worse = {
        "keeps to the limit": replace(near, loss=0.01),
        "too far off": replace(near, loss=0.3),
        "within the noise, which the last round decides": replace(near, loss=0.03, low=0.01),
        "no number": replace(near, loss=math.inf),
        "slower than what fits": replace(near, speedup=1.9),
        "trains nothing": replace(near, recipe=(Step("dynamic_int8", {}),)),
        "does not fit the memory": replace(near, fits_memory=False),
    }
    for why, outcome in worse.items():
        assert not promising(outcome, Constraints(0.02), [best], speed), why
    assert not promising(near, Constraints(0.02, max_size=999), [best], speed)
    assert promising(near, Constraints(0.02), [replace(best, loss=0.05, speedup=9.0)], speed), "that one does not fit"


def test_the_last_round_takes_what_the_noise_leaves_open_and_no_more():
    safe = Outcome(0, PRUNED, loss=0.0, bytes=1000, speedup=2.0, latency_ms=1.0, low=-0.02)
    noisy = replace(safe, number=1, loss=0.03, low=0.01, speedup=3.0)
    lost = replace(safe, number=2, loss=0.06, low=0.03, speedup=4.0)
    few_rows = replace(safe, number=3, loss=0.06, low=0.0, speedup=5.0)
    old = replace(noisy, number=4, low=math.nan)
    nothing = replace(safe, number=5, recipe=())
    found = finalists([safe, noisy, lost, few_rows, old, nothing], Constraints(0.02), speed)
    assert [outcome.number for outcome in found] == [1, 0]


def test_a_heavy_pruning_gets_the_recovery_it_needs(job, tmp_path, monkeypatch):
    """The short recovery misses the limit, and a longer one does not. The search judges the longer one and uses it for
    the result."""
    heavy = {"removed": 0.5, "form": "float32", "exempt": 0, "apart": 0.0}
    monkeypatch.setattr(auto, "starts", lambda space: [heavy])
    said = []
    first = search(job, Constraints(max_loss=5.0), tmp_path / "measure", trials=1)
    short = first.search.trials[0].loss
    recovered = []
    real = auto.run

    def run(job, work, **options):
        recovered.append([step.parameters.get("epochs") for step in job.recipe])
        return real(job, work, **options)

    monkeypatch.setattr(auto, "run", run)
    limit = 0.45 * short  # farther off than noise goes
    assert short > 0.05, "the toy is no longer hurt by losing half of its units"
    found = search(job, Constraints(max_loss=limit), tmp_path / "w", trials=1, notify=said.append)
    longest = found.search.trials[0].recipe[0].parameters["epochs"]
    assert recovered[:2] == [[2], [2 * LONGER[0]]]
    assert longest in (2 * factor for factor in LONGER)
    assert found.search.trials[0].loss < short
    assert of_bundle(found.bundle)[0].parameters["epochs"] == longest
    assert any("keeps it from being the best" in line for line in said)
    # planted: a search that judges by the short recovery finds nothing
    monkeypatch.setattr(auto, "LONGER", ())
    with pytest.raises(EdgekitError, match="no trial came near"):
        search(job, Constraints(max_loss=limit / 2), tmp_path / "planted", trials=1)


def last_round(job, monkeypatch, tmp_path, trials, results):
    """Return the chosen trial and the trials that ran, if the final runs have these results: (loss, speedup, passes
    kept)."""
    tried = []

    done = run(job, tmp_path / "w")
    point = done.summary.original

    def outcome_of(number, recipe, result):
        tried.append(number)
        loss, speedup, _ = results[number]
        return Outcome(number, recipe, loss=loss, bytes=1000, speedup=speedup, latency_ms=1.0)

    def final_run(final, work, **options):
        _, _, kept = results[final.recipe[0].seed]
        before = State(point, 1000, 10)
        records = tuple(
            PassRecord(
                name="x", parameters={}, before=before, kept=good, reason="", loss=replace(point, value=float(not good))
            )
            for good in kept
        )
        return replace(done, records=records)

    monkeypatch.setattr(auto, "_outcome", outcome_of)
    monkeypatch.setattr(auto, "run", final_run)
    silent = (lambda line: None, lambda *state: None)
    number, _ = auto._best_final(job, Constraints(0.02), trials, speed, tmp_path, *silent)
    return number, tried


def trial_of(number, loss, speedup):
    recipe = (replace(PRUNED[0], seed=number),)
    return Outcome(number, recipe, loss=loss, bytes=1000, speedup=speedup, latency_ms=1.0, low=0.0)


def test_what_lost_more_than_a_failure_is_not_tried(job, tmp_path, monkeypatch):
    """The search continues with milder recipes after the test rows refused one."""
    trials = (trial_of(1, 0.03, 9.0), trial_of(2, 0.035, 8.0), trial_of(3, 0.01, 7.0))
    results = {1: (0.05, 9.0, [True]), 2: (0.0, 8.0, [True]), 3: (0.0, 7.0, [True])}
    assert last_round(job, monkeypatch, tmp_path, trials, results) == (3, [1, 3])
    nothing = dict.fromkeys(results, (0.05, 9.0, [True]))
    with pytest.raises(EdgekitError, match=r"best: \+0.0500, .*; \+0.0500"):
        last_round(job, monkeypatch, tmp_path, trials, nothing)


def test_a_recipe_that_lost_its_pruning_is_not_what_was_chosen(job, tmp_path, monkeypatch):
    """The search keeps the result without the pruning as a candidate. It prefers a milder recipe that is faster, and
    does not run a slower one."""
    trials = (trial_of(1, 0.01, 4.0), trial_of(2, 0.005, 3.0), trial_of(3, 0.0, 1.5))
    rolled_back = {1: (0.0, 2.0, [False, True]), 2: (0.0, 3.0, [True, True]), 3: (0.0, 1.5, [True])}
    assert last_round(job, monkeypatch, tmp_path, trials, rolled_back) == (2, [1, 2])
    milder_fails = {**rolled_back, 2: (0.0, 1.9, [False, True])}
    assert last_round(job, monkeypatch, tmp_path, trials, milder_fails) == (1, [1, 2])
    whole = {**rolled_back, 1: (0.0, 4.0, [True, True])}
    assert last_round(job, monkeypatch, tmp_path, trials, whole) == (1, [1])


# A call is said to take 0.1 s, so the guard times each model seven times and not 400 times.
COMMAND = """
from edgekit.cli import main
from edgekit.compression import guard

guard._thread_seconds = lambda session, rows: session.run(rows) and 0.1
main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.faults
def test_a_killed_search_loses_at_most_its_trial(tiny_file, data_file, tmp_path, record_property):
    """The test kills the real command twice at random moments of the search; the third run finishes."""
    trials, seed = 4, int.from_bytes(os.urandom(4), "little")
    record_property("seed", seed)
    rng = np.random.default_rng(seed)
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "compress",
        str(tiny_file),
        "--auto",
        "--trials",
        str(trials),
        "--max-loss",
        "0.5",
        "--batch",
        "1",
        "--data",
        str(data_file),
        "--runtime",
        "torch",
        "-o",
        str(tmp_path / "out.edge"),
    ]
    environment = {**os.environ, "EDGEKIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    told = resumed = 0
    for kill in range(2):
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        timer = threading.Timer(rng.uniform(0, 0.5), child.kill)
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
