"""`edgekit compress --auto`: find the recipe. Sensitivity of every weight first, then a multi-objective search
(NSGA-II, Deb et al. 2002) over passes and their parameters; every trial is a real run, guarded and measured.

Trials are judged on rows held out of the training part; the test rows see only the recipe that is chosen, so that the
choice does not flatter itself. The study is a journal on disk: a search that was killed goes on and loses at most the
trial it was in, and the states that trials share are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import quality
from edgekit.bundle import Bundle
from edgekit.compress import applied, candidate_of, lowered, run
from edgekit.data import Dataset, is_labelled
from edgekit.errors import EdgekitError, missing_extra
from edgekit.job import Job, Notify, ShowProgress
from edgekit.measure import outputs_of
from edgekit.recipe import Step, of_bundle
from edgekit.targets.decisions import allowed, rounded

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "optuna", "search", "--auto") from None

HELD_OUT = 0.25  # of the training rows, for trials
PROBE_BITS = 3  # coarse enough that a weight that matters shows
PATIENCE = 12  # trials without a new point on the Pareto front after which the search stops
SPACE = 2  # of recipes: a study goes on only in the space that it began in
NUMBERS = ("loss", "bytes", "speedup", "latency_ms", "fits_memory")  # of an outcome, kept in the study
SHORT, FULL = {"prune": 2, "codes": 1}, {"prune": 8, "codes": 2}  # epochs of recovery, in trials and at the end


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much worse the metric gets when this weight alone is put on a grid of PROBE_BITS bits. nodes: of the graph,
    those that multiply by it; passes on graphs know them, not the weight."""

    name: str
    change: float
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trial. speedup: geometric mean over the batch sizes, against the original in the same run; loss: change of
    the metric on held-out rows."""

    number: int
    recipe: tuple[Step, ...]
    loss: float
    bytes: int
    speedup: float
    latency_ms: float
    on_front: bool = False
    fits_memory: bool = True  # of the target

    def fits(self, limits: Targets) -> bool:
        return (
            self.loss <= limits.max_loss
            and (limits.max_size is None or self.bytes <= limits.max_size)
            and (limits.max_latency is None or self.latency_ms <= limits.max_latency)
            and self.fits_memory
        )


@dataclass(frozen=True, slots=True)
class Targets:
    """What the result must keep to. max_size: packed bytes; max_latency: CPU milliseconds of a call at the first batch
    size; on a target that is not here, estimated ones."""

    max_loss: float
    max_size: int | None = None
    max_latency: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search: the compressed bundle, its recipe, and what was tried on the way."""

    bundle: Bundle
    recipe: tuple[Step, ...]
    outcomes: tuple[Outcome, ...]
    sensitivity: tuple[Sensitivity, ...]


def search(
    job: Job,
    targets: Targets,
    work: Path,
    *,
    trials: int = 40,
    notify: Notify = lambda message: None,
    progress: ShowProgress = lambda what, done, total: None,
) -> Found:
    """Search, then run the best recipe within the targets on the job's own data. Where that one fails on the test rows,
    the next best has its turn; where none is left, an error says how far they were."""
    trial_job = held_out(job)
    ranked, smooth = sensitivities(trial_job, progress), smoothable(job)
    study = _study(job, work)
    for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(stale.number, state=TrialState.FAIL)  # of a search that was killed
    done = len(_complete(study))
    if not study.get_trials(deepcopy=False):
        for start in starts(job):
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
        steps = suggest(trial, job, ranked, SHORT, smooth=smooth)
        trial.set_user_attr("recipe", [[step.name, dict(step.parameters), step.seed] for step in steps])
        outcome = _outcome(trial.number, steps, run(replace(trial_job, recipe=steps), work, progress=progress))
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
    return _finish(job, targets, outcomes, tuple(ranked), work, notify, progress)


