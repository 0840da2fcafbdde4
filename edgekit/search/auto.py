"""Find a recipe (`edgekit compress --auto`). The search measures the sensitivity of every weight, then runs a
multi-objective search (NSGA-II, Deb et al. 2002) over passes and their parameters. Every trial is a real, measured run.

The search judges trials on rows held out of the training part. It runs only the finalists on the test rows, so that the
test rows do not bias the choice. A trial recovers for a few epochs. If only its loss keeps it from being the best, it
recovers longer before it is judged. The study is a journal on disk: a search that was killed continues and loses at
most the trial that was running, and the states that trials share are computed once.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from edgekit import cache
from edgekit.compression.job import Job, Notify, ShowProgress
from edgekit.compression.recipe import Step
from edgekit.compression.record import PassRecord
from edgekit.compression.result import Result, with_search
from edgekit.compression.run import run
from edgekit.compression.trials import Constraints, Outcome, SearchRecord, Sensitivity
from edgekit.errors import EdgekitError, missing_extra
from edgekit.search.outcomes import Score, finalists, promising, score_of
from edgekit.search.sensitivity import sensitivities
from edgekit.search.space import SPACE, Space, explored, lengthened, starts, suggest

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "optuna", "search", "--auto") from None

HELD_OUT = 0.25  # share of the training rows on which trials are judged
PATIENCE = 12  # trials without a new point on the Pareto front after which the search stops
LONGER = (4, 12)  # factors of the short recovery, for a recipe that only its loss keeps from being the best
FINALISTS = 5  # recipes that are run on the test rows


def search(
    job: Job,
    constraints: Constraints,
    work: Path,
    *,
    trials: int = 40,
    notify: Notify = lambda message: None,
    progress: ShowProgress = lambda what, done, total: None,
) -> Result:
    """Search, then run the best recipe within the constraints on the job's own data. If that recipe fails on the test
    rows, run the next best. The result holds the search. Raises EdgekitError if no recipe keeps to the constraints."""
    work.mkdir(parents=True, exist_ok=True)
    journal = work / f"search-{SPACE}-{job.key()[:32]}.log"
    with _alone(journal):
        return _searched(job, constraints, work, journal, trials, notify, progress)


@contextmanager
def _alone(journal: Path) -> Iterator[None]:
    """Hold the journal for this process, and create it for this user alone. Raises if another process holds it: two
    searches with one journal would give up each other's running trials. The system releases the lock of a process that
    was killed."""
    handle = os.open(journal, os.O_RDWR | os.O_CREAT, cache.FILE_MODE)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise EdgekitError(
            f"{journal}: another process runs this search, with the same model, data and settings; wait until it ends, "
            "then this command reuses its trials, or set $EDGEKIT_CACHE to another folder to search at the same time"
        ) from None
    finally:
        os.close(handle)


def _searched(
    job: Job,
    constraints: Constraints,
    work: Path,
    journal: Path,
    trials: int,
    notify: Notify,
    progress: ShowProgress,
) -> Result:
    trial_job = held_out(job)
    study, score = _study(job, journal), score_of(job)
    space = _space(study, job, trial_job, progress)
    _resume(study, space, notify)
    while (done := len(_complete(study))) < trials:
        progress("search", done, trials)
        if _stale(study):
            notify(f"search stopped: no better recipe in the last {PATIENCE} trials")
            break
        trial = study.ask()
        steps = suggest(trial, space)
        outcome = _tried(trial.number, steps, trial_job, constraints, study, score, work, notify, progress)
        trial.set_user_attr("outcome", outcome.to_json())
        study.tell(trial, [outcome.loss, math.log(outcome.bytes), -math.log(outcome.speedup)])
        notify(
            f"recipe {trial.number + 1}, trial {done + 1} of {trials}: {outcome.loss:+.4f}, {outcome.bytes:,} bytes, "
            f"{outcome.speedup:.2f} times as fast: {outcome.passes}"
        )
    progress("search", trials, trials)
    outcomes = _outcomes(study)
    number, result = _best_final(job, constraints, outcomes, score, work, notify, progress)
    return with_search(result, SearchRecord(outcomes, space.ranked, number, constraints))


def _resume(study: optuna.Study, space: Space, notify: Notify) -> None:
    """Give up the trials that were running when an earlier search was killed; give a new study its first recipes."""
    for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(stale.number, state=TrialState.FAIL)
    if not study.get_trials(deepcopy=False):
        for start in starts(space):
            study.enqueue_trial(start)
    if done := len(_complete(study)):
        notify(f"resuming the search after {done} trials")


def _tried(
    number: int,
    steps: tuple[Step, ...],
    job: Job,
    constraints: Constraints,
    study: optuna.Study,
    score: Score,
    work: Path,
    notify: Notify,
    progress: ShowProgress,
) -> Outcome:
    """Run a recipe with its short recovery. Run it again with longer ones while only its loss keeps it from being the
    best."""
    outcome = _outcome(number, steps, run(replace(job, recipe=steps), work, progress=progress))
    for factor in LONGER:
        if not promising(outcome, constraints, _outcomes(study), score):
            break
        notify(
            f"  only its loss of {outcome.loss:+.4f} keeps it from being the best: it recovers {factor} times as long"
        )
        short, steps = outcome, tuple(lengthened(step, factor) for step in steps)
        outcome = _outcome(number, steps, run(replace(job, recipe=steps), work, progress=progress))
        if outcome.loss > short.loss / 2:  # an even longer recovery would not be enough
            break
    return outcome


def held_out(job: Job) -> Job:
    """Return the job on the training rows alone, with a quarter of them held out for the judgement."""
    rows = np.random.default_rng(job.seed).permutation(len(job.train))
    cut = max(1, round(HELD_OUT * len(rows)))
    if len(rows) < 2:
        raise EdgekitError(f"--auto needs training rows to hold out; the data has {len(rows)}")
    # a trial is judged as a whole
    limits = replace(job.limits, max_loss=math.inf, max_slowdown=math.inf, min_gain=-math.inf)
    return replace(job, train=job.train.take(rows[cut:]), test=job.train.take(rows[:cut]), limits=limits)


def _outcome(number: int, steps: Sequence[Step], result: Result) -> Outcome:
    """Return the numbers of a run. If a pass failed and was rolled back, they are those of the model without it."""
    change, latency = result.summary.change, result.latency
    extra = max([0.0, *(item.worse or 0.0 for item in result.agreement)])  # the loss on other runtimes and batch sizes
    return Outcome(
        number,
        tuple(steps),
        math.inf if math.isnan(change.value) else change.value + extra,
        result.packed_bytes,
        float(np.exp(-np.mean(np.log([item.ratio for item in latency])))),
        latency[0].after_ms,
        fits_memory=result.summary.fits,
        low=change.low + extra,
    )


def _study(job: Job, journal: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    names = optuna.study.get_all_study_names(storage)
    done = len(optuna.load_study(study_name="auto", storage=storage).trials) if names else 0
    # The number of trials so far is part of the seed: a resumed search must not draw the same recipes again.
    sampler = optuna.samplers.NSGAIISampler(population_size=16, seed=job.seed + done)
    return optuna.create_study(
        study_name="auto", storage=storage, sampler=sampler, directions=["minimize"] * 3, load_if_exists=True
    )


def _space(study: optuna.Study, job: Job, trial_job: Job, progress: ShowProgress) -> Space:
    """Return the space of recipes, which is explored once for all runs of a study."""
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
        replace(Outcome.from_json(trial.user_attrs["outcome"]), on_front=trial.number in front)
        for trial in _complete(study)
    )


def _best_final(
    job: Job,
    constraints: Constraints,
    outcomes: tuple[Outcome, ...],
    score: Score,
    work: Path,
    notify: Notify,
    progress: ShowProgress,
) -> tuple[int, Result]:
    """Run the finalists in the order of their scores, at full length. Return the best that keeps to the constraints on
    the test rows, and its number. If the guard rolls back a pass in the final run, the result is a different recipe, so
    the next finalists are also run while their scores are higher than that result's."""
    tried: list[str] = []
    best: tuple[float, int, Result] | None = None
    lost = math.inf  # the smallest loss on held-out rows of a recipe that lost too much on the test rows
    for outcome in finalists(outcomes, constraints, score):
        if best is not None and score(outcome) <= best[0]:
            break
        if outcome.loss >= lost or len(tried) == FINALISTS:  # a recipe that loses more would fail too
            continue
        found, result = _final(outcome, job, constraints, work, notify, progress)
        kept = [record.kept for record in result.records]
        if found.fits(constraints) and any(kept) and (best is None or score(found) > best[0]):
            best = score(found), outcome.number, result
            if all(kept):
                break
        if found.loss > constraints.max_loss or any(_lost_too_much(item, constraints) for item in result.records):
            lost = min(lost, outcome.loss)
        tried.append(_described(found, job))
    if best is None:
        raise _none_fits(constraints, tried)
    return best[1], best[2]


