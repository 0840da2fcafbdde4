"""Open a model that a command line or a caller names.

The name is one of the zoo's models, a bundle or a packed bundle, an ONNX file, or an exported program.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgekit.bundle import zoo
from edgekit.bundle.bounded import read_file
from edgekit.bundle.format import Bundle
from edgekit.bundle.store import default_name, open_bundle
from edgekit.bundle.tensors import Arrays
from edgekit.errors import EdgekitError, unknown
from edgekit.importers.base import PICKLES, unsafe
from edgekit.importers.onnx import from_onnx
from edgekit.importers.program import from_program


def from_file(
    path: Path,
    *,
    golden: Arrays | None = None,
    state: Mapping[str, str] | None = None,
    fix: Mapping[str, float] | None = None,
) -> Bundle:
    """Make a bundle from an .onnx or .pt2 file. state, fix: as for `from_onnx`."""
    if not path.is_file():
        raise EdgekitError(f"{path}: no such file; expected a model as .onnx or .pt2")
    if path.suffix == ".onnx":
        return from_onnx(read_file(path), default_name(path.stem), str(path), golden=golden, state=state, fix=fix)
    if path.suffix == ".pt2":
        return from_program(path, golden=golden, state=state, fix=fix)
    raise unsafe(path)


def resolve(text: str) -> Bundle:
    """Return the bundle that a command line names: a directory, a packed file, or the name of a model of the zoo."""
    if text in zoo.folders() and not Path(text).exists():
        return open_bundle(zoo.folders()[text])
    path = Path(text)
    if path.suffix in (".onnx", ".pt2", *PICKLES) and not path.is_dir():
        return from_file(path)
    if path.exists() or "/" in text or text.endswith((".edge", ".edgepack")):
        return open_bundle(text)
    if not zoo.folders():
        raise EdgekitError(f"{text!r} is not a path, and no models are installed with this edgekit; reinstall it")
    raise unknown("model", text, zoo.folders(), where="the zoo (and there is no such path)")