def held_out(job: Job) -> Job:
    """The job on the training rows alone, a quarter of them held out."""
    rows = np.random.default_rng(job.seed).permutation(len(job.train))
    cut = max(1, round(HELD_OUT * len(rows)))
    if len(rows) < 2:
        raise EdgekitError(f"--auto needs training rows to hold out; the data has {len(rows)}")
    limits = replace(job.limits, max_loss=math.inf, max_slowdown=math.inf, min_gain=-math.inf)  # judged as a whole
    return replace(job, train=job.train.take(rows[cut:]), test=job.train.take(rows[:cut]), limits=limits)


def sensitivities(job: Job, progress: ShowProgress) -> list[Sensitivity]:
    """Every weight that can be quantised, most sensitive first."""
    metric = quality.metric(job.metric)
    candidate = candidate_of(job.source)
    rows = _some(job.test)
    small = replace(job, test=rows)
    original = outputs_of(small, job.source, candidate)
    expected = rows.labels if metric.labelled else original
    before = metric.value(original, expected)
    probes, nodes = _probes(job.source, candidate), _nodes(job, candidate)
    found = []
    for number, (name, step) in enumerate(probes):
        progress("sensitivity", number, len(probes))
        bundle = applied(small, step)
        after = metric.value(outputs_of(small, bundle, candidate_of(bundle)), expected)
        change = after - before if math.isfinite(after) else math.inf
        found.append(Sensitivity(name, change, (name,) if job.source.is_graph else nodes.get(name, ())))
    progress("sensitivity", len(probes), len(probes))
    return sorted(found, key=lambda item: -item.change)


def suggest(
    trial: optuna.trial.BaseTrial, job: Job, ranked: Sequence[Sensitivity], epochs: Mapping[str, int], *,
    smooth: bool = False,
) -> tuple[Step, ...]:  # fmt: skip
    """A recipe from the space of those that make sense: fewer units, then codes for the weights or a form of the graph.
    Nothing is suggested for the most sensitive weights if they are exempt. smooth: whether `smooth_quant` has anything
    to balance."""
    steps: list[Step] = []
    names = [item.name for item in ranked]
    count = trial.suggest_int("exempt", 0, min(4, max(0, len(names) - 1)))
    exempt, nodes = names[:count], [node for item in ranked[:count] for node in item.nodes]
    source = job.source
    if not source.is_graph:
        removed = trial.suggest_categorical("removed", [0.0, 0.25, 0.375, 0.5, 0.625])
        pruned = _pruned(job, float(removed), epochs)
        steps += [pruned] if pruned else []
    form = trial.suggest_categorical("form", forms(job))
    if form in ("cluster", "quantise"):
        bits = trial.suggest_int(f"{form} bits", 3, 8)
        coded = [name for name in names if name not in exempt]
        if coded:
            steps.append(Step(form, {"bits": bits, "epochs": epochs["codes"], "include": coded}))
        if exempt and bits < 8:
            steps.append(Step("quantise", {"bits": 8, "epochs": 0, "include": exempt}))
    elif form in ("dynamic_int8", "static_int8"):
        if smooth and trial.suggest_categorical("smoothed", [False, True]):
            steps.append(Step("smooth_quant", {}))
        steps.append(Step(form, {"exclude": nodes} if nodes else {}))
    elif form == "low_rank":
        steps.append(Step(form, {"energy": trial.suggest_categorical("energy", [0.9, 0.95, 0.99])}))
        if "dynamic_int8" in forms(job) and trial.suggest_categorical("low_rank int8", [False, True]):
            steps.append(Step("dynamic_int8", {}))
    elif form == "weight_only":
        widths = [bits for bits in (8, 4) if allowed(job.target, Step(form, {"bits": bits}))]
        steps.append(Step(form, {"bits": trial.suggest_categorical("weight_only bits", widths)}))
    elif form == "half":
        steps.append(_half(job))
    return tuple(steps)


def forms(job: Job) -> list[str]:
    """What may become of the weights, or of the graph: for a target, what it allows."""
    if job.source.is_graph:
        found = ["float32", "dynamic_int8", "static_int8", "weight_only", "half", "low_rank"]
    else:
        on_graphs = (
            ["dynamic_int8", "half", "low_rank"] if job.runtime == "onnxruntime" else []
        )  # others run networks only
        if on_graphs and job.target is not None and job.target.plan.int8 != "none":
            on_graphs.append("static_int8")
        found = ["float32", "cluster", "quantise", *on_graphs]
    steps = {"half": [_half(job)], "weight_only": [Step("weight_only", {"bits": bits}) for bits in (8, 4)]}
    plain = ("float32", "cluster", "quantise")
    return [
        form
        for form in found
        if form in plain or any(allowed(job.target, step) for step in steps.get(form, [Step(form, {})]))
    ]


