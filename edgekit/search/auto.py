"""`edgekit compress --auto`: find the recipe. Sensitivity of every weight first, then a multi-objective search
(NSGA-II, Deb et al. 2002) over passes and their parameters; every trial is a real run, guarded and measured.

Trials are judged on rows held out of the training part; the test rows see only the recipe that is chosen, so that the
choice does not flatter itself. A trial recovers for a few epochs; one that would be the best but for its loss recovers
longer before it is judged. The study is a journal on disk: a search that was killed goes on and loses at most the
trial it was in, and the states that trials share are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle.format import Bundle
from edgekit.compression.job import Job, Notify, ShowProgress
from edgekit.compression.recipe import Step, of_bundle
from edgekit.compression.run import run
from edgekit.errors import EdgekitError, missing_extra
from edgekit.search.outcomes import Constraints, Outcome, Score, finalists, packed, promising, score_of
from edgekit.search.sensitivity import Sensitivity, sensitivities
from edgekit.search.space import SPACE, Space, explored, lengthened, starts, suggest

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "optuna", "search", "--auto") from None

HELD_OUT = 0.25  # of the training rows, for trials
PATIENCE = 12  # trials without a new point on the Pareto front after which the search stops
NUMBERS = ("loss", "low", "bytes", "speedup", "latency_ms", "fits_memory")  # of an outcome, kept in the study
LONGER = (4, 12)  # times the short recovery, for a recipe that only the loss stands in the way of
FINALISTS = 5  # recipes that the test rows see


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search: the compressed bundle, its recipe, and what was tried on the way."""

    bundle: Bundle
    recipe: tuple[Step, ...]
    outcomes: tuple[Outcome, ...]
    sensitivity: tuple[Sensitivity, ...]


def search(
    job: Job,
    constraints: Constraints,
    work: Path,
    *,
    trials: int = 40,
    notify: Notify = lambda message: None,
    progress: ShowProgress = lambda what, done, total: None,
) -> Found:
    """Search, then run the best recipe within the targets on the job's own data. Where that one fails on the test rows,
    the next best has its turn; where none is left, an error says how far they were."""
    trial_job = held_out(job)
    study, score = _study(job, work), score_of(job)
    space = _space(study, job, trial_job, progress)
    for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(stale.number, state=TrialState.FAIL)  # of a search that was killed
    done = len(_complete(study))
    if not study.get_trials(deepcopy=False):
        for start in starts(space):
            study.enqueue_trial(start)
    if done:
        notify(f"resuming the search after {done} trials")
    stopped = ""
    while (done := len(_complete(study))) < trials:
        progress("search", done, trials)
        if _stale(study):
            stopped = f"no better recipe in the last {PATIENCE} trials"
            break
        trial = study.ask()
        steps = suggest(trial, space)
        outcome = _outcome(trial.number, steps, run(replace(trial_job, recipe=steps), work, progress=progress))
        for factor in LONGER:
            if not promising(outcome, constraints, _outcomes(study), score):
                break
            notify(f"  it would be the best but for its loss, {outcome.loss:+.4f}: recovers {factor} times as long")
            short, steps = outcome, tuple(lengthened(step, factor) for step in steps)
            outcome = _outcome(trial.number, steps, run(replace(trial_job, recipe=steps), work, progress=progress))
            if outcome.loss > short.loss / 2:  # more of the same would not do
                break
        trial.set_user_attr("recipe", [[step.name, dict(step.parameters), step.seed] for step in steps])
        for name in NUMBERS:
            trial.set_user_attr(name, getattr(outcome, name))
        study.tell(trial, [outcome.loss, math.log(outcome.bytes), -math.log(outcome.speedup)])
        notify(
            f"recipe {trial.number + 1}, trial {done + 1} of {trials}: {outcome.loss:+.4f}, {outcome.bytes:,} bytes, "
            f"{outcome.speedup:.2f} times as fast: {', '.join(step.name for step in steps) or 'as it is'}"
        )
    progress("search", trials, trials)
    if stopped:
        notify(f"search stopped: {stopped}")
    outcomes = _outcomes(study)
    return _finish(job, constraints, outcomes, space.ranked, score, work, notify, progress)


def held_out(job: Job) -> Job:
    """The job on the training rows alone, a quarter of them held out."""
    rows = np.random.default_rng(job.seed).permutation(len(job.train))
    cut = max(1, round(HELD_OUT * len(rows)))
    if len(rows) < 2:
        raise EdgekitError(f"--auto needs training rows to hold out; the data has {len(rows)}")
    limits = replace(job.limits, max_loss=math.inf, max_slowdown=math.inf, min_gain=-math.inf)  # judged as a whole
    return replace(job, train=job.train.take(rows[cut:]), test=job.train.take(rows[:cut]), limits=limits)


def _outcome(number: int, steps: Sequence[Step], bundle: Bundle) -> Outcome:
    """What a run came to. A pass that failed was rolled back and leaves its mark in the numbers."""
    summary = bundle.manifest.metrics["compression"]
    loss, latency = summary["change"]["value"], summary["latency"]
    worse = [item["worse"] or 0.0 for item in summary["agreement"]]  # what a runtime or a batch size takes from it
    speedup = float(np.exp(-np.mean(np.log([item["ratio"] for item in latency]))))
    extra = max([0.0, *worse])
    return Outcome(
        number,
        tuple(steps),
        math.inf if loss is None else float(loss) + extra,
        packed(bundle),
        speedup,
        float(latency[0]["after_ms"]),
        fits_memory=bool(summary.get("memory", {}).get("fits", True)),
        low=math.nan if loss is None else float(summary["change"]["low"]) + extra,
    )


