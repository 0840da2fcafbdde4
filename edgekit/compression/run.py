"""Run a recipe: apply each pass, measure its result, judge it, and record it.

The state after each pass is kept under the hash of everything on which it depends. A run that was stopped at any moment
therefore continues after its last finished pass, and another recipe with the same beginning starts from there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from edgekit import cache, machine, plugins
from edgekit.bundle.format import Bundle
from edgekit.bundle.pack import pack
from edgekit.bundle.store import open_bundle
from edgekit.bundle.tensors import Arrays
from edgekit.compression import measure, metrics, states
from edgekit.compression.guard import Agreement, Latency, State, Verdict, judge
from edgekit.compression.job import Job, Notify, ShowProgress
from edgekit.compression.measure import AGREEMENT_ROWS, outputs_of
from edgekit.compression.recipe import Step, to_table, to_tables
from edgekit.compression.record import COMPRESSION, PassRecord, Summary, finite, records_of
from edgekit.compression.result import Result
from edgekit.compression.subject import bundle_of, candidate_of, context_of, for_pass
from edgekit.errors import EdgekitError
from edgekit.passes.base import AnyCandidate, Candidate, Context, GraphCandidate, Level, Pass, load_pass
from edgekit.passes.change import Change
from edgekit.session import Session

if TYPE_CHECKING:
    from torch import nn

    from edgekit.targets.profile import Target


def check_order(source: Bundle, recipe: Sequence[Step]) -> None:
    """Raise if a pass that trains the network comes where there is only a graph."""
    lowered = "the model came as a graph" if source.is_graph else ""
    for number, step in enumerate(recipe, start=1):
        built = step.build()
        graph = built.level == Level.GRAPH
        if not graph and lowered:
            allowed = ", ".join(
                name for name in plugins.names("edgekit.passes") if load_pass(name).level == Level.GRAPH
            )
            raise EdgekitError(
                f"pass {number} ({step.name!r}) works on a network, and {lowered}; passes on graphs: {allowed}"
                + ("" if source.is_graph else "; put it before them")
            )
        if (graph or built.lowers) and not lowered:
            lowered = f"pass {number} ({step.name!r}) has turned it into a graph"


def plan(job: Job) -> list[tuple[Step, list[Change]]]:
    """Return what each pass would change in the model, and change nothing. A later pass is planned on the result of the
    earlier ones, which are applied without recovery training."""
    job = job.on_target()
    check_order(job.source, job.recipe)
    candidate = candidate_of(job.source)
    teacher = candidate.model if isinstance(candidate, Candidate) else None
    context = context_of(job, teacher, job.seed)
    result = []
    for step in job.recipe:
        built = step.build()
        candidate = for_pass(built, candidate, job)
        result.append((step, built.plan(candidate)))
        if built.epochs_parameter:
            built = built.without_training()
        elif not isinstance(candidate, GraphCandidate):
            continue
        candidate = built.apply(candidate, context)
    return result


@dataclass(frozen=True, slots=True)
class Reference:
    """The original model, with which the guard compares the result of every pass.

    original: its first output for each test row; expected: the values with which the metric compares outputs; others:
    its outputs that the metric does not cover; forms: session options of its fastest float32 form; best: a session of
    that form; inputs: the rows on which latency is measured.
    """

    metric: metrics.Metric
    original: npt.NDArray[Any]
    expected: npt.NDArray[Any]
    others: Arrays
    forms: Mapping[str, str]
    best: Session
    inputs: Arrays
    teacher: nn.Module | None


@dataclass(frozen=True, slots=True)
class Standing:
    """The model between two passes."""

    bundle: Bundle
    candidate: AnyCandidate
    state: State


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of a pass's result, in one run with the model before the pass."""

    after: Standing
    loss: metrics.Measurement
    latency: list[Latency]
    agreement: list[Agreement]
    drift: Mapping[str, float]


def run(
    job: Job,
    work: Path,
    *,
    notify: Notify = lambda message: None,
    progress: ShowProgress = lambda what, done, total: None,
) -> Result:
    """Apply each pass of the job's recipe, measure it, judge it, and record it. `work`: a folder that keeps the state
    after each pass. Raises EdgekitError for a mistake in the job; a pass that fails is rolled back instead."""
    job = job.on_target()
    check_order(job.source, job.recipe)  # a mistake in the recipe is an error now and not a pass that is rolled back
    reference = _reference(job, notify)
    paths = _state_paths(job, work)
    done, bundle = _resume(job, paths)
    if done:
        notify(f"resuming after pass {done} of {len(job.recipe)}")
    records = list(records_of(bundle))[len(job.source.manifest.records) :]
    standing = _standing(job, reference, bundle, candidate_of(bundle))
    for number, step in enumerate(job.recipe[done:], start=done + 1):
        notify(f"pass {number} of {len(job.recipe)}: {step.name}")
        seed = job.seed + number if step.seed is None else step.seed
        after, record = _attempt(job, reference, standing, replace(step, seed=seed), records, progress)
        records.append(record)
        notify(f"  {'kept' if record.kept else 'rolled back'}: {record.reason}")
        standing = replace(after or standing, bundle=bundle_of(job, (after or standing).candidate, records))
        states.keep(paths[number - 1], standing.bundle)
    return _result(job, standing.bundle, reference)


