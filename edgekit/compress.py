"""Run a recipe: apply each pass, measure, keep or roll back, record. Stopped at any moment, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import machine, quality
from edgekit.bundle import Arrays, Bundle, assemble, open_bundle, write_bundle
from edgekit.data import Dataset
from edgekit.errors import EdgekitError
from edgekit.files import write_file
from edgekit.guard import Limits, State, Verdict, check_agreement, compare_latency, judge
from edgekit.pack import pack
from edgekit.passes.base import Candidate, Context
from edgekit.recipe import Step, to_tables
from edgekit.session import Session, open_session
from edgekit.training import probabilities

Notify = Callable[[str], None]
AGREEMENT_ROWS = 64
MEASURED_CHUNK = 4  # t2's scores of four rows stay in a core's cache


@dataclass(frozen=True, slots=True)
class Job:
    """What to compress and by which measure."""

    source: Bundle
    recipe: Sequence[Step]
    train: Dataset
    test: Dataset
    limits: Limits = field(default_factory=Limits)
    metric: str = "log-loss"
    runtime: str = "onnxruntime"  # the one that latency is measured on
    seed: int = 0

    def key(self) -> str:
        """Identity of the work but for the recipe, which may grow: a resumed run must be the same job."""
        data = hashlib.sha256()
        for part in (self.train, self.test):
            data.update(part.labels.tobytes())
            for array in part.inputs.values():
                data.update(array.tobytes())
        settings = [self.source.digest, data.hexdigest(), asdict(self.limits), self.metric, self.runtime, self.seed]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def plan(job: Job) -> list[tuple[Step, list[dict[str, str]]]]:
    """What each pass would do to the model as it is now; changes nothing. Later passes are planned on what earlier ones
    leave, by applying those without recovery training."""
    candidate = _start(job.source)
    context = Context(job.train, candidate.model, job.seed)
    result = []
    for step in job.recipe:
        built = step.build()
        result.append((step, [asdict(change) for change in built.plan(candidate)]))
        if "epochs" in {item.name for item in fields(built)}:
            candidate = replace(built, epochs=0).apply(candidate, context)
    return result


def run(
    job: Job,
    work: Path,
    *,
    notify: Notify = lambda message: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Bundle:
    """The compressed bundle, records included. `work`: folder for the state after each pass, removed by the caller."""
    measured = quality.metric(job.metric)
    passes = [step.build() for step in job.recipe]  # a mistake in the recipe is an error now, not a pass rolled back
    teacher = job.source.model()
    original = probabilities(teacher, job.test)
    bundle = _resume(job, work, notify)
    records = list(bundle.manifest.records)
    done = len(records) - len(job.source.manifest.records)
    if done:
        notify(f"resuming after pass {done} of {len(job.recipe)}")
    candidate = Candidate(bundle.manifest.family, bundle.manifest.arguments, bundle.model(), bundle.encodings())
    before = _state(bundle, quality.measure(measured, probabilities(candidate.model, job.test), job.test.labels))
    inputs = {name: array[:AGREEMENT_ROWS] for name, array in job.test.inputs.items()}
    for number, step in enumerate(job.recipe[done:], start=done + 1):
        started = time.perf_counter()
        notify(f"pass {number} of {len(job.recipe)}: {step.name}")
        context = Context(job.train, teacher, job.seed + number, progress)
        record: dict[str, Any] = {"pass": step.name, "parameters": dict(step.parameters), "before": asdict(before)}
        session = _session(job, bundle)  # a runtime that is not there is no pass's fault
        built = passes[number - 1]
        try:
            record["plan"] = [asdict(change) for change in built.plan(candidate)]
            fresh = built.apply(candidate, context)
            fresh_bundle = _bundle(job, fresh, records)
            outputs = probabilities(fresh.model, job.test)
            after = _state(fresh_bundle, quality.measure(measured, outputs, job.test.labels))
            loss = quality.measure_change(measured, original, outputs, job.test.labels)
            fresh_session = _session(job, fresh_bundle)
            latency = compare_latency(session, fresh_session, inputs, job.limits.batches)
            disagreement = check_agreement(fresh_session, inputs, job.limits)
            verdict = Verdict(False, disagreement) if disagreement else judge(before, after, loss, latency, job.limits)
            record |= {"after": asdict(after), "loss": asdict(loss), "latency": [asdict(item) for item in latency]}
        except EdgekitError as error:
            verdict = Verdict(False, str(error))
        record |= {"kept": verdict.kept, "reason": verdict.reason, "seconds": round(time.perf_counter() - started, 1)}
        records.append(_finite(record))
        notify(f"  {'kept' if verdict.kept else 'rolled back'}: {verdict.reason}")
        if verdict.kept:
            candidate, before = fresh, after
        bundle = _bundle(job, candidate, records)
        write_bundle(bundle, work / f"pass-{number}.edge", force=True)
    return _with_metrics(job, bundle, original, inputs)


def _with_metrics(job: Job, bundle: Bundle, original: Any, inputs: Arrays) -> Bundle:
    """The finished bundle with what the whole job did: source and result side by side, measured in one run."""
    measured = quality.metric(job.metric)
    outputs = probabilities(bundle.model(), job.test)
    before, after = (_session(job, item) for item in (job.source, bundle))
    metrics = {
        job.metric.replace("-", "_"): asdict(quality.measure(measured, outputs, job.test.labels)),
        "compression": {
            "metric": measured.name,
            "original": asdict(quality.measure(measured, original, job.test.labels)),
            "change": asdict(quality.measure_change(measured, original, outputs, job.test.labels)),
            "latency": [asdict(item) for item in compare_latency(before, after, inputs, job.limits.batches)],
            "limits": asdict(job.limits),
            "runtime": job.runtime,
            "machine": machine.describe(),
        },
    }
    return replace(bundle, manifest=replace(bundle.manifest, metrics=_finite(metrics)))


def _session(job: Job, bundle: Bundle) -> Session:
    """For measuring: one thread, whose CPU time the guard reads, and a fixed number of rows at a time. Left to itself,
    each session of a comparison would choose its own, and the choices' noise would pass for a gain."""
    return open_session(bundle, job.runtime, threads=1, chunk=MEASURED_CHUNK)