def _study(job: Job, work: Path) -> optuna.Study:
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"search-{SPACE}-{job.key()[:32]}.log"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(path)))
    names = optuna.study.get_all_study_names(storage)
    done = len(optuna.load_study(study_name="auto", storage=storage).trials) if names else 0
    # the trials so far are part of the seed: a search that goes on must not draw the same recipes again
    sampler = optuna.samplers.NSGAIISampler(population_size=16, seed=job.seed + done)
    return optuna.create_study(
        study_name="auto", storage=storage, sampler=sampler, directions=["minimize"] * 3, load_if_exists=True
    )


def _space(study: optuna.Study, job: Job, trial_job: Job, progress: ShowProgress) -> Space:
    """What may be suggested, found out once for all the runs of a study."""
    kept = study.user_attrs.get("space")
    if kept is None:
        space = explored(job, tuple(sensitivities(trial_job, progress)))
        kept = {
            "ranked": [asdict(item) for item in space.ranked],
            "smooth": space.smooth,
            "groups": space.groups,
            "stack": space.stack,
        }
        study.set_user_attr("space", kept)
    ranked = tuple(Sensitivity(item["name"], item["change"], tuple(item["nodes"])) for item in kept["ranked"])
    return Space(job, ranked, kept["smooth"], tuple(kept["groups"]), tuple(kept["stack"]))


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _stale(study: optuna.Study) -> bool:
    complete = _complete(study)
    if len(complete) <= PATIENCE:
        return False
    newest = max(trial.number for trial in study.best_trials)
    return len([trial for trial in complete if trial.number > newest]) >= PATIENCE


def _outcomes(study: optuna.Study) -> tuple[Outcome, ...]:
    front = {trial.number for trial in study.best_trials}
    return tuple(
        Outcome(
            trial.number,
            tuple(Step(name, parameters, seed) for name, parameters, seed in trial.user_attrs["recipe"]),
            **{name: trial.user_attrs[name] for name in NUMBERS if name in trial.user_attrs},
            on_front=trial.number in front,
        )
        for trial in _complete(study)
    )


def _finish(
    job: Job,
    constraints: Constraints,
    outcomes: tuple[Outcome, ...],
    ranked: tuple[Sensitivity, ...],
    score: Score,
    work: Path,
    notify: Notify,
    progress: ShowProgress,
) -> Found:
    """Run the candidates in order of merit, at full length, and take the best that keeps to the targets on the test
    rows. One that lost a pass there is another recipe than was chosen: those after it have their turn while they
    promise more than is left of it."""
    tried: list[str] = []
    best: tuple[float, int, Bundle] | None = None
    lost = math.inf  # on held-out rows, by the mildest recipe that lost too much on the test rows
    for outcome in finalists(outcomes, constraints, score):
        if best is not None and score(outcome) <= best[0]:
            break
        if outcome.loss >= lost or len(tried) == FINALISTS:  # what lost more would do so as well
            continue
        recipe = tuple(lengthened(step) for step in outcome.recipe)
        notify(f"final run of recipe {outcome.number + 1}: {', '.join(step.name for step in recipe)}")
        final = replace(job, recipe=recipe, limits=replace(job.limits, max_loss=constraints.max_loss))
        bundle = run(final, work, notify=notify, progress=progress)
        result, records = _outcome(outcome.number, recipe, bundle), bundle.manifest.records
        kept = [bool(record["kept"]) for record in records]
        if result.fits(constraints) and any(kept) and (best is None or score(result) > best[0]):
            best = score(result), outcome.number, bundle
            if all(kept):
                break
        if result.loss > constraints.max_loss or any(_lost_too_much(record, constraints) for record in records):
            lost = min(lost, outcome.loss)
        tried.append(
            f"{result.loss:+.4f}, {result.bytes:,} bytes, {result.latency_ms:.3g} ms{' (estimate)' * job.estimated}"
            + ("" if result.fits_memory else f", which does not fit on {job.target.name if job.target else ''}")
        )
    if best is None:
        raise EdgekitError(
            f"no recipe keeps to max-loss {constraints.max_loss:g}, max-size {constraints.max_size or 'any'}, "
            f"max-latency {constraints.max_latency or 'any'} on the test rows; best: "
            f"{'; '.join(tried) or 'no trial came near'}. Allow more, or give it more --trials"
        )
    _, chosen, bundle = best
    facts = {
        "trials": [_plain(item) for item in outcomes],
        "sensitivity": [
            {"name": item.name, "change": item.change if math.isfinite(item.change) else None} for item in ranked
        ],
        "chosen": chosen,
        "targets": asdict(constraints),
    }
    manifest = replace(bundle.manifest, metrics={**bundle.manifest.metrics, "search": facts})
    return Found(replace(bundle, manifest=manifest), tuple(of_bundle(bundle)), outcomes, ranked)


def _lost_too_much(record: Mapping[str, Any], constraints: Constraints) -> bool:
    """Whether a pass was rolled back for what it costs in quality."""
    loss = record.get("loss", {}).get("value")
    return not record["kept"] and loss is not None and loss > constraints.max_loss


def _plain(outcome: Outcome) -> dict[str, Any]:
    """For the manifest: JSON has no infinity."""
    values = asdict(outcome)
    values["recipe"] = [{"name": step.name, **step.parameters} for step in outcome.recipe]
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
