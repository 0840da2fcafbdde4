"""Export a bundle to OpenVINO's own format, and compare it with its source network as OpenVINO runs it.

model.xml, model.bin   the graph and its weights, float32 unless the bundle's graph says otherwise
golden.npz             inputs, and the outputs that they must give
verify.py              checks both on the device; it needs numpy and openvino only
manifest.json          SHA-256 of every file, operators, tolerance, measured differences

The batch axis stays free: a session compiles one model for each batch size that it runs. The exporter verifies each
batch size with its own compiled model, because OpenVINO has been right at 32 rows and wrong at 64.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from onnx import ModelProto

from edgekit import __version__
from edgekit.bundle.format import GOLDEN, KEY, Bundle, model_key
from edgekit.bundle.tensors import Arrays
from edgekit.errors import EdgekitError, missing_extra
from edgekit.exporter import Export, Exporter
from edgekit.graph.lower import lower
from exporters.base import MANIFEST, check_destination, publish, tensors
from exporters.damage import check_golden
from exporters.verify import verify

try:
    import openvino
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "openvino", "openvino", "the export format openvino") from None

MODEL, WEIGHTS = "model.xml", "model.bin"
# 0 disables it: float32 must stay float32. If weights are stored as integers, OpenVINO otherwise also rounds
# *activations* to int8, which changed probabilities by 2e-4.
EXACT = "DYNAMIC_QUANTIZATION_GROUP_SIZE"


@dataclass(frozen=True, slots=True)
class OpenVinoExporter(Exporter):
    """Parameters of an OpenVINO export."""

    # encoded: store the codes that compression passes produced. OpenVINO decodes them when it compiles the model: the
    # speed is the same and the file is smaller.
    weights: Literal["encoded", "float32"] = "encoded"

    def __post_init__(self) -> None:
        if self.weights not in ("encoded", "float32"):
            raise EdgekitError(f"OpenVINO weights = {self.weights!r}; expected 'encoded' or 'float32'")

    def export(self, bundle: Bundle, directory: str | Path, *, force: bool = False) -> Export:
        """Write model, golden data, device check and manifest if OpenVINO's outputs agree with the network's.

        Raises, and writes nothing, if OpenVINO cannot read the graph or if an output is beyond tolerance at any batch
        size.
        """
        directory = Path(directory)
        check_destination(directory, force=force)
        core = openvino.Core()
        source = lower(bundle, weights=self.weights)
        graph, weights, operators = self._convert(core, bundle, source)
        checks = verify({MODEL: graph}, bundle, graph=source, load=lambda content: Model(core, content, weights))
        golden = check_golden(source, bundle, checks[0].allowed, checks[0].between_batches)
        records = [asdict(replace(check, bytes=len(graph) + len(weights))) for check in checks]
        check_script = (Path(__file__).parent / "device_check.py").read_bytes()
        files = {MODEL: graph, WEIGHTS: weights, GOLDEN: bundle.contents[GOLDEN], "verify.py": check_script}
        manifest = {
            "format": "edgekit-openvino-1",
            "model": bundle.manifest.name,
            "bundle": bundle.digest,
            KEY: model_key(bundle),
            "weights": self.weights,
            **tensors(bundle),
            "state": bundle.manifest.state,
            "classes": bundle.manifest.classes,
            "preprocessing": bundle.manifest.preprocessing,
            "models": {
                MODEL: {
                    "bytes": len(graph) + len(weights),
                    "operators": operators,
                    "tolerance": checks[0].between_batches,
                    "precision": "f32",
                }
            },
            "checks": records,
            **golden,
            "versions": {
                "edgekit": __version__,
                "torch": torch.__version__,
                "openvino": openvino.__version__,
                "numpy": np.__version__,
            },
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        files[MANIFEST] = (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()
        publish(files, directory, force=force)
        return Export(directory, {name: len(content) for name, content in files.items()}, manifest, records)

    def _convert(self, core: Any, bundle: Bundle, source: ModelProto) -> tuple[bytes, bytes, list[str]]:
        """Return the graph, the weights and the names of the graph's operators. The core reads the ONNX from memory,
        because openvino.convert_model sends telemetry."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / MODEL
            try:
                model = core.read_model(source.SerializeToString())
                model.set_rt_info(model_key(bundle), KEY)
                model.set_rt_info("0", ["runtime_options", EXACT])
                openvino.save_model(model, path, compress_to_fp16=False)  # openvino compresses to float16 by default
            except RuntimeError as error:  # openvino raises no other exception type
                reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1][-200:]
                raise EdgekitError(f"openvino cannot read {bundle.manifest.name} as ONNX: {reason}") from error
            operators = sorted({operator.get_type_name() for operator in model.get_ops()})
            return path.read_bytes(), path.with_suffix(".bin").read_bytes(), operators


class Model:
    """An exported model as OpenVINO runs it: one compiled model for each shape, in float32."""

    def __init__(self, core: Any, graph: bytes, weights: bytes) -> None:
        self._core, self._model = core, core.read_model(graph, weights)
        self._compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

    def run(self, names: Sequence[str], arrays: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        rows: Arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        shapes = tuple(array.shape for array in rows.values())
        if shapes not in self._compiled:
            model = self._model.clone()
            model.reshape({name: list(array.shape) for name, array in rows.items()})
            self._compiled[shapes] = self._core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results = self._compiled[shapes](rows)
        return [np.array(results[name]) for name in names]