def _half(job: Job) -> Step:
    """Weights alone, which a CPU folds; or arithmetic too, on devices that are made for it."""
    target = job.target
    arithmetic = target is not None and target.kind != "cpu" and "float16" in target.plan.order
    return Step("half", {} if arithmetic else {"storage": True})


def starts(job: Job) -> list[dict[str, Any]]:
    """What an expert would try first, so that a short search is no worse than that."""
    if job.target is not None:
        found = [form for form in ("half", "static_int8", "dynamic_int8") if form in forms(job)]
        small = [] if job.source.is_graph else [{"exempt": 0, "form": "cluster", "cluster bits": 5, "removed": 0.375}]
        removed = {} if job.source.is_graph else {"removed": 0.0}
        return [{"exempt": 0, "form": form, "smoothed": False, **removed} for form in found] + small
    coded = [{"exempt": 0, "form": "cluster", "cluster bits": 5}]
    if job.source.is_graph:
        codes = {"exempt": 0, "form": "weight_only", "weight_only bits": 8}
        return [{"exempt": 0, "form": "dynamic_int8", "smoothed": False}, codes]
    if job.runtime != "onnxruntime":
        return [{**start, "removed": removed} for removed in (0.375, 0.5) for start in coded]
    int8 = {"exempt": 0, "form": "dynamic_int8", "smoothed": False}
    return [{**int8, "removed": removed} for removed in (0.0, 0.5, 0.625)] + [{**coded[0], "removed": 0.375}]


def _pruned(job: Job, removed: float, epochs: Mapping[str, int]) -> Step | None:
    """Structured pruning of that share, in the words of the family."""
    from edgekit.families import countable_units

    source, labelled = job.source, is_labelled(job.train)

    if removed == 0:
        return None
    rate = {"epochs": epochs["prune"]}
    units = countable_units(source.manifest.family, source.model())
    if units:
        keep = {name: rounded(job.target, max(1, round(size * (1 - removed))), size) for name, size in units.items()}
        return Step("structured_prune", {"keep": keep, **rate})
    importance = "taylor" if labelled else "magnitude"  # without labels there is no loss to be expanded
    return Step("dependency_prune", {"sparsity": removed, "importance": importance, **rate})


def _probes(source: Bundle, candidate: Any) -> list[tuple[str, Step]]:
    if source.is_graph:
        from edgekit.graph import weights

        uses = [use for weight in weights(candidate.model) for use in weight.uses]
        nodes = [use.node.name for use in uses if use.node.op_type in ("MatMul", "Gemm")]
        return [
            (name, Step("dynamic_int8", {"exclude": [other for other in nodes if other != name]})) for name in nodes
        ]
    from edgekit.passes.base import matrices

    return [
        (name, Step("quantise", {"bits": PROBE_BITS, "epochs": 0, "include": [name]}))
        for name in matrices(candidate.model, ("*",))
    ]


def smoothable(job: Job) -> bool:
    """Whether `smooth_quant` finds a product right after a normalisation: not in networks that add before they do."""
    if not job.source.is_graph and job.runtime != "onnxruntime":
        return False
    try:
        Step("smooth_quant", {}).build().plan(lowered(candidate_of(job.source), job))
    except EdgekitError:
        return False
    return True


def _nodes(job: Job, candidate: Any) -> dict[str, tuple[str, ...]]:
    """Nodes by the weight they multiply by, in the graph that a network becomes; none where no pass on graphs runs."""
    if job.source.is_graph or job.runtime != "onnxruntime":
        return {}
    from edgekit.graph import name_nodes, weights

    model = lowered(candidate, job).copy_model()
    name_nodes(model)
    return {weight.name: tuple(use.node.name for use in weight.uses) for weight in weights(model)}


