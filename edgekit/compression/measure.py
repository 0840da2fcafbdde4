"""The measurements of a run: latency against the best float32 form, agreement of runtimes and batch sizes, other
outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.format import PROBABILITIES, Bundle
from edgekit.bundle.tensors import Arrays
from edgekit.compression import metrics
from edgekit.compression.guard import (
    Agreement,
    Latency,
    compare_batches,
    compare_latency,
    rows_together,
    time_in_turns,
)
from edgekit.compression.job import Job, Notify
from edgekit.cost.timing import ratio_interval
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.nn.training import outputs as network_outputs
from edgekit.passes.base import AnyCandidate, Candidate
from edgekit.session import Session, open_session

AGREEMENT_ROWS = 64
QUALITY_ROWS = 512  # at each batch size, if outputs depend on it
DRIFT_LIMIT = 1.0  # an output of nothing but zeros has a relative error of 1
ROWS = 256  # of a batch when quality is measured
MEASURED_CHUNK = 4  # t2's scores of four rows stay in a core's cache
# Forms of the same float32 model. Exporters differ by 13 % on a small transformer, and a fusion made one slower: int8
# measured against the worse of them would win without being faster.
FLOAT_FORMS: dict[str, tuple[dict[str, str], ...]] = {
    "onnxruntime": (
        {"exporter": "torchscript", "optimization": "all"},
        {"exporter": "torchscript", "optimization": "basic"},
        {"exporter": "dynamo", "optimization": "all"},
    )
}
_best_forms: dict[tuple[str, str, tuple[int, ...]], dict[str, str]] = {}  # in this process


def best_float_form(job: Job, notify: Notify = lambda message: None) -> dict[str, str]:
    """Return the session options under which the float32 original is fastest, by the geometric mean over the batch
    sizes. The first form is returned unless another one is faster beyond the noise."""
    forms = FLOAT_FORMS.get(job.runtime, ({},))
    if job.estimated:  # the fastest form here may not be the fastest there
        forms = forms[:1]
    if job.source.is_graph:  # another program exported it
        own = [item for item in forms if item.get("exporter") != "dynamo"]
        forms = tuple({name: value for name, value in item.items() if name != "exporter"} for item in own)
    known = (job.source.digest, job.runtime, job.limits.batches)
    if len(forms) < 2:
        return dict(forms[0])
    if known in _best_forms:
        return dict(_best_forms[known])
    inputs = {name: array[:AGREEMENT_ROWS] for name, array in job.test.inputs.items()}
    sessions: list[tuple[dict[str, str], Session]] = []
    for form in forms:
        try:
            sessions.append((form, session(job, job.source, form)))
        except EdgekitError as error:
            if not sessions:
                raise
            notify(f"{form} is left out of the comparison: {error}")
    logarithms = np.zeros(len(sessions))
    for batch in job.limits.batches:
        times = time_in_turns([session for _, session in sessions], inputs, batch, seconds=0.5)
        for index in range(1, len(sessions)):
            _, _, high = ratio_interval(times[:, 0], times[:, index])
            logarithms[index] += math.log(high)
    _best_forms[known] = dict(sessions[int(logarithms.argmin())][0])
    return _best_forms[known]


def latency(
    job: Job,
    before: Bundle,
    after: Bundle,
    sessions: tuple[Session, Session],
    inputs: Arrays,
    best: Session | None = None,
) -> list[Latency]:
    """Measure the latency; if the target is another device, estimate it."""
    if job.target is None or not job.estimated:
        return compare_latency(*sessions, inputs, job.limits.batches, best=best)
    from edgekit.compression.bench import float_graph
    from edgekit.compression.decisions import estimated

    return estimated(job.target, float_graph(before), float_graph(after), inputs, job.limits.batches)


def agreement(
    job: Job, bundle: Bundle, form: Mapping[str, str], metric: metrics.Metric, expected: npt.NDArray[Any]
) -> list[Agreement]:
    """Check whether the bundle is the same model at every batch size, on the measured runtime and on those of `agree`,
    up to the first problem. A runtime gets each batch in one piece."""
    largest = max(job.limits.batches)
    own_session = session(job, bundle, form, chunk=largest)
    if bundle.is_graph or job.agree:
        rows = np.random.default_rng(job.seed).permutation(len(job.test))[:QUALITY_ROWS]
    else:
        rows = np.arange(min(AGREEMENT_ROWS, len(job.test)))
    inputs = job.test.take(rows).inputs
    primary = job.source.manifest.outputs[0].name

    def change(alone: Arrays, together: Arrays, chosen: npt.NDArray[np.integer]) -> float:
        held = expected[rows][chosen]
        return metric.value(together[primary], held) - metric.value(alone[primary], held)

    own = change if bundle.is_graph else None  # the rows of a network do not affect one another
    found = compare_batches(own_session, inputs, job.limits, own, runtime=job.runtime)
    elsewhere = job.runtime, rows_together(own_session, inputs, 1) if job.agree else {}
    for runtime in job.agree:
        if found[-1].problem:
            break
        other = open_session(bundle, runtime, threads=1, chunk=largest)
        found += compare_batches(other, inputs, job.limits, change, runtime=runtime, elsewhere=elsewhere)
    return found


def check_source(job: Job, found: Sequence[Agreement]) -> None:
    """Raise if the original itself is not the same model at every batch size and on every runtime: no pass is the
    cause."""
    problem = next((item.problem for item in found if item.problem and item.runtime in job.agree), None)
    if problem:
        raise EdgekitError(
            f"{job.source.manifest.name}, before any pass: {problem}; leave that runtime out of --agree, or allow more "
            "with --max-loss"
        )


def session(job: Job, bundle: Bundle, form: Mapping[str, str], chunk: int = MEASURED_CHUNK) -> Session:
    """Open a session to measure: one thread, whose CPU time the guard reads, and a fixed number of rows at a time.
    Otherwise each session of a comparison would choose its own number, and the noise of these choices would look like a
    gain."""
    options = {name: value for name, value in form.items() if not (bundle.is_graph and name == "exporter")}
    return open_session(bundle, job.runtime, threads=1, chunk=chunk, **options)


def outputs_of(job: Job, bundle: Bundle, candidate: AnyCandidate) -> npt.NDArray[Any]:
    """Return the first output for every test row. torch computes a network's, and the measured runtime computes a
    graph's."""
    return _outputs(job, bundle, candidate, [bundle.manifest.outputs[0].name], job.test)[0]


