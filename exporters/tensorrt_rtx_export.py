"""Export a bundle as a TensorRT-RTX engine for an RTX card, compiled here without one, and as its deployment kit.

TensorRT-RTX compiles ahead of time for a given compute capability, but running an engine needs the card. So the
exporter proves that the graph compiles, and `verify.py` proves the outputs on the device. Its parser belongs to the
same family as those of TensorRT 10 and 11: if it is installed, it also checks the graphs of their kits.

The package is proprietary (NVIDIA's licence, no redistribution). It is an optional extra that the user installs with
pip, never a dependency and never part of edgekit. An engine runs under one release only: the kit pins that release and
also holds the graph.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnx import ModelProto

from edgekit.bundle.format import Bundle
from edgekit.bundle.onnx_file import serialized
from edgekit.errors import EdgekitError, missing_extra
from edgekit.exporter import Export, Exporter
from edgekit.graph.external import LARGEST
from edgekit.graph.model import opset
from edgekit.targets import profile as targets
from edgekit.targets.profile import Stack, Target
from exporters import engines, kit
from exporters.base import MANIFEST, check_destination, hashes, manifest_bytes, publish
from exporters.onnx_export import OnnxExporter
from exporters.parser_versions import parser_version
from exporters.shapes import for_shapes
from exporters.target_graph import DeploymentTarget, deployment_target, target_graph

PACKAGE, RUNTIME = "tensorrt_rtx", "tensorrt-rtx"


@dataclass(frozen=True, slots=True)
class TensorRtRtxExporter(Exporter):
    """Parameters of a TensorRT-RTX export."""

    target: str = "rtx-3060-12gb"
    stack: str = ""  # name of one of the target's stacks with TensorRT-RTX; by default the first
    precision: str = ""  # one of the target's plan; by default the plan's first
    opset: int | None = None  # by default 17
    axes: tuple[str, ...] = ()  # NAME=LEAST:BEST:LARGEST
    shapes: tuple[str, ...] = ()  # INPUT=MIN:OPT:MAX, each a shape such as 1x3x224x224
    data: str = ""  # .npz with real inputs, which decide the shapes and become the golden rows

    @classmethod
    def accepts(cls, model: ModelProto, target: Target, stack: Stack) -> str:
        return accepted(model, target, stack)

    def export(self, bundle: Bundle, directory: str | Path, *, force: bool = False) -> Export:
        """Write the kit with its engine if the graph's outputs agree with the network's and the graph compiles."""
        directory = Path(directory)
        check_destination(directory, force=force)
        if find_spec(PACKAGE) is None:
            deployment_target(
                self.target, RUNTIME, self.stack
            )  # this check comes first, so that nobody installs the package for a device that has no TensorRT-RTX
        sm = compiles_for(self.target)
        trt = module()
        bundle, profile = for_shapes(bundle, self.axes, self.shapes, self.data)
        onnx_exporter = OnnxExporter(
            opset=self.opset, weights="float32", target=self.target, stack=self.stack, precision=self.precision
        )
        graph = onnx_exporter.lower_for_target(bundle, RUNTIME)
        written, manifest = kit.base(bundle, graph, profile, LARGEST, f"tensorrt-rtx=={trt.__version__}")
        name = f"model.sm{sm}.rtx"
        written[name] = compile_engine(graph.model, profile, sm, exact=graph.precision == "float32")
        written[kit.README] = kit.readme(graph, profile, f"python3 {kit.CHECK}")
        manifest = {
            "format": "edgekit-tensorrt-rtx-1",
            **manifest,
            "engine": {
                "file": name,
                "built": True,
                "tensorrt_rtx": str(trt.__version__),
                "sm": sm,
                "run": False,
                "reason": "compiled without a GPU; verify.py runs it on the device",
            },
            "files": hashes(written),
        }
        written[MANIFEST] = manifest_bytes(manifest)
        publish(written, directory, force=force)
        sizes = {name: len(content) for name, content in written.items()}
        return Export(directory, sizes, manifest, manifest["checks"])


def module() -> Any:
    """Return the package; if it is missing, raise with the command that installs it."""
    try:
        return importlib.import_module(PACKAGE)
    except ImportError:
        raise missing_extra("tensorrt-rtx", "rtx", "compiling for TensorRT-RTX") from None


def capabilities() -> list[int]:
    """Return the compute capabilities that it compiles for, such as 86."""
    members = module().ComputeCapability.__members__
    return sorted(int(name[2:]) for name in members if name.startswith("SM"))


def compiles_for(name: str) -> int:
    """Return the target's compute capability. Raises if TensorRT-RTX does not compile for it."""
    target, known = targets.find(name), capabilities()
    if target.sm not in known:
        able = [other for other in targets.names() if targets.find(other).sm in known]
        what = f"compute capability {target.compute_capability}" if target.sm else "no GPU"
        raise EdgekitError(
            f"{target.name} has {what}; TensorRT-RTX {module().__version__} compiles for "
            f"{', '.join(f'{sm / 10:.1f}' for sm in known)}; possible targets: {', '.join(able)}"
        )
    return target.sm


def compile_engine(model: ModelProto, profile: engines.Profile, sm: int, *, exact: bool = False) -> bytes:
    """Compile a graph to an engine. `exact`: compute float32 products in float32, not in TF32. Raises with the error of
    the parser or the builder."""
    trt = module()

    def configure(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        if exact:
            config.clear_flag(trt.BuilderFlag.TF32)

    what = f"TensorRT-RTX {trt.__version__}, for sm_{sm},"
    return engines.build(trt, model, serialized(model), profile, configure, strong=True, what=what)


def accepted(model: ModelProto, target: Target, stack: Stack) -> str:
    """Check a graph, in the opset and precision of its export, against the TensorRT parser of a stack: with the table
    of operators, and with NVIDIA's own parser if one of the same family is installed. Return the result as a sentence.
    """
    parser = parser_version(stack)
    if parser is None:
        return ""
    lowered = target_graph(model, DeploymentTarget(target, stack, parser))
    asked = preflight(lowered.model) if parser.typing != "weak" else ""
    finding = f"{parser.title} takes it, exported in opset {opset(lowered.model)} and {lowered.precision}"
    return f"{finding}: {asked or 'by the table of its operators'}"


def preflight(model: ModelProto) -> str:
    """Check a graph with the parser if it is installed. Return the parser's version, or "" if none is installed. Raises
    with the parser's error."""
    if find_spec(PACKAGE) is None:
        return ""
    trt = module()
    what = f"the parser of TensorRT-RTX {trt.__version__}, of the family of TensorRT 10 and 11,"
    engines.parse(trt, model, serialized(model), strong=True, what=what)
    return f"accepted by the parser of TensorRT-RTX {trt.__version__}, of the family of TensorRT 10 and 11"
