"""What every exporter shares: the identity of what it exports, and directories of files that appear whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.bundle import GRAPH, WEIGHTS, Bundle
from edgekit.errors import EdgekitError
from edgekit.files import write_directory

MANIFEST = "manifest.json"
KEY = "edgekit.model"  # metadata entry that holds model_key: a session cannot be handed another model's file


def model_key(bundle: Bundle) -> str:
    """SHA-256 of what an export computes: architecture, weights, inputs and outputs; not metrics, records or names."""
    manifest = bundle.manifest
    identity = {
        "family": manifest.family,
        "arguments": manifest.arguments,
        "inputs": [asdict(spec) for spec in manifest.inputs],
        "outputs": [asdict(spec) for spec in manifest.outputs],
        "bits": manifest.bits,
        "weights": hashlib.sha256(bundle.contents[GRAPH if bundle.is_graph else WEIGHTS]).hexdigest(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Export:
    """What an exporter wrote, and how it was proved. checks: one record per file and batch size."""

    directory: Path
    files: dict[str, int]  # bytes
    manifest: dict[str, Any]
    checks: list[dict[str, Any]]


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
