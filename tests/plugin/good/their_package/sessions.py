"""Run a two-layer network of edgekit's `module` family, or any other, by torch's weights in chunks of rows."""

import numpy as np

from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import golden_inputs
from edgekit.session import check_inputs, open_session


class NumpySession:
    """A bundle, one chunk of rows at a time, computed by torch and put together by NumPy."""

    provider = "numpy over torch"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, chunk: int | None = None) -> None:
        self._inner = open_session(bundle, "torch", threads=threads)
        self.inputs, self.outputs, self.device = bundle.manifest.inputs, bundle.manifest.outputs, self._inner.device
        self._chunk = chunk or 16

    def run(self, arrays):
        rows = check_inputs(self.inputs, arrays)
        starts = range(0, max(rows, 1), self._chunk)
        parts = [self._inner.run({k: v[start : start + self._chunk] for k, v in arrays.items()}) for start in starts]
        return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in self.outputs}

    def warmup(self, batch: int) -> None:
        self.run(golden_inputs(tuple(self.inputs), batch))
