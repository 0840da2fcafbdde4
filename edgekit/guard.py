"""The guard: measure a candidate before and after a pass, and keep the pass only if what it was for got better and
nothing else got worse than allowed.

Latency is the CPU time of one thread on the real runtime, before and after interleaved in one run, because machines are
shared and their clocks wander; the ratio's interval is bootstrapped over the pairs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle import Arrays
from edgekit.errors import EdgekitError
from edgekit.quality import Measurement
from edgekit.session import Session


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pass may cost and must gain."""

    max_loss: float = 0.01  # in the metric's unit, against the model that compression started from
    max_slowdown: float = 0.05  # relative, at any batch size, beyond the measurement's own uncertainty
    min_gain: float = 0.01  # relative, in bytes or in latency: less than this is not worth a pass
    batches: tuple[int, ...] = (1, 16, 256)  # the sizes at which latency is measured and outputs must agree
    agreement: float = 1e-4  # largest difference of a probability between batch sizes: int8 runtimes have broken here


@dataclass(frozen=True, slots=True)
class Latency:
    """One batch size: median CPU milliseconds before and after, their ratio (after / before), its 95 % interval."""

    batch: int
    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class State:
    """Where a candidate stands. bytes: of its packed file, really written and counted."""

    quality: Measurement
    bytes: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Verdict:
    kept: bool
    reason: str


def judge(before: State, after: State, loss: Measurement, latency: Sequence[Latency], limits: Limits) -> Verdict:
    """Keep or roll back. `loss`: the metric's change against the original model, paired on the same samples."""
    if not np.isfinite([after.quality.value, loss.value]).all():
        return Verdict(False, f"the metric is {after.quality.value}, not a number: nothing can be said for the result")
    if loss.value > limits.max_loss:
        return Verdict(
            False,
            f"costs {loss.value:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}] in quality against the original, "
            f"{limits.max_loss:g} allowed (n = {loss.samples:,})",
        )
    slow = [item for item in latency if item.low > 1 + limits.max_slowdown]
    if slow:
        worst = max(slow, key=lambda item: item.ratio)
        return Verdict(
            False,
            f"slower at batch {worst.batch}: {worst.ratio:.2f} times the time [{worst.low:.2f}, {worst.high:.2f}]"
            f", {1 + limits.max_slowdown:.2f} allowed",
        )
    smaller = after.bytes <= before.bytes * (1 - limits.min_gain)
    faster = [item for item in latency if item.high < 1 - limits.min_gain]
    gains = [f"{before.bytes / after.bytes:.2f} times smaller"] if smaller else []
    gains += [f"{1 / item.ratio:.2f} times faster at batch {item.batch}" for item in faster]
    if not gains:
        return Verdict(
            False, f"gains nothing: {before.bytes:,} to {after.bytes:,} bytes, and no faster at any batch size"
        )
    return Verdict(True, ", ".join(gains))


def compare_latency(
    before: Session, after: Session, inputs: Arrays, batches: Sequence[int], *, seconds: float = 1.5, seed: int = 0
) -> list[Latency]:
    """Time two sessions in turns, at each batch size for about `seconds`; the first run of each is thrown away."""
    rng = np.random.default_rng(seed)
    result = []
    for batch in batches:
        rows = tiled(inputs, batch)
        pair = (before, after)
        for session in pair:
            session.warmup(batch)
        once = max(_thread_seconds(session, rows) for session in pair)
        rounds = int(np.clip(seconds / (2 * max(once, 1e-6)), 7, 400))
        # the one that goes first changes from round to round, so that neither always finds the other's cache
        times = np.array(
            [[_thread_seconds(s, rows) for s in pair[:: 1 - 2 * (r % 2)]][:: 1 - 2 * (r % 2)] for r in range(rounds)]
        )
        times = np.maximum(times, 1e-9)  # the clock's grain: an empty run must not divide by zero
        ratios = times[:, 1] / times[:, 0]
        draws = np.median(ratios[rng.integers(0, rounds, (400, rounds))], axis=1)
        low, high = np.percentile(draws, [2.5, 97.5])
        middle = np.median(times, axis=0) * 1e3
        result.append(Latency(batch, *map(float, (middle[0], middle[1], np.median(ratios), low, high))))
    return result


def check_agreement(session: Session, inputs: Arrays, limits: Limits) -> str | None:
    """Why the outputs of the same rows differ with the batch size, or None. One runtime kept 98.6 % of a model's
    accuracy at batch 32 and 20 % at batch 256, with the same int8 file."""
    count = len(next(iter(inputs.values())))
    alone = _together(session, inputs, 1)
    for batch in limits.batches:
        together = _together(session, inputs, batch)
        expected = {name: value[np.arange(-(-count // batch) * batch) % count] for name, value in alone.items()}
        for name, value in together.items():
            if value.shape != expected[name].shape:
                return (
                    f"output {name!r} has shape {value.shape} for batches of {batch}, expected {expected[name].shape}"
                )
        gap = float(np.max([np.abs(expected[name] - value).max() for name, value in together.items()]))
        if not gap <= limits.agreement:  # NaN must not pass, which is why this is not Python's max
            return f"outputs at batch {batch} differ from those at batch 1 by {gap:.2g}, {limits.agreement:g} allowed"
    return None


def tiled(inputs: Mapping[str, npt.NDArray[Any]], batch: int) -> Arrays:
    """(batch, ...) rows, repeated as often as needed."""
    count = len(next(iter(inputs.values())))
    if count == 0:
        raise EdgekitError("no rows to measure latency on; the data file is empty")
    rows = np.arange(batch) % count
    return {name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()}


def _together(session: Session, inputs: Arrays, batch: int) -> Arrays:
    """Outputs of every row, computed in batches of this size; the last batch is filled up with the first rows again."""
    count = len(next(iter(inputs.values())))
    rows = tiled(inputs, -(-count // batch) * batch)
    parts = [
        session.run({name: array[start : start + batch] for name, array in rows.items()})
        for start in range(0, len(next(iter(rows.values()))), batch)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _thread_seconds(session: Session, rows: Arrays) -> float:
    start = time.thread_time()
    session.run(rows)
    return time.thread_time() - start