def _some(data: Dataset, most: int = 1024) -> Dataset:
    return data.take(np.arange(min(len(data), most)))


def _outcome(number: int, steps: Sequence[Step], bundle: Bundle) -> Outcome:
    """What a run came to. A pass that failed was rolled back and leaves its mark in the numbers."""
    summary = bundle.manifest.metrics["compression"]
    loss, latency = summary["change"]["value"], summary["latency"]
    worse = [item["worse"] or 0.0 for item in summary["agreement"]]  # what a runtime or a batch size takes from it
    speedup = float(np.exp(-np.mean(np.log([item["ratio"] for item in latency]))))
    return Outcome(
        number, tuple(steps), math.inf if loss is None else float(loss) + max([0.0, *worse]), _packed(bundle), speedup,
        float(latency[0]["after_ms"]), fits_memory=bool(summary.get("memory", {}).get("fits", True)),
    )  # fmt: skip


def _packed(bundle: Bundle) -> int:
    from edgekit.pack import pack

    return len(pack(bundle))


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
    job: Job, targets: Targets, outcomes: tuple[Outcome, ...], ranked: tuple[Sensitivity, ...], work: Path,
    notify: Notify, progress: ShowProgress,
) -> Found:  # fmt: skip
    """Run the candidates in order of merit, at full length, until one keeps to the targets on the test rows."""
    original = _packed(job.source)

    def merit(outcome: Outcome) -> float:
        size, speed = math.log(original / outcome.bytes), math.log(outcome.speedup)
        return {"size": size, "latency": speed, "any": size + speed}[job.limits.objective]

    # held-out loss after a short recovery is pessimistic and noisy: half as much again may pass to the last round
    hopeful = [
        item for item in outcomes if item.recipe and item.fits(replace(targets, max_loss=1.5 * targets.max_loss))
    ]
    tried: list[str] = []
    for outcome in sorted(hopeful, key=merit, reverse=True)[:5]:
        recipe = tuple(_lengthened(step) for step in outcome.recipe)
        notify(f"final run of recipe {outcome.number + 1}: {', '.join(step.name for step in recipe)}")
        final = replace(job, recipe=recipe, limits=replace(job.limits, max_loss=targets.max_loss))
        bundle = run(final, work, notify=notify, progress=progress)
        result = _outcome(outcome.number, recipe, bundle)
        if result.fits(targets) and any(record["kept"] for record in bundle.manifest.records):
            facts = {
                "trials": [_plain(item) for item in outcomes],
                "sensitivity": [
                    {"name": item.name, "change": item.change if math.isfinite(item.change) else None}
                    for item in ranked
                ],
                "chosen": outcome.number,
                "targets": asdict(targets),
            }
            manifest = replace(bundle.manifest, metrics={**bundle.manifest.metrics, "search": facts})
            return Found(replace(bundle, manifest=manifest), tuple(of_bundle(bundle)), outcomes, ranked)
        tried.append(
            f"{result.loss:+.4f}, {result.bytes:,} bytes, {result.latency_ms:.3g} ms{' (estimate)' * job.estimated}"
            + ("" if result.fits_memory else f", which does not fit on {job.target.name if job.target else ''}")
        )
    best = "; ".join(tried) or "no trial came near"
    raise EdgekitError(
        f"no recipe keeps to max-loss {targets.max_loss:g}, max-size {targets.max_size or 'any'}, max-latency "
        f"{targets.max_latency or 'any'} on the test rows; best: {best}. Allow more, or give it more --trials"
    )


def _lengthened(step: Step) -> Step:
    """The step with the recovery that the result deserves, where trials had a short one."""
    if "epochs" not in step.parameters or not step.parameters["epochs"]:
        return step
    return replace(step, parameters={**step.parameters, "epochs": FULL["prune" if "prune" in step.name else "codes"]})


def _plain(outcome: Outcome) -> dict[str, Any]:
    """For the manifest: JSON has no infinity."""
    values = asdict(outcome)
    values["recipe"] = [{"name": step.name, **step.parameters} for step in outcome.recipe]
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
