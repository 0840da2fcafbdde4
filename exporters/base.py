"""What every exporter shares: the identity of what it exports, and directories of files that appear whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.bundle.files import write_directory
from edgekit.bundle.format import KEY, Bundle, model_key
from edgekit.bundle.tensors import multiple
from edgekit.errors import EdgekitError

MANIFEST = "manifest.json"


def described(bundle: Bundle) -> dict[str, Any]:
    """What every manifest says of the model. axes: those of any length, where they are, and what the length must be a
    multiple of."""
    axes: dict[str, dict[str, Any]] = {}
    for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs):
        for number, axis in enumerate(spec.shape):
            if isinstance(axis, str):
                entry = axes.setdefault(axis, {"multiple_of": multiple(axis), "at": {}})
                entry["at"].setdefault(spec.name, []).append(number)
    return {
        "model": bundle.manifest.name,
        "bundle": bundle.digest,
        KEY: model_key(bundle),
        "inputs": {spec.name: {"shape": spec.shape, "dtype": spec.dtype} for spec in bundle.manifest.inputs},
        "outputs": {spec.name: {"shape": spec.shape, "dtype": spec.dtype} for spec in bundle.manifest.outputs},
        "axes": axes,
        "state": bundle.manifest.state,
        "classes": bundle.manifest.classes,
        "preprocessing": bundle.manifest.preprocessing,
    }


def hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def check_destination(directory: Path, *, force: bool) -> None:
    """Raise if `publish` would refuse: asked before the work, so that minutes of it are not thrown away."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not force:
        raise EdgekitError(f"{directory} already exists; choose another directory or pass --force to replace it")
    if not (directory / MANIFEST).is_file():
        raise EdgekitError(
            f"{directory} exists and is not an export (it holds no {MANIFEST}), so --force will not replace it; "
            "choose another directory"
        )


def publish(files: Mapping[str, bytes], directory: Path, *, force: bool) -> None:
    """Write the files beside the directory and move them into place in one step: a reader sees all of them or none."""
    check_destination(directory, force=force)
    write_directory(directory, files)
