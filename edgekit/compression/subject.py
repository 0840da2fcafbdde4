"""Conversions between bundles and the candidates on which passes work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.bundle.format import (
    PROBABILITIES,
    TOKENIZER_FILES,
    Bundle,
    Manifest,
    assemble,
    assemble_graph,
    with_files,
)
from edgekit.bundle.tensors import Arrays
from edgekit.compression.job import Job, ShowProgress, versions
from edgekit.compression.recipe import Step, to_tables
from edgekit.compression.record import PassRecord
from edgekit.data.dataset import Dataset
from edgekit.nn.training import outputs as network_outputs
from edgekit.passes.base import AnyCandidate, Candidate, Context, GraphCandidate, Level, Pass
from edgekit.session import open_session

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

GOLDEN_ROWS = 8


def context_of(
    job: Job, teacher: nn.Module | None, seed: int, progress: ShowProgress = lambda what, done, total: None
) -> Context:
    """Return the context of a pass: the data, the teacher and the seed that it may use."""

    def lower(network: nn.Module) -> ModelProto:
        from edgekit.graph.lower import float_graph

        return float_graph(job.source, network, exporter="dynamo")

    return Context(job.train, teacher, seed, progress, job.source.manifest.inputs, lower)


def for_pass(built: Pass[Any], candidate: AnyCandidate, job: Job) -> AnyCandidate:
    """Return the candidate in the form that the pass takes: lowered to a graph for the first pass that works on
    graphs."""
    return candidate if built.level == Level.NETWORK else lowered(candidate, job)


def lowered(candidate: AnyCandidate, job: Job) -> GraphCandidate:
    """Return the candidate as a graph."""
    if isinstance(candidate, GraphCandidate):
        return candidate
    from edgekit.graph.lower import lower

    return GraphCandidate(lower(bundle_of(job, candidate, ())))


def candidate_of(bundle: Bundle) -> AnyCandidate:
    """Return the bundle's model as a candidate for passes."""
    if bundle.is_graph:
        return GraphCandidate(bundle.graph())
    return Candidate(bundle.manifest.family, bundle.manifest.arguments, bundle.model(), bundle.encodings())


def bundle_of(job: Job, candidate: AnyCandidate, records: Sequence[PassRecord]) -> Bundle:
    """Return the candidate as a bundle. Its golden inputs are rows of the test data, and it computes the golden
    outputs. records: of this run."""
    return with_files(_bundle_of(job, candidate, records), _carried(job.source))


def _carried(source: Bundle) -> dict[str, bytes]:
    """Return the source's files that no pass changes: those of its tokenizer."""
    return {name: content for name, content in source.contents.items() if name in TOKENIZER_FILES}


def _bundle_of(job: Job, candidate: AnyCandidate, records: Sequence[PassRecord]) -> Bundle:
    inputs = golden_inputs(job)
    manifest = replace(
        job.source.manifest,
        recipe=to_tables(job.recipe),
        records=(*job.source.manifest.records, *(record.to_json() for record in records)),
        parent=job.source.digest,
        seed=job.seed,
        metrics={},
        synthetic=False,
        target=job.target.name if job.target else job.source.manifest.target,
        versions=versions(),
    )
    if isinstance(candidate, GraphCandidate):
        return _graph_bundle(manifest, candidate, inputs)
    names = [spec.name for spec in manifest.outputs]
    rows = len(next(iter(inputs.values())))
    golden = Dataset(inputs, np.zeros(rows, np.int64))
    softmax = [name == PROBABILITIES for name in names]
    outputs = dict(zip(names, network_outputs(candidate.model, golden, softmax=softmax), strict=True))
    manifest = replace(manifest, arguments=dict(candidate.arguments))
    return assemble(manifest, candidate.weights(), candidate.encodings, (inputs, outputs))


def golden_inputs(job: Job) -> Arrays:
    """Return golden inputs for the results of the job: rows of the test data, spread over all of it."""
    rows = np.linspace(0, len(job.test) - 1, min(GOLDEN_ROWS, len(job.test))).astype(np.int64)
    return {spec.name: job.test.inputs[spec.name][rows] for spec in job.source.manifest.inputs}


def _graph_bundle(manifest: Manifest, candidate: GraphCandidate, inputs: Arrays) -> Bundle:
    from edgekit.bundle.onnx_file import serialized

    graph = serialized(candidate.model)
    empty = {spec.name: np.zeros(0, np.float32) for spec in manifest.outputs}
    outputs = open_session(assemble_graph(manifest, graph, (inputs, empty)), "onnxruntime", threads=1).run(inputs)
    return assemble_graph(manifest, graph, (inputs, outputs))


def applied(job: Job, step: Step) -> Bundle:
    """Return the result of one pass on the source, neither timed nor judged."""
    candidate = candidate_of(job.source)
    context = context_of(job, candidate.model if isinstance(candidate, Candidate) else None, job.seed)
    built = step.build()
    return bundle_of(job, built.apply(for_pass(built, candidate, job), context), ())
