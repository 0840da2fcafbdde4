"""Export a bundle to ONNX: a small, portable, readable graph, compared with its source network.

model.onnx             float32; for a target, in the precision of its plan
model.onnx.data        its weights, if one file would be too large
model.quantized.onnx   the same network with its encoded weights stored as 8-bit codes, which the graph decodes
golden.npz             inputs, and the outputs that they must give
verify.py              checks both on the device; it needs numpy and onnxruntime only
requirements-NAME.txt  for a target: the packages to install on it, with pinned versions
manifest.json          SHA-256 of every file, opset, operators, tolerances, measured differences
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto

from edgekit import __version__
from edgekit.bundle.format import GOLDEN, Bundle
from edgekit.errors import EdgekitError
from edgekit.exporter import Export, Exporter
from edgekit.graph.external import LARGEST, files
from edgekit.graph.lower import OPSETS, float_graph, lower, quantized_graph
from edgekit.graph.model import opset as opset_of
from exporters.base import MANIFEST, check_destination, described, hashes, manifest_bytes, publish
from exporters.damage import check_golden
from exporters.target_graph import TargetGraph, deployment_target, requirements, target_graph
from exporters.verify import TOLERANCE, on_onnxruntime, verify

FLOAT, QUANTISED = "model.onnx", "model.quantized.onnx"


@dataclass(frozen=True, slots=True)
class OnnxExporter(Exporter):
    """Parameters of an ONNX export."""

    # By default 17: the first with LayerNormalization in one node, the last that TensorRT 8.6 (for a Tesla P40) reads.
    opset: int | None = None
    weights: Literal["encoded", "float32"] = "encoded"  # encoded: also write the codes that compression passes produced
    exporter: Literal["torchscript", "dynamo"] = "torchscript"  # one of torch's two; dynamo writes opset 18 or newer
    target: str = ""  # name of a device, which sets opset, operators and precision
    stack: str = ""  # name of one of the target's stacks; by default the first
    precision: str = ""  # one of the target's plan; by default the plan's first
    largest: int = LARGEST  # bytes of model.onnx; the weights of a larger model go into a second file

    def __post_init__(self) -> None:
        if self.opset is not None and self.opset not in OPSETS:
            raise EdgekitError(f"ONNX opset {self.opset} cannot be written; expected {OPSETS[0]} to {OPSETS[-1]}")
        if self.weights not in ("encoded", "float32"):
            raise EdgekitError(f"ONNX weights = {self.weights!r}; expected 'encoded' or 'float32'")
        if self.exporter not in ("torchscript", "dynamo"):
            raise EdgekitError(f"ONNX exporter = {self.exporter!r}; expected 'torchscript' or 'dynamo'")
        if (self.stack or self.precision) and not self.target:
            raise EdgekitError("ONNX: a stack or a precision is a target's; name one: `edgekit targets` lists them")

    def export(self, bundle: Bundle, directory: str | Path, *, force: bool = False) -> Export:
        """Write model, golden data, device check and manifest if ONNX Runtime's outputs agree with the network's.

        Raises, and writes nothing, if an output is beyond tolerance at any batch size.
        """
        directory = Path(directory)
        check_destination(directory, force=force)
        lowered = self.lower_for_target(bundle) if self.target else None
        models = self._models(bundle, lowered)
        graphs: dict[str, bytes] = {}
        for name, graph in models.items():
            graphs |= files(graph, name, self.largest)
        external_data = {name: content for name, content in graphs.items() if name not in models}
        tolerance = lowered.tolerance if lowered else TOLERANCE
        advice = lowered.advice if lowered else "try another --opset"
        sources = {name: graphs[name] for name in models}
        checks = verify(
            sources,
            bundle,
            tolerance=tolerance,
            load=partial(on_onnxruntime, external_data=external_data),
            graph=models[FLOAT],
            advice=advice,
        )
        device = max(check.between_batches for check in checks)
        golden = check_golden(models[FLOAT], bundle, checks[0].allowed, device)
        records = [asdict(check) for check in checks]
        check_script = (Path(__file__).parent / "device_check.py").read_bytes()
        written = {**graphs, GOLDEN: bundle.contents[GOLDEN], "verify.py": check_script}
        if lowered:
            written[f"requirements-{lowered.deployment.target.name}.txt"] = requirements(lowered.deployment)
        manifest = {
            "format": "edgekit-onnx-1",
            **described(bundle),
            **(lowered.described() if lowered else {}),
            "opset": opset_of(models[FLOAT]),
            "models": {
                name: {
                    "bytes": len(graphs[name]) + len(graphs.get(f"{name}.data", b"")),
                    "operators": sorted({node.op_type for node in graph.graph.node}),
                    "tolerance": next(check.between_batches for check in checks if check.file == name),
                }
                for name, graph in models.items()
            },
            "checks": records,
            **golden,
            "versions": {
                "edgekit": __version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                "numpy": np.__version__,
            },
            "files": hashes(written),
        }
        written[MANIFEST] = manifest_bytes(manifest)
        publish(written, directory, force=force)
        return Export(directory, {name: len(content) for name, content in written.items()}, manifest, records)

    def _models(self, bundle: Bundle, lowered: TargetGraph | None) -> dict[str, ModelProto]:
        """Return the graphs to write by file name: the model, and its encoded form if that is smaller."""
        model = lowered.model if lowered else lower(bundle, weights="float32", opset=self.opset, exporter=self.exporter)
        models = {FLOAT: model}
        plain = lowered is None or (
            lowered.precision == "float32" and lowered.deployment.stack.runtime == "onnxruntime"
        )
        if plain and not bundle.is_graph and self.weights == "encoded" and (encodings := bundle.encodings()):
            quantized = quantized_graph(model, encodings)
            # a few codes save fewer bytes than the nodes that decode them take
            if quantized.ByteSize() < model.ByteSize():
                models[QUANTISED] = quantized
        return models

    def lower_for_target(self, bundle: Bundle, runtime: str = "") -> TargetGraph:
        """Convert the bundle's graph for the target's stack; `runtime` selects the first stack with that runtime."""
        where = deployment_target(self.target, runtime, self.stack)
        model = lower(bundle, weights="float32", exporter=self.exporter)
        if self.opset is not None and self.opset > opset_of(model) and not bundle.is_graph:
            model = float_graph(bundle, opset=self.opset, exporter=self.exporter)
        return target_graph(model, where, self.precision, self.opset)