def other_outputs(job: Job, bundle: Bundle, candidate: AnyCandidate) -> Arrays:
    """Return the outputs that the metric does not cover, for some test rows. State outputs are left out, because only
    the model itself uses them."""
    names = [spec.name for spec in bundle.manifest.outputs]
    rows = job.test.take(np.arange(min(QUALITY_ROWS, len(job.test))))
    hidden = bundle.manifest.state.values()
    found = _outputs(job, bundle, candidate, names, rows) if set(names[1:]) - set(hidden) else [rows.labels]
    return {name: value for name, value in zip(names[1:], found[1:], strict=False) if name not in hidden}


def drifted(original: Arrays, found: Arrays) -> dict[str, float]:
    """Return how far each of these outputs is from the original's: the share of values that differ for whole numbers,
    else the relative error; infinite if the shape differs."""
    far = {}
    for name, exact in original.items():
        measured: metrics.Metric = metrics.Changed() if exact.dtype.kind in "iub" else metrics.RelativeError()
        same = name in found and found[name].shape == exact.shape and np.isfinite(found[name]).all()
        far[name] = measured.value(found[name], exact) if same else math.inf
    return far


def _outputs(
    job: Job, bundle: Bundle, candidate: AnyCandidate, names: Sequence[str], rows: Dataset
) -> list[npt.NDArray[Any]]:
    if isinstance(candidate, Candidate):
        return list(network_outputs(candidate.model, rows, softmax=[name == PROBABILITIES for name in names]))
    session = open_session(bundle, job.runtime, threads=1, chunk=ROWS)
    parts = [
        session.run({name: array[start : start + ROWS] for name, array in rows.inputs.items()})
        for start in range(0, len(rows), ROWS)
    ]
    return [np.concatenate([part[name] for part in parts]) for name in names]
