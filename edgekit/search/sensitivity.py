"""Measure which weights the metric depends on most: quantize each weight alone to few bits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from edgekit.bundle.format import Bundle
from edgekit.compression import metrics
from edgekit.compression.job import Job, ShowProgress
from edgekit.compression.measure import outputs_of
from edgekit.compression.recipe import Step
from edgekit.compression.subject import applied, candidate_of, lowered
from edgekit.compression.trials import Sensitivity
from edgekit.data.dataset import Dataset

PROBE_BITS = 3  # few enough bits that the loss of an important weight is visible


def sensitivities(job: Job, progress: ShowProgress) -> list[Sensitivity]:
    """Return every weight that can be quantized, the most sensitive first."""
    metric = metrics.metric(job.metric)
    candidate = candidate_of(job.source)
    rows = _some(job.test)
    small = replace(job, test=rows)
    original = outputs_of(small, job.source, candidate)
    expected = rows.labels if metric.labelled else original
    metrics.check_direction(metric, original, expected)  # before hours of trials, not after them
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


def _probes(source: Bundle, candidate: Any) -> list[tuple[str, Step]]:
    if source.is_graph:
        from edgekit.graph.model import weights

        uses = [use for weight in weights(candidate.model) for use in weight.uses]
        nodes = [use.node.name for use in uses if use.node.op_type in ("MatMul", "Gemm")]
        return [
            (name, Step("dynamic_int8", {"exclude": [other for other in nodes if other != name]})) for name in nodes
        ]
    from edgekit.passes.base import matrices

    return [
        (name, Step("quantize", {"bits": PROBE_BITS, "epochs": 0, "include": [name]}))
        for name in matrices(candidate.model, ("*",))
    ]


def _nodes(job: Job, candidate: Any) -> dict[str, tuple[str, ...]]:
    """Return by weight the nodes that multiply by it in the graph that a network becomes; empty if no pass on graphs
    can run."""
    if job.source.is_graph or job.runtime != "onnxruntime":
        return {}
    from edgekit.graph.model import name_nodes, weights

    model = lowered(candidate, job).copy_model()
    name_nodes(model)
    return {weight.name: tuple(use.node.name for use in weight.uses) for weight in weights(model)}


def _some(data: Dataset, most: int = 1024) -> Dataset:
    return data.take(np.arange(min(len(data), most)))