def _final(
    outcome: Outcome, job: Job, constraints: Constraints, work: Path, notify: Notify, progress: ShowProgress
) -> tuple[Outcome, Result]:
    """Run a trial's recipe with its full recovery on the job's own data."""
    recipe = tuple(lengthened(step) for step in outcome.recipe)
    notify(f"final run of recipe {outcome.number + 1}: {', '.join(step.name for step in recipe)}")
    final = replace(job, recipe=recipe, limits=replace(job.limits, max_loss=constraints.max_loss))
    result = run(final, work, notify=notify, progress=progress)
    return _outcome(outcome.number, recipe, result), result


def _none_fits(constraints: Constraints, tried: list[str]) -> EdgekitError:
    return EdgekitError(
        f"no recipe keeps to max-loss {constraints.max_loss:g}, max-size {constraints.max_size or 'any'}, "
        f"max-latency {constraints.max_latency or 'any'} on the test rows; best: "
        f"{'; '.join(tried) or 'none, because no trial came near'}. Allow more, or give it more --trials"
    )


def _described(found: Outcome, job: Job) -> str:
    """Describe a final run for an error message."""
    text = f"{found.loss:+.4f}, {found.bytes:,} bytes, {found.latency_ms:.3g} ms{' (estimate)' * job.estimated}"
    return text if found.fits_memory else f"{text}, which does not fit on {job.target.name if job.target else ''}"


def _lost_too_much(record: PassRecord, constraints: Constraints) -> bool:
    """Return whether a pass was rolled back because it lost too much quality."""
    return not record.kept and record.loss is not None and record.loss.value > constraints.max_loss
