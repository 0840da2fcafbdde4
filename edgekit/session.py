"""The contracts of what runs on a device: a session turns named arrays into named arrays, and a job shares the device
with other jobs, one step at a time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgekit import plugins
from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError, unknown

ATTRIBUTES, METHODS = ("inputs", "outputs", "device", "provider"), ("run", "warmup")  # of the protocol


class Session(Protocol):
    """A model loaded on a device. The first axis of every array is the batch."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    device: str  # the one in use: "cpu (2 threads)"
    provider: str  # the one in use: "CPUExecutionProvider"

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return outputs by name, in the order of the inputs' rows."""
        ...

    def warmup(self, batch: int) -> None:
        """Run once at this batch size, so that the next run of that size includes no set-up."""
        ...


class Priority(IntEnum):
    """The class of a job's work. A device runs the class with the smaller number first."""

    REAL_TIME = 0  # it has a deadline
    INTERACTIVE = 1  # somebody waits for it
    BATCH = 2  # it may be done later


@dataclass(frozen=True, slots=True)
class NextStep:
    """What a job would run next. seconds: how long it will take, as predicted; deadline: the time of the arbiter's
    clock by which real-time work must have ended."""

    priority: Priority
    seconds: float
    deadline: float = math.inf


@runtime_checkable
class Job(Protocol):
    """What shares a device with other jobs. An arbiter calls `next_step` and `run` from one thread; `slack` and
    `backlog` may be called from any thread. Work is given to a job by methods of its own."""

    name: str

    def next_step(self, *, batch: bool) -> NextStep | None:
        """Return what the job would run now, or None if it has no work. batch: whether work of the class batch may be
        part of it; the arbiter holds that class back while the device is overloaded."""
        ...

    def run(self, between: Callable[[], None]) -> None:
        """Run the step that `next_step` has just returned. A job whose step can pause calls `between` wherever it can;
        the arbiter runs more urgent jobs there. A step that never calls `between` is finished before other work runs.
        An error of one request goes to that request; an error that is raised here ends the job."""
        ...

    def slack(self) -> float:
        """Return for how many seconds from now on the device may be busy with other work before this job misses a
        deadline, also one of work that comes meanwhile; infinity for a job without deadlines."""
        ...

    def backlog(self) -> float:
        """Return the predicted seconds of interactive work that a new request would wait for."""
        ...


def check_inputs(specs: Sequence[TensorSpec], arrays: Mapping[str, npt.NDArray[Any]]) -> int:
    """Return the batch size. Raises unless the arrays are the inputs, all of one batch size and all finite."""
    for name in arrays:
        if name not in [spec.name for spec in specs]:
            raise unknown("input", name, [spec.name for spec in specs])
    for spec in specs:
        if spec.name not in arrays:
            raise EdgekitError(f"input {spec.name!r} is missing; the model takes {', '.join(s.name for s in specs)}")
        spec.check(arrays[spec.name])
        if not np.isfinite(arrays[spec.name]).all():
            raise EdgekitError(f"input {spec.name!r} holds NaN or infinite values; clean it before running the model")
    sizes = {spec.name: len(arrays[spec.name]) for spec in specs}
    if len(set(sizes.values())) != 1:
        raise EdgekitError(f"inputs differ in batch size: {sizes}")
    return next(iter(sizes.values()))


def open_session(bundle: Bundle, runtime: str, **options: Any) -> Session:
    """Open a session on a runtime by its name ('onnxruntime', 'torch', or one that another package adds)."""
    opener = plugins.load("edgekit.sessions", runtime, problem_with)
    session: Session = opener(bundle, **options)
    if missing := [name for name in (*ATTRIBUTES, *METHODS) if not hasattr(session, name)]:
        raise plugins.refused("edgekit.sessions", runtime, f"the session that it opens has no {missing[0]!r}")
    return session


def run_in_batches(
    session: Session,
    arrays: Mapping[str, npt.NDArray[Any]],
    batch: int,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> Arrays:
    """Return the outputs of any number of rows by name, computed `batch` rows at a time; empty outputs for no rows."""
    rows = check_inputs(session.inputs, arrays)
    parts = []
    for start in range(0, max(rows, 1), batch):  # once even for no rows
        parts.append(session.run({name: array[start : start + batch] for name, array in arrays.items()}))
        progress(min(start + batch, rows), rows)
    return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in session.outputs}


def problem_with(opener: Any, name: str) -> str:
    """Return why an object cannot open a session; "" if it can. It must be a class with `run` and `warmup`, or a
    function that returns a session, and must take (bundle, *, threads, chunk)."""
    if not callable(opener):
        return f"it is a {type(opener).__name__}, which opens nothing"
    if isinstance(opener, type) and (
        missing := [item for item in METHODS if not callable(getattr(opener, item, None))]
    ):
        return f"it has no method {missing[0]!r}"
    try:
        inspect.signature(opener).bind(None, threads=1, chunk=1)
    except TypeError as error:
        return f"it is called with (bundle, threads=..., chunk=...), and {error}"
    return ""
