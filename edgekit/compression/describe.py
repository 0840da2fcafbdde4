"""Describe a bundle in plain values: its contents, its tensors, and the bundles from which it was made."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from edgekit.bundle.encoding import Affine, Encoding, stored_bytes
from edgekit.bundle.format import GOLDEN, GRAPH, MANIFEST, WEIGHTS, Bundle
from edgekit.bundle.pack import pack
from edgekit.bundle.zoo import folders
from edgekit.compression.record import records_of
from edgekit.importers.api import open_model


def describe(bundle: Bundle) -> dict[str, Any]:
    """Return everything that the manifest says, and the sizes, as plain values."""
    manifest = asdict(bundle.manifest)
    parameters = bundle.parameters
    folder = bundle.path if bundle.path and bundle.path.is_dir() else None
    packed = bundle.path.stat().st_size if bundle.path and bundle.path.is_file() else len(pack(bundle))
    exports = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder else []
    return {
        "path": str(bundle.path) if bundle.path else None,
        "digest": bundle.digest,
        "parameters": parameters,
        "bytes": {"bundle": bundle.size, "packed": packed, "float32_weights": 4 * parameters},
        "exports": exports,
        "other_files": sorted(set(bundle.contents) - {MANIFEST, WEIGHTS, GRAPH, GOLDEN}),
        "manifest": manifest,
    }


def ancestry(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the bundles from the first ancestor to the bundle itself: the digest, the name of a zoo's model, and the
    passes that ran on it."""
    names = {open_model(name).digest: name for name in folders()}
    steps: list[dict[str, Any]] = []
    for record in records_of(bundle):
        if not steps or steps[-1]["digest"] != record.parent:
            steps.append({"digest": record.parent, "name": names.get(str(record.parent)), "passes": []})
        told = {"parameters": record.parameters, "seed": record.seed, "kept": record.kept, "reason": record.reason}
        steps[-1]["passes"].append({"pass": record.name, **told})
    if not steps and bundle.manifest.parent:
        steps.append({"digest": bundle.manifest.parent, "name": names.get(bundle.manifest.parent), "passes": []})
    return [*steps, {"digest": bundle.digest, "name": bundle.manifest.name, "passes": []}]


def tensor_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """Return a row for each tensor: name, shape, encoding, share of zeros, and bytes at the code width with scales or
    codebook."""
    if bundle.is_graph:
        return _graph_rows(bundle)
    encodings = bundle.encodings()
    return [
        {
            "name": name,
            "shape": list(value.shape),
            "encoding": _encoding(encodings.get(name)),
            "zeros": float(np.mean(value == 0)),
            "bytes": stored_bytes({name: value}, encodings),
        }
        for name, value in sorted(bundle.weights().items())
    ]


def _graph_rows(bundle: Bundle) -> list[dict[str, Any]]:
    from edgekit.bundle.onnx_file import learnt, to_array  # a bundle of weights needs no onnx

    arrays = [(tensor.name, to_array(tensor)) for tensor in learnt(bundle.graph())]
    return [
        {
            "name": name,
            "shape": list(array.shape),
            "encoding": str(array.dtype),
            "zeros": float((array == 0).mean()),
            "bytes": array.nbytes,
        }
        for name, array in sorted(arrays, key=lambda item: item[0])
    ]


def _encoding(encoding: Encoding | None) -> str:
    if encoding is None:
        return "float32"
    return f"{'affine' if isinstance(encoding, Affine) else 'palette'} {encoding.bits} bit"
