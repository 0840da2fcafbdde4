"""Rows that a caller holds in memory, as named arrays: NumPy arrays, a Dataset, or torch's loaders and data sets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.tensors import Arrays
from edgekit.data.dataset import TEST, TRAIN, Dataset
from edgekit.errors import EdgekitError

HELD_OUT = 0.25  # of the rows, if nobody says which are test rows
ROWS = 256  # of a torch data set at a time
EXPECTED = (
    "(inputs, labels), a mapping of arrays by name, a Dataset, a torch DataLoader or Dataset of (inputs, labels), or "
    "a pair (training, test) of these"
)


def named_arrays(
    data: Any, names: Sequence[str] = (), *, seed: int = 0, notify: Callable[[str], None] = lambda message: None
) -> Arrays:
    """Return the inputs by name, `labels` if there are any, and `split` (0 = training, 1 = test).

    names: of the model's inputs, in its order; without them, the inputs are called `input`, or input_1, input_2, ...
    float64 becomes float32. If the data does not say which rows are test rows, a quarter of them is held out, drawn
    with `seed`, and `notify` is told so. Raises EdgekitError for data of another form."""
    if _is_pair_of_parts(data):
        parts = [_rows(part, names) for part in data]
        if set(parts[0]) != set(parts[1]):
            raise EdgekitError(f"training rows hold {', '.join(parts[0])}, test rows {', '.join(parts[1])}")
        found = {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}
        found["split"] = np.repeat([TRAIN, TEST], [_count(part) for part in parts])
        return found
    found = _rows(data, names)
    if "split" not in found:
        count = _count(found)
        held_out = max(1, round(HELD_OUT * count))
        found["split"] = np.full(count, TRAIN)
        found["split"][np.random.default_rng(seed).permutation(count)[:held_out]] = TEST
        notify(f"no test rows were given: {held_out} of {count} rows are held out as test rows, seed {seed}")
    return found


def _is_pair_of_parts(data: Any) -> bool:
    """Return whether these are training and test rows, and not the inputs and the labels of one part."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and not (data[1] is None or _is_array(data[1]))


def _rows(data: Any, names: Sequence[str]) -> Arrays:
    """Return the arrays of one part, by name."""
    if isinstance(data, Dataset):
        return {**data.inputs, "labels": data.labels}
    if isinstance(data, Mapping):
        return {str(name): _array(str(name), value) for name, value in data.items()}
    if _is_array(data):
        return _inputs(data, names)
    if isinstance(data, (tuple, list)) and len(data) == 2 and (data[1] is None or _is_array(data[1])):
        labels = {} if data[1] is None else {"labels": _array("labels", data[1])}
        return _inputs(data[0], names) | labels
    if (batches := _torch_batches(data)) is not None:
        return _collected(batches, names)
    raise EdgekitError(f"data of the type {type(data).__name__}; expected {EXPECTED}")


def _inputs(given: Any, names: Sequence[str]) -> Arrays:
    """Return the inputs by name. given: one array, several in the model's order, or a mapping."""
    if isinstance(given, Mapping):
        return {str(name): _array(str(name), value) for name, value in given.items()}
    several = list(given) if isinstance(given, (tuple, list)) else [given]
    own = list(names) or (["input"] if len(several) == 1 else [f"input_{n}" for n in range(1, len(several) + 1)])
    if len(own) != len(several):
        raise EdgekitError(f"the data has {len(several)} inputs; the model takes {len(own)}: {', '.join(own)}")
    return {name: _array(name, value) for name, value in zip(own, several, strict=True)}


def _torch_batches(data: Any) -> Iterable[Any] | None:
    """Return the batches of a torch DataLoader or Dataset; None for anything else. It imports nothing: without torch in
    the process, the data cannot be torch's."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if isinstance(data, torch.utils.data.DataLoader):
        loader: Iterable[Any] = data
        return loader
    if isinstance(data, torch.utils.data.Dataset):
        batches: Iterable[Any] = torch.utils.data.DataLoader(data, batch_size=ROWS)
        return batches
    return None


def _collected(batches: Iterable[Any], names: Sequence[str]) -> Arrays:
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    for batch in batches:
        if isinstance(batch, Mapping):
            rows = _rows(batch, names)
        elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
            inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
            rows = _inputs(inputs, names) | {"labels": _array("labels", batch[-1])}
        else:
            raise EdgekitError(f"the torch data gives a {type(batch).__name__}; expected batches of (inputs, labels)")
        for name, value in rows.items():
            columns.setdefault(name, []).append(value)
    if not columns:
        raise EdgekitError("the torch data gives no batch; it must hold rows")
    return {name: _joined(name, parts) for name, parts in columns.items()}


def _joined(name: str, parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    try:
        return np.concatenate(parts)
    except ValueError as error:
        raise EdgekitError(f"{name}: rows differ in shape: {error}") from None


def _is_array(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor))


def _array(name: str, value: Any) -> npt.NDArray[Any]:
    try:
        array = np.asarray(value.detach().cpu() if _is_array(value) and not isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError) as error:  # rows of several lengths, or torch's bfloat16, which numpy lacks
        raise EdgekitError(f"{name}: a {type(value).__name__} is not an array that numpy can hold: {error}") from None
    if array.dtype.kind not in "fiub" or array.ndim == 0:
        raise EdgekitError(f"{name}: a {type(value).__name__} of dtype {array.dtype}; expected an array of numbers")
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _count(arrays: Arrays) -> int:
    if not arrays:
        raise EdgekitError(f"the data holds no array; expected {EXPECTED}")
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise EdgekitError(f"the arrays differ in their number of rows: {counts}")
    return next(iter(counts.values()))
