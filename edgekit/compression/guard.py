"""The guard measures a candidate before and after a pass. It keeps the pass only if the objective improved and nothing
else got worse than the limits allow.

Latency is the CPU time of one thread on the real runtime. The calls before and after are made in turns in one run,
because machines are shared and their clocks change; the ratio's interval is a bootstrap over the pairs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.bundle.tensors import Arrays
from edgekit.compression.metrics import Measurement
from edgekit.cost.timing import GRAIN, in_turns, ratio_interval, thread_seconds
from edgekit.errors import EdgekitError, unknown
from edgekit.session import Session


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a pass may lose and how much it must gain."""

    max_loss: float = 0.01  # in the metric's unit, against the model before compression
    max_slowdown: float = 0.05  # relative, at any batch size: two measurements of one model may differ by this much
    min_gain: float = 0.01  # relative, in bytes or in latency: a smaller gain does not justify a pass
    batches: tuple[int, ...] = (1, 16, 256)  # the guard measures latency and compares outputs at these sizes
    agreement: float = 1e-4  # the guard measures quality again only if an output differs more between batch sizes
    objective: Literal["any", "size", "latency"] = "any"  # what a pass must gain

    def __post_init__(self) -> None:
        if self.objective not in ("any", "size", "latency"):
            raise unknown("objective", self.objective, ("any", "size", "latency"))
        if not self.batches or any(batch < 1 for batch in self.batches):
            raise EdgekitError(f"batch sizes {self.batches}: expected one or more, each at least 1")


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency at one batch size: median CPU milliseconds before and after, their ratio (after / before) and its 95 %
    interval; against_best: the ratio to the best float32 form of the original, with the lower end of its interval, if
    that was measured."""

    batch: int
    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    against_best: float | None = None
    against_best_low: float | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """A runtime at one batch size. gap: the largest difference of an output from its expected value; worse: the loss of
    quality in the metric's unit, None if the gap is small enough; problem: the reason why the model must not ship, or
    None."""

    runtime: str
    batch: int
    gap: float
    worse: float | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """The measured properties of a candidate. bytes: the size of its packed file, which is really written."""

    quality: Measurement
    bytes: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision about a pass. useless: the pass lost nothing and gained nothing."""

    kept: bool
    reason: str
    useless: bool = False


def judge(before: State, after: State, loss: Measurement, latency: Sequence[Latency], limits: Limits) -> Verdict:
    """Decide whether to keep a pass. `loss`: the metric's change against the original model, paired on the same
    samples."""
    if not np.isfinite([after.quality.value, loss.value]).all():
        return Verdict(False, f"the metric is {after.quality.value}, not a number: nothing can be said for the result")
    if loss.value > limits.max_loss:
        return Verdict(
            False,
            f"costs {loss.value:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}] in quality against the original, "
            f"{limits.max_loss:g} allowed (n = {loss.samples:,})",
        )
    # A busy machine moves a ratio. So a pass is rejected only if the median ratio exceeds the limit and the lower bound
    # of its interval exceeds half of it.
    most, surely = 1 + limits.max_slowdown, 1 + limits.max_slowdown / 2
    slow = [item for item in latency if item.ratio > most and item.low > surely]
    if slow:
        worst = max(slow, key=lambda item: item.ratio)
        return Verdict(
            False,
            f"slower at batch {worst.batch}: {worst.ratio:.2f} times the time [{worst.low:.2f}, {worst.high:.2f}]"
            f", {most:.2f} allowed",
        )
    behind = [item for item in latency if (item.against_best or 0.0) > most and (item.against_best_low or 0.0) > surely]
    if behind:
        worst = max(behind, key=lambda item: item.against_best or 0.0)
        return Verdict(
            False,
            f"at batch {worst.batch} {worst.against_best:.2f} times the time of the original's best float32 form, "
            f"{most:.2f} allowed",
        )
    smaller = limits.objective != "latency" and after.bytes <= before.bytes * (1 - limits.min_gain)
    faster = [item for item in latency if limits.objective != "size" and item.high < 1 - limits.min_gain]
    gains = [f"{before.bytes / after.bytes:.2f} times smaller"] if smaller else []
    gains += [f"{1 / item.ratio:.2f} times faster at batch {item.batch}" for item in faster]
    if not gains:
        return Verdict(
            False,
            f"gains nothing: {before.bytes:,} to {after.bytes:,} bytes, and no faster at any batch size"
            + (f" (objective: {limits.objective})" if limits.objective != "any" else ""),
            useless=True,
        )
    return Verdict(True, ", ".join(gains))


def compare_latency(
    before: Session,
    after: Session,
    inputs: Arrays,
    batches: Sequence[int],
    *,
    best: Session | None = None,
    seconds: float = 1.5,
    seed: int = 0,
) -> list[Latency]:
    """Time the sessions in turns, at each batch size for about `seconds`. `best`: a session of the original in
    float32."""
    result = []
    for batch in batches:
        times = time_in_turns([before, after] + ([best] if best else []), inputs, batch, seconds=seconds)
        middle = np.median(times, axis=0) * 1e3
        ratio, low, high = ratio_interval(times[:, 0], times[:, 1], seed)
        against, lower, _ = ratio_interval(times[:, 2], times[:, 1], seed) if best else (None, None, None)
        result.append(Latency(batch, float(middle[0]), float(middle[1]), ratio, low, high, against, lower))
    return result


