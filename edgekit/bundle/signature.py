"""Translate between rows and a model's own calls.

In edgekit, the first axis of every array is the row: of golden data, data sets, sessions and metrics. A model may have
its batch elsewhere, a fixed one, or none. `TensorSpec.axes` names the axes of its own tensors, and a `Signature` calls
it with rows:

    input                own axes                 rows
    image                (batch, 3, h, w)         (batch, 3, h, w)      as it is
    state                (2, batch, 128)          (batch, 2, 128)       the batch moves to the front
    sampling rate        ()                       (batch,)              all rows of a call have the same value
    frames, one a call   (frames, 576)            (batch, frames, 576)  a row is a call

rows_per_call: the number of rows that each call takes, if the graph fixes it; a last call with fewer rows is filled up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError

Array = npt.NDArray[Any]
# run(output names, inputs by name) -> outputs in that order: the method of ONNX Runtime's sessions
Call = Callable[[Sequence[str], Mapping[str, Array]], Sequence[Array]]


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a model by name, and how many rows a call takes; None for any number."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    rows_per_call: int | None = None

    @classmethod
    def of(
        cls, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], rows_per_call: int | None = None
    ) -> Signature:
        return cls({spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs}, rows_per_call)

    @property
    def plain(self) -> bool:
        """Return whether rows are calls as they are."""
        specs = (*self.inputs.values(), *self.outputs.values())
        return self.rows_per_call is None and all(spec.axes is None for spec in specs)

    def run(self, call: Call, names: Sequence[str], arrays: Mapping[str, Array]) -> list[Array]:
        """Return the named outputs of at least one row. Arrays that are no inputs, such as replaced weights, go to
        every call as they are."""
        if self.plain:
            return list(call(names, arrays))
        parts = [self._once(call, names, arrays, rows) for rows in self._calls(arrays)]
        return parts[0] if len(parts) == 1 else [np.concatenate(columns) for columns in zip(*parts, strict=True)]

    def wrapped(self, session: Any) -> Any:
        """Return an object whose method `run` takes rows, around one whose method takes the model's own tensors."""
        return session if self.plain else _Rows(self, session.run)

    def own(self, arrays: Mapping[str, Array]) -> Arrays:
        """Return rows as the tensors of one call."""
        return {name: self.inputs[name].own(array) if name in self.inputs else array for name, array in arrays.items()}

    def feeds(self, arrays: Mapping[str, Array]) -> Iterator[Arrays]:
        """Yield the model's own tensors, call by call."""
        if self.plain:
            yield dict(arrays)
            return
        for rows in self._calls(arrays):
            yield self._fed(arrays, rows)

    def _fed(self, arrays: Mapping[str, Array], rows: slice) -> Arrays:
        index = np.arange(rows.start, rows.stop)
        if self.rows_per_call is not None:  # a last call with fewer rows repeats them
            index = index[np.arange(self.rows_per_call) % len(index)]
        return self.own({name: array[index] if name in self.inputs else array for name, array in arrays.items()})

    def _once(self, call: Call, names: Sequence[str], arrays: Mapping[str, Array], rows: slice) -> list[Array]:
        found, count = call(names, self._fed(arrays, rows)), rows.stop - rows.start
        rows_of = {name: self.outputs[name].rows(array) for name, array in zip(names, found, strict=True)}
        for name, array in rows_of.items():
            if len(array) != (self.rows_per_call or count):
                raise EdgekitError(
                    f"output {name!r} has {len(array)} rows for {count}; its axes are not "
                    f"{self.outputs[name].axes_text}"
                )
        return [array[:count] for array in rows_of.values()]

    def _calls(self, arrays: Mapping[str, Array]) -> Iterator[slice]:
        """Cut the rows where a call ends: after `rows_per_call`, or where an input that the rows share changes."""
        count = len(next(array for name, array in arrays.items() if name in self.inputs))
        if self.rows_per_call is not None:
            ends = list(range(self.rows_per_call, count, self.rows_per_call))
        else:
            shared = [array for name, array in arrays.items() if name in self.inputs and self.inputs[name].shared]
            ends = [
                row
                for row in range(1, count)
                if any(not np.array_equal(array[row - 1], array[row]) for array in shared)
            ]
        yield from (slice(start, stop) for start, stop in pairwise([0, *ends, count]))


@dataclass(frozen=True, slots=True)
class _Rows:
    signature: Signature
    call: Call

    def run(self, names: Sequence[str], arrays: Mapping[str, Array]) -> list[Array]:
        return self.signature.run(self.call, names, arrays)
