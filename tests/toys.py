"""Small bundles with random weights, assembled in memory."""

import numpy as np
import torch

from edgekit.bundle.encoding import Affine, Encoding, Palette
from edgekit.bundle.family import build
from edgekit.bundle.format import Bundle, Manifest, assemble
from edgekit.bundle.tensors import TensorSpec, golden_inputs

CLASSES = 5


def encoded(weight: np.ndarray, kind: str) -> Encoding:
    if kind == "palette":
        palette = np.linspace(weight.min(), weight.max(), 16, dtype=np.float32)
        return Palette(4, np.abs(weight[..., None] - palette).argmin(-1).astype(np.uint8), palette)
    largest = np.abs(weight).max(axis=1, keepdims=True) if kind == "affine rows" else np.abs(weight).max(keepdims=True)
    scale = (largest / 127).astype(np.float32)
    return Affine(8, np.round(weight / scale).astype(np.int8), scale)


def toy_bundle(kind: str | None = None, *, output: str = "probabilities", rows: int = 6, **arguments: int) -> Bundle:
    """A t2 of 12 steps and two bands; every matrix encoded as `kind` says."""
    arguments = {"bands": 2, "classes": CLASSES, "sequence": 12, "embed_dim": 16, "heads": 8, "ff_dim": 64} | arguments
    torch.manual_seed(0)
    weights = {name: value.numpy() for name, value in build("t2", arguments).state_dict().items()}
    # outputs that vary with every layer: else no check could tell a damaged model
    weights["classifier.weight"] *= 10
    weights |= {name: 6 * value for name, value in weights.items() if name.endswith("query.weight")}
    encodings = {name: encoded(value, kind) for name, value in weights.items() if kind and value.ndim == 2}
    weights |= {name: encoding.decode() for name, encoding in encodings.items()}
    inputs = [TensorSpec("light_curve", ("batch", arguments["sequence"], arguments["bands"]))]
    if context := arguments.get("context"):
        inputs.append(TensorSpec("context", ("batch", context)))
    golden = golden_inputs(tuple(inputs), rows)
    with torch.inference_mode():
        logits = build("t2", arguments, weights)(*(torch.from_numpy(golden[spec.name]) for spec in inputs))
    expected = torch.softmax(logits, dim=-1) if output == "probabilities" else logits
    outputs = (TensorSpec(output, ("batch", arguments["classes"])),)
    manifest = Manifest("toy", "t2", arguments, tuple(inputs), outputs)
    return assemble(manifest, weights, encodings, (golden, {output: expected.numpy()}))