def time_in_turns(
    sessions: Sequence[Session], inputs: Arrays, batch: int, *, seconds: float = 1.5
) -> npt.NDArray[np.float64]:
    """Return (rounds, sessions) CPU seconds of a call. The sessions run in turns for about `seconds`."""
    rows = tiled(inputs, batch)
    for session in sessions:
        session.warmup(batch)
    calls = [functools.partial(_timed, session, rows) for session in sessions]
    return np.maximum(in_turns(calls, seconds=seconds, warmup=1)[:, :, 0], GRAIN)


def compare_batches(
    session: Session,
    inputs: Mapping[str, npt.NDArray[Any]],
    limits: Limits,
    change: Callable[[Arrays, Arrays, npt.NDArray[np.integer]], float] | None = None,
    *,
    runtime: str,
    elsewhere: tuple[str, Arrays] | None = None,
) -> list[Agreement]:
    """Compare the outputs of the same rows at each batch size with those at batch 1, up to the first batch size that
    has a problem. One runtime kept 98.6 % of a model's accuracy at batch 32 and 20 % at batch 256, with the same int8
    file.

    change: returns how much worse the second outputs of these rows are than the first, in the metric's unit. With it,
    outputs may differ if the quality does not, because dynamic quantization takes its scale from the whole batch.
    elsewhere: a runtime and its outputs of each row, which replace those at batch 1.
    """
    count = len(next(iter(inputs.values())))
    where, alone = elsewhere or (runtime, rows_together(session, inputs, 1))
    found: list[Agreement] = []
    for batch in limits.batches:
        together = alone if elsewhere is None and batch == 1 else rows_together(session, inputs, batch)
        rows = np.arange(-(-count // batch) * batch) % count
        expected = {name: value[rows] for name, value in alone.items()}
        found.append(_agreement(expected, together, rows, batch, limits, change, runtime, where))
        if found[-1].problem:
            break
    return found


def _agreement(
    expected: Arrays,
    together: Arrays,
    rows: npt.NDArray[np.integer],
    batch: int,
    limits: Limits,
    change: Callable[[Arrays, Arrays, npt.NDArray[np.integer]], float] | None,
    runtime: str,
    where: str,
) -> Agreement:
    for name, value in expected.items():
        if name not in together or together[name].shape != value.shape:
            shape = together[name].shape if name in together else None
            problem = f"on {runtime} output {name!r} has shape {shape} for batches of {batch}, expected {value.shape}"
            return Agreement(runtime, batch, math.inf, None, problem)
    gap = float(
        np.max([np.abs(value - together[name].astype(np.float64)).max(initial=0) for name, value in expected.items()])
    )
    if gap <= limits.agreement:
        return Agreement(runtime, batch, gap)
    if change is None or not np.isfinite(gap):  # NaN must not pass
        problem = (
            f"on {runtime} outputs at batch {batch} differ from those on {where} at batch 1 by {gap:.2g}, "
            f"{limits.agreement:g} allowed"
        )
        return Agreement(runtime, batch, gap, None, problem)
    try:
        worse = change(expected, together, rows)
    except EdgekitError as error:  # such as outputs that are not probabilities
        return Agreement(runtime, batch, gap, None, f"on {runtime} at batch {batch}: {error}")
    problem = (
        f"quality depends on runtime and batch size: on {runtime} at batch {batch} it is worse by {worse:.4f} than on "
        f"{where} at batch 1, {limits.max_loss:g} allowed"
    )
    return Agreement(runtime, batch, gap, worse, None if worse <= limits.max_loss else problem)


def tiled(inputs: Mapping[str, npt.NDArray[Any]], batch: int) -> Arrays:
    """Return (batch, ...) rows, repeated as often as needed."""
    count = len(next(iter(inputs.values())))
    if count == 0:
        raise EdgekitError("there are no rows to measure latency on; the data file is empty")
    rows = np.arange(batch) % count
    return {name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()}


def rows_together(session: Session, inputs: Mapping[str, npt.NDArray[Any]], batch: int) -> Arrays:
    """Return the outputs of every row, computed in batches of this size. The last batch is filled with the first
    rows."""
    count = len(next(iter(inputs.values())))
    rows = tiled(inputs, -(-count // batch) * batch)
    parts = [
        session.run({name: array[start : start + batch] for name, array in rows.items()})
        for start in range(0, len(next(iter(rows.values()))), batch)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _timed(session: Session, rows: Arrays) -> tuple[float, ...]:
    return (_thread_seconds(session, rows),)


def _thread_seconds(session: Session, rows: Arrays) -> float:
    return thread_seconds(lambda: session.run(rows))
