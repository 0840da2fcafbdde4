"""Code that all importers share: golden rows, and the error for pickles.

edgekit never reads a pickle: unpickling runs any code that the file's author put in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgekit.bundle.tensors import Arrays, TensorSpec, golden_inputs
from edgekit.errors import EdgekitError
from edgekit.session import check_inputs

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib")
GOLDEN_ROWS = 8


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


def golden_rows(specs: Sequence[TensorSpec], given: Arrays | None) -> Arrays:
    if given is None:
        return golden_inputs(tuple(specs), GOLDEN_ROWS)
    rows = {spec.name: given[spec.name][:GOLDEN_ROWS] for spec in specs if spec.name in given}
    check_inputs(specs, rows)
    return rows
