"""Feed a sequence to a model with a state, chunk by chunk: the caller hands each call's state to the next call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError
from edgekit.session import Session


class Stream:
    """The state of some sequences, one a row, and the session that moves it on.

    state: input -> output that becomes this input of the next call. It is zero before the first call, unless the first
    call is given one.
    """

    def __init__(self, session: Session, state: Mapping[str, str]) -> None:
        if not state:
            raise EdgekitError(
                "the model has no state, so it needs no stream; if it has one, import it with --state INPUT=OUTPUT"
            )
        self._session, self._pairs = session, dict(state)
        self.state: Arrays = {}

    def feed(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return the outputs of the next chunk by name, without those of the state. arrays: the other inputs, (rows,
        ...) each."""
        if not self.state:
            self.state = zero_state(self._session.inputs, arrays, self._pairs)
        found = self._session.run({**self.state, **arrays})
        self.state = {name: found[output] for name, output in self._pairs.items()}
        return {name: array for name, array in found.items() if name not in self._pairs.values()}


def zero_state(specs: Sequence[TensorSpec], given: Mapping[str, npt.NDArray[Any]], state: Collection[str]) -> Arrays:
    """Return zeros for each input of the state that is not given. Raises if the state has a free axis besides the
    batch."""
    rows = len(next(iter(given.values()), ()))
    found = {}
    for spec in specs:
        if spec.name in state and spec.name not in given:
            if free := [axis for axis in spec.shape[1:] if isinstance(axis, str)]:
                raise EdgekitError(
                    f"the state {spec.name!r} of shape {spec.shape_text} has any length of {free[0]!r}; give its first "
                    "value among the inputs"
                )
            found[spec.name] = np.zeros((rows, *map(int, spec.shape[1:])), spec.dtype)
    return found


def run_stream(
    session: Session,
    state: Mapping[str, str],
    arrays: Mapping[str, npt.NDArray[Any]],
    *,
    chunk: int | None = None,
    overlap: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Arrays:
    """Return the outputs of whole sequences, fed in chunks.

    arrays: inputs with the whole sequence, (rows, ..., length, ...), in place of a chunk; inputs without such an axis
    go to every call. chunk: the length of a chunk; not needed if the model fixes it. overlap: how many steps each chunk
    repeats of the one before. An output with the streamed axis is joined along it; any other gets an axis of chunks
    after the rows. The outputs of the state are those of the last chunk.
    """
    stream, names = Stream(session, state), set(state)
    first = {name: array for name, array in arrays.items() if name in names}
    others = {name: array for name, array in arrays.items() if name not in names}
    places, name, length = _streamed(session.inputs, others, names, chunk)
    starts = _starts(places, length, others, overlap, fixed=name is None)
    parts: list[Arrays] = []
    for done, start in enumerate(starts):
        part = {key: _cut(array, places.get(key), start, length) for key, array in others.items()}
        parts.append(stream.feed({**part, **(first if start == 0 else {})}))
        progress(done + 1, len(starts))
    joined = {}
    for spec in session.outputs:
        if spec.name not in parts[0]:
            continue
        pieces = [part[spec.name] for part in parts]
        along = spec.shape.index(name) if name in spec.shape else None
        joined[spec.name] = np.stack(pieces, axis=1) if along is None else np.concatenate(pieces, axis=along)
    return joined | {state[name]: array for name, array in stream.state.items()}


def _streamed(
    specs: Sequence[TensorSpec], arrays: Mapping[str, npt.NDArray[Any]], state: Collection[str], chunk: int | None
) -> tuple[dict[str, int], str | None, int]:
    """Return the index of the streamed axis in each input that has it, its name if it is free, and the length of a
    chunk."""
    places: dict[str, int] = {}
    name: str | None = None
    lengths = {chunk} if chunk is not None else set[int]()
    for spec in specs:
        array = arrays.get(spec.name)
        if spec.name in state or array is None or array.ndim != len(spec.shape):
            continue
        for number, axis in enumerate(spec.shape):
            longer = isinstance(axis, int) and array.shape[number] > axis and number > 0
            free = isinstance(axis, str) and number > 0 and name in (None, axis)
            if spec.name not in places and (longer or free):
                places[spec.name] = number
                lengths |= {axis} if isinstance(axis, int) else set()
                name = axis if isinstance(axis, str) else name
    if not places:
        raise EdgekitError("no input is longer than a chunk along any axis; give whole sequences, (rows, length, ...)")
    if len(lengths) != 1:
        remedy = "give --chunk LENGTH" if not lengths else "leave --chunk out, or give the model's own length"
        raise EdgekitError(f"the length of a chunk is {sorted(map(str, lengths)) or 'not known'}; {remedy}")
    return places, name, lengths.pop()


def _starts(
    places: Mapping[str, int], chunk: int, arrays: Mapping[str, npt.NDArray[Any]], overlap: int, *, fixed: bool
) -> list[int]:
    """Return where the chunks start. fixed: whether the model takes chunks of this length only."""
    totals = {name: arrays[name].shape[place] for name, place in places.items()}
    total = next(iter(totals.values()))
    if not 0 <= overlap < chunk:
        raise EdgekitError(f"overlap = {overlap}; expected 0 to {chunk - 1}, less than a chunk of {chunk}")
    if len(set(totals.values())) > 1:
        raise EdgekitError(f"the inputs differ in length: {totals}")
    if total == 0:
        raise EdgekitError("the sequences have length 0; there is nothing to run")
    if fixed and (total - overlap) % (chunk - overlap):
        longer = overlap + -(-(total - overlap) // (chunk - overlap)) * (chunk - overlap)
        raise EdgekitError(
            f"the sequences have length {total}, which chunks of {chunk} that overlap by {overlap} do not fill; pad "
            f"them to {max(longer, chunk)}"
        )
    return list(range(0, max(total - overlap, 1), chunk - overlap))


def _cut(array: npt.NDArray[Any], place: int | None, start: int, chunk: int) -> npt.NDArray[Any]:
    if place is None:
        return array
    return np.ascontiguousarray(array[(slice(None),) * place + (slice(start, start + chunk),)])
