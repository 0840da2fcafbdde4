"""The protocol of every runtime: named arrays in, named arrays out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

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