def _start(source: Bundle) -> Candidate:
    return Candidate(source.manifest.family, source.manifest.arguments, source.model(), source.encodings())


def _bundle(job: Job, candidate: Candidate, records: Sequence[Mapping[str, Any]]) -> Bundle:
    """The candidate as a bundle, its golden outputs recomputed on the source's golden inputs."""
    inputs, _ = job.source.golden()
    rows = len(next(iter(inputs.values())))
    golden = Dataset({spec.name: inputs[spec.name] for spec in job.source.manifest.inputs}, np.zeros(rows, np.int64))
    outputs = {job.source.manifest.outputs[0].name: probabilities(candidate.model, golden)}
    manifest = replace(
        job.source.manifest,
        arguments=dict(candidate.arguments),
        recipe=to_tables(job.recipe),
        records=tuple(dict(record) for record in records),
        parent=job.source.digest,
        seed=job.seed,
        metrics={},
        versions=versions(),
    )
    return assemble(manifest, candidate.weights(), candidate.encodings, (inputs, outputs))


def _state(bundle: Bundle, measurement: quality.Measurement) -> State:
    parameters = sum(value.size for value in bundle.weights().values())
    return State(measurement, len(pack(bundle)), parameters)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("edgekit", "torch", "numpy", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _resume(job: Job, work: Path, notify: Notify) -> Bundle:
    """The state that an earlier run of the same job left after the longest beginning of this recipe, else the source.
    States of another job in the same folder are discarded."""
    key = work / "job"
    if not key.is_file() or key.read_text() != job.key():
        if key.is_file():
            notify(f"{work} holds the state of another job (other model, data, limits or seed); starting over")
        for stale in work.glob("pass-*.edge"):
            shutil.rmtree(stale)
        write_file(key, job.key().encode())
    wanted = [[record["pass"], record["parameters"]] for record in job.source.manifest.records]
    wanted += json.loads(json.dumps([[step.name, dict(step.parameters)] for step in job.recipe]))
    for done in range(len(job.recipe), 0, -1):
        try:
            state = open_bundle(work / f"pass-{done}.edge")
        except EdgekitError:  # not reached, or damaged: the state before it will do
            continue
        passed = [[record["pass"], record["parameters"]] for record in state.manifest.records]
        if passed == wanted[: len(wanted) - len(job.recipe) + done]:
            return state
    return _bundle(job, _start(job.source), job.source.manifest.records)
