"""The time of an architecture on this machine's CPU, in ONNX Runtime on one thread: predicted without the network, or
measured on its exported graph.

The prediction is the operator table's time (`edgekit.cost.measured`) of each group of operators in the outline, times a
factor of the group. The factors come from a few exported and measured networks of the same space, by least squares of
the relative error that draw each factor towards 1: few networks say little about a group that few of them have. The
error that is stated is that of each of these networks when the factors are fitted to the others.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from edgekit.cost.measured import OperatorTable, Terms
from edgekit.cost.operators import Operator, Workload
from edgekit.cost.profiled import open_model, random_feeds
from edgekit.cost.timing import in_turns, timed
from edgekit.errors import EdgekitError
from edgekit.graph.lower import float_graph
from edgekit.nas.bundles import bundle_of
from edgekit.nas.outline import outline
from edgekit.nn.hiera_config import HieraConfig

ANCHORS = 8  # networks that are exported and measured to correct the table
GROUPS = ("convolution", "depthwise", "product", "other")
PRIOR = 0.02  # how strongly a factor is drawn towards 1; a measured network counts up to 1
BUSY = 0.9  # the share of wall time that the calls of a measurement must have had
# the times that EfficientViT's authors published, in estimates (tools/check_target_estimates.py): least and most of
# two networks, at 224 and 288 pixels, on two Jetsons
BACK_TEST = {"jetson-nano": (3.8, 4.2), "jetson-agx-orin-64gb": (0.9, 1.2)}
WORST = max(most for _, most in BACK_TEST.values())


@dataclass(frozen=True, slots=True)
class Correction:
    """A factor of the table's seconds for each of GROUPS. error: the median relative error on networks that the fit has
    not seen; worst: the largest one; disturbed: whether other programs ran while they were measured."""

    factors: tuple[float, ...] = (1.0,) * len(GROUPS)
    error: float = math.nan
    worst: float = math.nan
    disturbed: bool = False

    def seconds(self, parts: Sequence[float]) -> float:
        return float(np.dot(self.factors, parts))


@dataclass(frozen=True, slots=True)
class Measured:
    """CPU seconds of a call in this thread, its median over the rounds; share: of the time, that this process had."""

    seconds: float
    share: float

    @property
    def disturbed(self) -> bool:
        """Whether other programs took the processor, which evicts caches and makes calls slower."""
        return self.share < BUSY


def parts_of(work: Workload, table: OperatorTable) -> tuple[float, ...]:
    """Return the table's seconds for each of GROUPS; the call's own overhead counts with the last."""
    found = dict.fromkeys(GROUPS, 0.0)
    for operator in work.operators:
        found[_group(operator)] += table.of(operator)
    found[GROUPS[-1]] += table.call
    return tuple(found.values())


def corrected(parts: Sequence[Sequence[float]], seconds: Sequence[float]) -> Correction:
    """Fit the factors to measured networks, and judge them by leaving each network out in turn."""
    if len(parts) < 3:
        raise EdgekitError(f"{len(parts)} networks were measured; the correction needs at least 3")
    matrix, target = np.array(parts), np.array(seconds)
    errors = []
    for left in range(len(target)):
        others = np.arange(len(target)) != left
        errors.append(abs(float(matrix[left] @ _fit(matrix[others], target[others])) / float(target[left]) - 1))
    factors = tuple(float(factor) for factor in _fit(matrix, target))
    return Correction(factors, float(np.median(errors)), max(errors))


def _fit(matrix: Terms, target: Terms) -> Terms:
    """Return the factors that minimize the sum of squared relative errors and PRIOR times that of factors - 1."""
    share = matrix / target[:, None]
    normal = share.T @ share + PRIOR * np.eye(len(GROUPS))
    found = np.linalg.solve(normal, share.T @ np.ones(len(target)) + PRIOR)
    factors: Terms = np.maximum(found, 0.0)
    return factors


def _group(operator: Operator) -> str:
    if not operator.product:
        return "other"
    if "Conv" not in operator.op_type:
        return "product"
    return "depthwise" if operator.matrices > 1 else "convolution"


def calibrate(
    configs: Sequence[HieraConfig],
    table: OperatorTable,
    batch: int = 1,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Correction:
    """Export and measure the networks, and fit the correction to them."""
    graphs = []
    for number, config in enumerate(configs):
        progress("exporting networks to measure", number, len(configs))
        graphs.append(exported(config))
    progress("exporting networks to measure", len(configs), len(configs))
    found = measure(graphs, batch)
    correction = corrected(
        [parts_of(outline(config, batch).work, table) for config in configs], [item.seconds for item in found]
    )
    return replace(correction, disturbed=any(item.disturbed for item in found))


def measure(graphs: Sequence[ModelProto], batch: int = 1, *, seconds: float = 0.5, threads: int = 1) -> list[Measured]:
    """Time graphs in turns, on one thread by CPU time. Wall time tells whether other programs ran in between."""
    calls = []
    for graph in graphs:
        session, feeds = open_model(graph, threads), dict(random_feeds(graph, batch))
        calls.append(timed(functools.partial(session.run, None, feeds), time.thread_time, time.perf_counter))
    taken = in_turns(calls, seconds=seconds * len(calls), least=9)
    middle = np.median(taken, axis=0)
    shares = taken[:, :, 0].sum(axis=0) / taken[:, :, 1].sum(axis=0)
    return [Measured(float(row[0]), float(share)) for row, share in zip(middle, shares, strict=True)]


def exported(config: HieraConfig) -> ModelProto:
    """Return the graph of the network with fused convolutions and random weights."""
    return float_graph(bundle_of(config))