def _reference(job: Job, notify: Notify) -> Reference:
    """Measure the original before any pass. Raises if the metric or the runtimes do not suit the original."""
    metric = metrics.metric(job.metric)
    source = candidate_of(job.source)
    forms = measure.best_float_form(job, notify)
    original = outputs_of(job, job.source, source)
    expected = job.test.labels if metric.labelled else original
    metrics.check_direction(metric, original, expected)
    others = measure.other_outputs(job, job.source, source)
    best = measure.session(job, job.source, forms)
    if job.agree:
        measure.check_source(job, measure.agreement(job, job.source, forms, metric, expected))
    inputs = {name: array[:AGREEMENT_ROWS] for name, array in job.test.inputs.items()}
    teacher = source.model if isinstance(source, Candidate) else None
    return Reference(metric, original, expected, others, forms, best, inputs, teacher)


def _standing(job: Job, reference: Reference, bundle: Bundle, candidate: AnyCandidate) -> Standing:
    outputs = outputs_of(job, bundle, candidate)
    quality = metrics.measure(reference.metric, outputs, reference.expected)
    return Standing(bundle, candidate, State(quality, len(pack(bundle)), bundle.parameters))


def _attempt(
    job: Job,
    reference: Reference,
    before: Standing,
    step: Step,
    records: Sequence[PassRecord],
    progress: ShowProgress,
) -> tuple[Standing | None, PassRecord]:
    """Apply one pass, measure its result, judge it and record it. The result is None if the pass is rolled back."""
    started = time.perf_counter()
    # opened before the pass runs, so that a missing runtime is an error and not a pass that is rolled back
    session = measure.session(job, before.bundle, reference.forms)
    built = step.build()
    context = context_of(job, reference.teacher, step.seed or 0, progress)
    changes: tuple[Change, ...] = ()
    measured: Measured | None = None
    try:
        changes, candidate = _tried(built, for_pass(built, before.candidate, job), context)
        measured = _measure(job, reference, before, session, candidate, records)
        verdict = _judge(job, before, measured, built)
    except EdgekitError as error:
        verdict = Verdict(False, str(error))
    seconds = round(time.perf_counter() - started, 1)
    record = _record(job, step, before, changes, measured, verdict, seconds)
    return (measured.after if verdict.kept and measured else None), record


def _measure(
    job: Job,
    reference: Reference,
    before: Standing,
    session: Session,
    candidate: AnyCandidate,
    records: Sequence[PassRecord],
) -> Measured:
    """Measure quality, size, latency and agreement of a pass's result."""
    bundle = bundle_of(job, candidate, records)
    outputs = outputs_of(job, bundle, candidate)
    quality = metrics.measure(reference.metric, outputs, reference.expected)
    after = Standing(bundle, candidate, State(quality, len(pack(bundle)), bundle.parameters))
    loss = metrics.measure_change(reference.metric, reference.original, outputs, reference.expected)
    sessions = session, measure.session(job, bundle, reference.forms)
    latency = measure.latency(job, before.bundle, bundle, sessions, reference.inputs, reference.best)
    agreement = measure.agreement(job, bundle, reference.forms, reference.metric, reference.expected)
    drift = measure.drifted(reference.others, measure.other_outputs(job, bundle, candidate))
    return Measured(after, loss, latency, agreement, drift)


def _judge(job: Job, before: Standing, measured: Measured, built: Pass[Any]) -> Verdict:
    """Return the guard's verdict, or a verdict for a reason that overrules it."""
    verdict = judge(before.state, measured.after.state, measured.loss, measured.latency, job.limits)
    if verdict.useless and built.prepares:
        verdict = Verdict(True, "loses nothing; it prepares the passes after it")
    if verdict.kept and (problem := _problem(measured)):
        verdict = Verdict(False, problem)
    if job.replay:
        verdict = Verdict(True, f"replayed; measured here: {verdict.reason}")
    if job.target is not None and job.estimated:
        verdict = replace(verdict, reason=f"{verdict.reason} (latency: an estimate for {job.target.name})")
    return verdict


