"""Code that all exporters share: they describe the exported model, and they write a directory of files in one step."""

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
    """Return the entries about the model that every manifest holds.

    `axes` lists the axes of free length: the inputs and outputs that have the axis, and the number that the length must
    be a multiple of.
    """
    axes: dict[str, dict[str, Any]] = {}
    for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs):
        for number, axis in enumerate(spec.own_axes):
            if isinstance(axis, str):
                entry = axes.setdefault(axis, {"multiple_of": multiple(axis), "at": {}})
                entry["at"].setdefault(spec.name, []).append(number)
    return {
        "model": bundle.manifest.name,
        "bundle": bundle.digest,
        KEY: model_key(bundle),
        **tensors(bundle),
        "axes": axes,
        "state": bundle.manifest.state,
        "classes": bundle.manifest.classes,
        "preprocessing": bundle.manifest.preprocessing,
    }


def tensors(bundle: Bundle) -> dict[str, Any]:
    """Return what a manifest says of inputs and outputs: the shapes of the model's own tensors. If rows are not calls
    as they are, `rows` says for the device's check how golden rows become calls: at which index each tensor has the
    batch (null: nowhere), and how many rows a call takes (null: any number)."""
    manifest = bundle.manifest
    found: dict[str, Any] = {
        key: {spec.name: {"shape": spec.own_axes, "dtype": spec.dtype} for spec in specs}
        for key, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs))
    }
    if not manifest.signature.plain:
        specs = (*manifest.inputs, *manifest.outputs)
        batch = {spec.name: None if spec.shared else spec.own_axes.index(spec.shape[0]) for spec in specs}
        found["rows"] = {"batch": batch, "per_call": manifest.rows_per_call}
    return found


def hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def check_destination(directory: Path, *, force: bool) -> None:
    """Raise if `publish` would refuse the directory. Exporters call this first, so that no minutes of work are lost."""
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
    """Write the files to a new directory and rename it to `directory`: a reader sees all files or none."""
    check_destination(directory, force=force)
    write_directory(directory, files)
