"""Run a recipe: apply each pass, measure, keep or roll back, record. Stopped at any moment, it goes on where it was.

The state after each pass is kept under the hash of everything it depends on, so that neither a run that was killed nor
another recipe with the same beginning computes it again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit import machine, plugins
from edgekit.bundle.format import GRAPH, PROBABILITIES, Bundle, assemble, assemble_graph
from edgekit.bundle.pack import pack
from edgekit.bundle.store import open_bundle
from edgekit.bundle.tensors import Arrays
from edgekit.compression import measure, metrics, states
from edgekit.compression.guard import State, Verdict, judge
from edgekit.compression.job import Job, Notify, ShowProgress, versions
from edgekit.compression.measure import AGREEMENT_ROWS, outputs_of
from edgekit.compression.recipe import Step, to_tables
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.nn.training import outputs as network_outputs
from edgekit.passes.base import AnyCandidate, Candidate, Context, GraphCandidate, Level, Pass, load_pass
from edgekit.session import open_session

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn


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


def plan(job: Job) -> list[tuple[Step, list[dict[str, str]]]]:
    """What each pass would do to the model as it is now; changes nothing. Later passes are planned on what earlier ones
    leave, by applying those without recovery training."""
    job = job.on_target()
    check_order(job.source, job.recipe)
    candidate = candidate_of(job.source)
    teacher = candidate.model if isinstance(candidate, Candidate) else None
    context = _context(job, teacher, job.seed)
    result = []
    for step in job.recipe:
        built = step.build()
        candidate = _for_pass(built, candidate, job)
        result.append((step, [asdict(change) for change in built.plan(candidate)]))
        if built.epochs_parameter:
            built = built.without_training()
        elif not isinstance(candidate, GraphCandidate):
            continue
        candidate = built.apply(candidate, context)
    return result


def run(
    job: Job,
    work: Path,
    *,
    notify: Notify = lambda message: None,
    progress: ShowProgress = lambda what, done, total: None,
) -> Bundle:
    """The compressed bundle, records included. `work`: folder for the state after each pass."""
    job = job.on_target()
    check_order(job.source, job.recipe)  # a mistake in the recipe is an error now, not a pass rolled back
    measured = metrics.metric(job.metric)
    source = candidate_of(job.source)
    teacher = source.model if isinstance(source, Candidate) else None
    forms = measure.best_float_form(job, notify)
    original = outputs_of(job, job.source, source)
    expected = job.test.labels if measured.labelled else original
    metrics.check_direction(measured, original, expected)
    beside = measure.other_outputs(job, job.source, source)
    paths = _state_paths(job, work)
    done, bundle = _resume(job, paths)
    records = list(bundle.manifest.records)
    if done:
        notify(f"resuming after pass {done} of {len(job.recipe)}")
    candidate = candidate_of(bundle)
    before = _state(bundle, metrics.measure(measured, outputs_of(job, bundle, candidate), expected))
    inputs = {name: array[:AGREEMENT_ROWS] for name, array in job.test.inputs.items()}
    best = measure.session(job, job.source, forms)
    if job.agree:
        measure.check_source(job, measure.agreement(job, job.source, forms, measured, expected))
    for number, step in enumerate(job.recipe[done:], start=done + 1):
        started = time.perf_counter()
        notify(f"pass {number} of {len(job.recipe)}: {step.name}")
        seed = job.seed + number if step.seed is None else step.seed
        context = _context(job, teacher, seed, progress)
        record: dict[str, Any] = {
            "pass": step.name,
            "parameters": dict(step.parameters),
            "seed": seed,
            "parent": job.source.digest,
            "before": asdict(before),
        }
        session = measure.session(job, bundle, forms)  # a runtime that is not there is no pass's fault
        built = step.build()
        try:
            subject = _for_pass(built, candidate, job)
            changes, fresh = _tried(built, subject, context)
            record["plan"] = changes
            fresh_bundle = _bundle(job, fresh, records)
            outputs = outputs_of(job, fresh_bundle, fresh)
            after = _state(fresh_bundle, metrics.measure(measured, outputs, expected))
            loss = metrics.measure_change(measured, original, outputs, expected)
            fresh_session = measure.session(job, fresh_bundle, forms)
            latency = measure.latency(job, bundle, fresh_bundle, (session, fresh_session), inputs, best)
            agreement = measure.agreement(job, fresh_bundle, forms, measured, expected)
            drifted = measure.drifted(beside, measure.other_outputs(job, fresh_bundle, fresh))
            problem = next((item.problem for item in agreement if item.problem), None) or next(
                (
                    f"output {name!r}, which the metric does not see, is no longer what the original gives: "
                    f"{far:.2g} times its size away"
                    for name, far in drifted.items()
                    if far >= measure.DRIFT_LIMIT
                ),
                None,
            )
            verdict = judge(before, after, loss, latency, job.limits)
            if verdict.useless and built.prepares:
                verdict = Verdict(True, "loses nothing; it prepares the passes after it")
            if verdict.kept and problem:
                verdict = Verdict(False, problem)
            if job.replay:
                verdict = Verdict(True, f"replayed; measured here: {verdict.reason}")
            record |= {"after": asdict(after), "loss": asdict(loss), "latency": [asdict(item) for item in latency]}
            record["agreement"] = [asdict(item) for item in agreement]
            record |= {"other_outputs": drifted} if drifted else {}
            if job.target is not None and job.estimated:
                record["estimated_on"] = job.target.name
                verdict = replace(verdict, reason=f"{verdict.reason} (latency: an estimate for {job.target.name})")
        except EdgekitError as error:
            verdict = Verdict(False, str(error))
        record |= {"kept": verdict.kept, "reason": verdict.reason, "seconds": round(time.perf_counter() - started, 1)}
        records.append(_finite(record))
        notify(f"  {'kept' if verdict.kept else 'rolled back'}: {verdict.reason}")
        if verdict.kept:
            candidate, before = fresh, after
        bundle = _bundle(job, candidate, records)
        states.keep(paths[number - 1], bundle)
    return _with_metrics(job, bundle, original, expected, inputs, forms)


def _tried(built: Pass[Any], subject: AnyCandidate, context: Context) -> tuple[list[dict[str, str]], AnyCandidate]:
    """A pass's plan and result. Whatever somebody's pass, or a library behind it, raises is that pass's failure: it is
    rolled back with the reason, and the passes after it have their turn."""
    try:
        changes, fresh = [asdict(change) for change in built.plan(subject)], built.apply(subject, context)
        if not isinstance(fresh, (Candidate, GraphCandidate)):
            raise EdgekitError(f"gave a {type(fresh).__name__}; a pass gives a Candidate or a GraphCandidate")
        return changes, fresh
    except EdgekitError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise EdgekitError(f"failed: {type(error).__name__}{first and ': '}{first[:300]}") from error


def applied(job: Job, step: Step) -> Bundle:
    """What one pass makes of the source, neither timed nor judged."""
    candidate = candidate_of(job.source)
    context = _context(job, candidate.model if isinstance(candidate, Candidate) else None, job.seed)
    built = step.build()
    return _bundle(job, built.apply(_for_pass(built, candidate, job), context), ())


def _with_metrics(
    job: Job,
    bundle: Bundle,
    original: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    inputs: Arrays,
    forms: Mapping[str, str],
) -> Bundle:
    """The finished bundle with what the whole job did: source and result side by side, measured in one run."""
    measured = metrics.metric(job.metric)
    outputs = outputs_of(job, bundle, candidate_of(bundle))
    before, after = (measure.session(job, item, forms) for item in (job.source, bundle))
    agreement = measure.agreement(job, bundle, forms, measured, expected)
    latency = measure.latency(job, job.source, bundle, (before, after), inputs)
    measures = {
        job.metric.replace("-", "_"): asdict(metrics.measure(measured, outputs, expected)),
        "compression": {
            "metric": measured.name,
            "original": asdict(metrics.measure(measured, original, expected)),
            "change": asdict(metrics.measure_change(measured, original, outputs, expected)),
            "latency": [asdict(item) for item in latency],
            "baseline": dict(forms),
            "limits": asdict(job.limits),
            "runtime": job.runtime,
            "agreement": [asdict(item) for item in agreement],
            "machine": machine.describe(),
        },
    }
    if job.target is not None:
        from edgekit.compression.bench import float_graph
        from edgekit.targets.decisions import needed

        batch, memory = needed(job.target, float_graph(bundle), inputs, job.limits.batches)
        measures["compression"]["memory"] = {
            **asdict(memory),
            "batch": batch,
            "fits": memory.fits,
            "needed": memory.needed,
            "text": str(memory),
        }
        if job.estimated:
            measures["compression"]["estimated_on"] = job.target.name
    return replace(bundle, manifest=replace(bundle.manifest, metrics=_finite(measures)))


def _context(
    job: Job, teacher: nn.Module | None, seed: int, progress: ShowProgress = lambda what, done, total: None
) -> Context:
    def lower(network: nn.Module) -> ModelProto:
        from edgekit.graph.lower import float_graph

        return float_graph(job.source, network, exporter="dynamo")

    return Context(job.train, teacher, seed, progress, job.source.manifest.inputs, lower)


def _for_pass(built: Pass[Any], candidate: AnyCandidate, job: Job) -> AnyCandidate:
    """The candidate as the pass takes it: lowered to a graph for the first pass that works on one."""
    return candidate if built.level == Level.NETWORK else lowered(candidate, job)


def lowered(candidate: AnyCandidate, job: Job) -> GraphCandidate:
    """The candidate as a graph."""
    if isinstance(candidate, GraphCandidate):
        return candidate
    from edgekit.graph.lower import lower

    return GraphCandidate(lower(_bundle(job, candidate, ())))


def candidate_of(bundle: Bundle) -> AnyCandidate:
    """The bundle's model as passes take it."""
    if bundle.is_graph:
        from edgekit.graph.model import load

        return GraphCandidate(load(bundle.contents[GRAPH], str(bundle.path or bundle.manifest.name)))
    return Candidate(bundle.manifest.family, bundle.manifest.arguments, bundle.model(), bundle.encodings())


