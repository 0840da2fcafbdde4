"""Code that all importers share: golden rows, JSON files, and the error for pickles.

edgekit never reads a pickle: unpickling runs any code that the file's author put in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.bounded import LARGEST_TEXT, read_file
from edgekit.bundle.synthetic import candidates
from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError
from edgekit.session import check_inputs

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib")
GOLDEN_ROWS = 8
CARRIED = 2  # calls that lead to a state of golden rows


def unsafe(path: Path) -> EdgekitError:
    """Return the error that says why edgekit does not read a model file with this suffix."""
    if path.suffix in PICKLES:
        return EdgekitError(
            f"{path}: a {path.suffix} file is a pickle, which runs its author's code when it is read; save the weights "
            "as safetensors (safetensors.torch.save_model) or the model as .onnx or .pt2 (torch.export.save)"
        )
    if path.suffix == ".safetensors":
        return EdgekitError(
            f"{path}: a .safetensors file holds weights and no network; name the function that builds the network: "
            f"edgekit import package.module:function --weights {path}"
        )
    return EdgekitError(
        f"{path}: not a model that edgekit reads; expected .onnx, .pt2, a bundle or package.module:function"
    )


def golden_rows(specs: Sequence[TensorSpec], given: Arrays) -> Arrays:
    """Return the first rows of the arrays that the model takes."""
    rows = {spec.name: given[spec.name][:GOLDEN_ROWS] for spec in specs if spec.name in given}
    check_inputs(specs, rows)
    return rows


def synthetic_rows(
    specs: Sequence[TensorSpec],
    vocabularies: Mapping[str, int],
    run: Callable[[Arrays], Arrays],
    state: Collection[str] = (),
    compared: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Arrays, Arrays]:
    """Return synthetic golden inputs, and the outputs that `run` gives for them: the first proposal on which the model
    runs with finite outputs. Inputs of the state are zero. compared: whole numbers with which the graph compares an
    input, which are its only meaningful values. Raises the error of the last proposal if the model runs on none."""
    proposals = list(candidates(specs, GOLDEN_ROWS, vocabularies))
    ran: tuple[Arrays, Arrays] | None = None
    for inputs in proposals:
        for name in state:
            inputs[name] = np.zeros_like(inputs[name])
        for name, numbers in (compared or {}).items():
            inputs[name] = np.full_like(inputs[name], numbers[0])
        try:
            outputs = run(inputs)
        except EdgekitError:
            if inputs is proposals[-1] and ran is None:
                raise
            continue
        ran = inputs, outputs
        if all(np.isfinite(array).all() for array in outputs.values()):
            break
    assert ran is not None
    return ran


def carried(run: Callable[[Arrays], Arrays], inputs: Arrays, state: Mapping[str, str]) -> Arrays:
    """Return the inputs with states that the model really reaches: of every second row after CARRIED calls, of the
    others before the first call."""
    if not state:
        return inputs
    now = dict(inputs)
    for _ in range(CARRIED):
        outputs = run(now)
        now |= {name: outputs[source] for name, source in state.items()}
    return {**inputs, **{name: _every_second(inputs[name], now[name]) for name in state}}


def _every_second(first: npt.NDArray[Any], later: npt.NDArray[Any]) -> npt.NDArray[Any]:
    rows = (np.arange(len(first)) % 2 == 1).reshape(-1, *(1,) * (first.ndim - 1))
    return np.asarray(np.where(rows, later, first))


def read_json(path: Path, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Return the JSON object in a file of up to `largest` bytes."""
    values = json_value(path, largest)
    if not isinstance(values, dict):
        raise EdgekitError(f"{path}: expected a JSON object")
    return values


def json_value(path: Path, largest: int = LARGEST_TEXT) -> Any:
    """Return the value that a JSON file of up to `largest` bytes holds."""
    try:
        values = json.loads(read_file(path, largest=largest))
        json.dumps(values, allow_nan=False)  # Python reads NaN and infinities, which JSON does not have
    except (OSError, ValueError, RecursionError) as error:
        raise EdgekitError(
            f"{path}: cannot be read as JSON ({error}); expected a folder that transformers saved"
        ) from None
    return values
