"""The one protocol that every runtime gives: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError, unknown


class Session(Protocol):
    """A model loaded on a device. The first axis of every array is the batch."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    device: str  # as it really is: "cpu (2 threads)"
    provider: str  # as it really is: "CPUExecutionProvider"

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Outputs by name, in the order of the inputs' rows."""
        ...

    def warmup(self, batch: int) -> None:
        """Run once at this batch size, so that the next run pays for nothing but itself."""
        ...


def check_inputs(specs: Sequence[TensorSpec], arrays: Mapping[str, npt.NDArray[Any]]) -> int:
    """Raise unless the arrays are the inputs, all of one batch size, all finite; return that size."""
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
    """A session on a runtime by name ('onnxruntime', 'torch', or one that another package adds)."""
    from edgekit.plugins import load

    session: Session = load("edgekit.sessions", runtime)(bundle, **options)
    return session