def _bundle(job: Job, candidate: AnyCandidate, records: Sequence[Mapping[str, Any]]) -> Bundle:
    """The candidate as a bundle, its golden outputs recomputed on the source's golden inputs."""
    inputs, _ = job.source.golden()
    inputs = {spec.name: inputs[spec.name] for spec in job.source.manifest.inputs}
    names = [spec.name for spec in job.source.manifest.outputs]
    manifest = replace(
        job.source.manifest,
        recipe=to_tables(job.recipe),
        records=tuple(dict(record) for record in records),
        parent=job.source.digest,
        seed=job.seed,
        metrics={},
        target=job.target.name if job.target else job.source.manifest.target,
        versions=versions(),
    )
    if isinstance(candidate, GraphCandidate):
        from edgekit.graph.model import serialized

        graph = serialized(candidate.model)
        empty = {name: np.zeros(0, np.float32) for name in names}
        outputs = open_session(assemble_graph(manifest, graph, (inputs, empty)), "onnxruntime", threads=1).run(inputs)
        return assemble_graph(manifest, graph, (inputs, outputs))
    rows = len(next(iter(inputs.values())))
    golden = Dataset(inputs, np.zeros(rows, np.int64))
    softmax = [name == PROBABILITIES for name in names]
    outputs = dict(zip(names, network_outputs(candidate.model, golden, softmax=softmax), strict=True))
    manifest = replace(manifest, arguments=dict(candidate.arguments))
    return assemble(manifest, candidate.weights(), candidate.encodings, (inputs, outputs))


def _state(bundle: Bundle, measurement: metrics.Measurement) -> State:
    return State(measurement, len(pack(bundle)), bundle.parameters)


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _state_paths(job: Job, work: Path) -> list[Path]:
    """Where the state after each pass belongs: under the hash of the job and of the passes up to it, their code
    included."""
    key = hashlib.sha256(job.key().encode())
    paths = []
    for step in job.recipe:
        identity = states.pass_identity(step.name)
        key.update(json.dumps([step.name, dict(step.parameters), step.seed, identity], sort_keys=True).encode())
        paths.append(work / f"{key.hexdigest()[:32]}.edge")
    return paths


def _resume(job: Job, paths: Sequence[Path]) -> tuple[int, Bundle]:
    """Passes done and the state after the longest beginning of this recipe that an earlier run of the job left."""
    for done in range(len(paths), 0, -1):
        try:
            state = open_bundle(paths[done - 1])
        except EdgekitError:  # not reached, or damaged: the state before it will do
            continue
        return done, replace(state, manifest=replace(state.manifest, recipe=to_tables(job.recipe)))
    return 0, _bundle(job, candidate_of(job.source), job.source.manifest.records)