def _problem(measured: Measured) -> str | None:
    """Return why a model must not ship although it is good enough by its metric; None if it may ship."""
    for item in measured.agreement:
        if item.problem:
            return item.problem
    for name, far in measured.drift.items():
        if far >= measure.DRIFT_LIMIT:
            return (
                f"output {name!r}, which the metric does not see, differs from the original: relative error {far:.2g}"
            )
    return None


def _record(
    job: Job,
    step: Step,
    before: Standing,
    changes: tuple[Change, ...],
    measured: Measured | None,
    verdict: Verdict,
    seconds: float,
) -> PassRecord:
    record = PassRecord(
        name=step.name,
        parameters=dict(step.parameters),
        seed=step.seed,
        parent=job.source.digest,
        before=before.state,
        plan=changes,
        kept=verdict.kept,
        reason=verdict.reason,
        seconds=seconds,
    )
    if measured is None:
        return record
    return replace(
        record,
        after=measured.after.state,
        loss=measured.loss,
        latency=tuple(measured.latency),
        agreement=tuple(measured.agreement),
        other_outputs=measured.drift,
        estimated_on=job.target.name if job.target is not None and job.estimated else None,
    )


def _tried(built: Pass[Any], subject: AnyCandidate, context: Context) -> tuple[tuple[Change, ...], AnyCandidate]:
    """Return the plan and the result of a pass. Any exception of a third party's pass, or of a library that it calls,
    counts as a failure of that pass: it is rolled back with the reason, and the passes after it still run."""
    try:
        changes, result = tuple(built.plan(subject)), built.apply(subject, context)
        if not isinstance(result, (Candidate, GraphCandidate)):
            raise EdgekitError(f"gave a {type(result).__name__}; a pass gives a Candidate or a GraphCandidate")
        return changes, result
    except EdgekitError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise EdgekitError(f"failed: {type(error).__name__}{first and ': '}{first[:300]}") from error


def _result(job: Job, bundle: Bundle, reference: Reference) -> Result:
    """Return the finished bundle. The source and the result are measured in turns in one run."""
    outputs = outputs_of(job, bundle, candidate_of(bundle))
    quality = metrics.measure(reference.metric, outputs, reference.expected)
    sessions = (
        measure.session(job, job.source, reference.forms),
        measure.session(job, bundle, reference.forms),
    )
    agreement = measure.agreement(job, bundle, reference.forms, reference.metric, reference.expected)
    summary = Summary(
        metric=reference.metric.name,
        original=metrics.measure(reference.metric, reference.original, reference.expected),
        change=metrics.measure_change(reference.metric, reference.original, outputs, reference.expected),
        latency=tuple(measure.latency(job, job.source, bundle, sessions, reference.inputs)),
        baseline=dict(reference.forms),
        limits=job.limits,
        runtime=job.runtime,
        agreement=tuple(agreement),
        machine=machine.describe(),
    )
    if job.target is not None:
        summary = _on_target(job, job.target, bundle, summary, reference.inputs)
    found = {job.metric.replace("-", "_"): finite(asdict(quality)), COMPRESSION: summary.to_json()}
    bundle = replace(bundle, manifest=replace(bundle.manifest, metrics=found))
    return Result(bundle, job.source, records_of(bundle), summary, quality)


def _on_target(job: Job, target: Target, bundle: Bundle, summary: Summary, inputs: Arrays) -> Summary:
    """Return the summary with the memory that the result needs on its target, and the information whether latency is an
    estimate."""
    from edgekit.compression.bench import float_graph
    from edgekit.compression.decisions import needed

    batch, memory = needed(target, float_graph(bundle), inputs, job.limits.batches)
    estimated = target.name if job.estimated else None
    return replace(summary, memory=memory, memory_batch=batch, estimated_on=estimated)


def _state_paths(job: Job, work: Path) -> list[Path]:
    """Return the path of the state after each pass: the hash of the job and of the passes up to it, with their code."""
    key = hashlib.sha256(job.key().encode())
    paths = []
    for step in job.recipe:
        key.update(json.dumps([to_table(step), states.pass_identity(step.name)], sort_keys=True).encode())
        paths.append(work / f"{key.hexdigest()[:32]}.edge")
    return paths


def _resume(job: Job, paths: Sequence[Path]) -> tuple[int, Bundle]:
    """Return the number of finished passes and the state after them, for the longest beginning of this recipe that an
    earlier run of the job left."""
    for done in range(len(paths), 0, -1):
        try:
            state = open_bundle(cache.check_tree(paths[done - 1]))
        except EdgekitError:  # missing or damaged: try the state before it
            continue
        return done, replace(state, manifest=replace(state.manifest, recipe=to_tables(job.recipe)))
    return 0, bundle_of(job, candidate_of(job.source), ())
