"""Export a bundle as a TensorRT-RTX engine for an RTX card, compiled here without one, and as its kit.

TensorRT-RTX compiles ahead of time for a compute capability that it is told; running an engine takes the card, so that
what is proved here is that it compiles, and `verify.py` proves the rest there. Its parser is of the same family as
those of TensorRT 10 and 11: where it is installed, their kits are shown to it first.

The package is proprietary (NVIDIA's licence, no redistribution): an extra that the user's pip fetches, never a
dependency and never part of edgekit. Engines fit one release of it only: the kit pins that, and holds the graph too.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnx import ModelProto

from edgekit.bundle.format import Bundle
from edgekit.errors import EdgekitError, missing_extra
from edgekit.exporter import Export, Exporter
from edgekit.graph.external import LARGEST
from edgekit.graph.model import opset, serialized
from edgekit.targets import profile as targets
from edgekit.targets.profile import Stack, Target
from exporters import engines, kit
from exporters.base import MANIFEST, check_destination, hashes, manifest_bytes, publish
from exporters.onnx_export import OnnxExporter
from exporters.parser_versions import parser_version
from exporters.target_graph import DeploymentTarget, deployment_target, target_graph

PACKAGE, RUNTIME = "tensorrt_rtx", "tensorrt-rtx"


@dataclass(frozen=True, slots=True)
class TensorRtRtxExporter(Exporter):
    """Parameters of a TensorRT-RTX export."""

    target: str = "rtx-3060-12gb"
    stack: str = ""  # one of the target's with TensorRT-RTX, by name; else its first
    precision: str = ""  # of the target's plan; else the plan's first
    opset: int | None = None  # none: 17
    axes: tuple[str, ...] = ()  # NAME=LEAST:BEST:LARGEST

    @classmethod
    def accepts(cls, model: ModelProto, target: Target, stack: Stack) -> str:
        return accepted(model, target, stack)

    def export(self, bundle: Bundle, directory: str | Path, *, force: bool = False) -> Export:
        """Write the kit with its engine, once the graph gives what the network gives and compiles."""
        directory = Path(directory)
        check_destination(directory, force=force)
        if find_spec(PACKAGE) is None:
            deployment_target(
                self.target, RUNTIME, self.stack
            )  # a device that it is not for: nobody need install it to hear that
        sm = compiles_for(self.target)
        trt = module()
        onnx_exporter = OnnxExporter(
            opset=self.opset, weights="float32", target=self.target, stack=self.stack, precision=self.precision
        )
        graph = onnx_exporter.lower_for_target(bundle, RUNTIME)
        profile = kit.profile_of(bundle, self.axes)
        written, manifest = kit.base(bundle, graph, profile, LARGEST, f"tensorrt-rtx=={trt.__version__}")
        name = f"model.sm{sm}.rtx"
        written[name] = compile_engine(graph.model, profile, sm, exact=graph.precision == "float32")
        written[kit.README] = kit.readme(graph, f"python3 {kit.CHECK}")
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
    """The package, or the line that installs it."""
    try:
        return importlib.import_module(PACKAGE)
    except ImportError:
        raise missing_extra("tensorrt-rtx", "rtx", "compiling for TensorRT-RTX") from None


def capabilities() -> list[int]:
    """Compute capabilities that it compiles for, such as 86."""
    members = module().ComputeCapability.__members__
    return sorted(int(name[2:]) for name in members if name.startswith("SM"))


def compiles_for(name: str) -> int:
    """The target's compute capability, if TensorRT-RTX knows it. Raises with the targets that it is for."""
    target, known = targets.find(name), capabilities()
    if target.sm not in known:
        able = [other for other in targets.names() if targets.find(other).sm in known]
        what = f"compute capability {target.compute_capability}" if target.sm else "no GPU"
        raise EdgekitError(
            f"{target.name} has {what}; TensorRT-RTX {module().__version__} compiles for "
            f"{', '.join(f'{sm / 10:.1f}' for sm in known)}; targets of ours: {', '.join(able)}"
        )
    return target.sm


def compile_engine(model: ModelProto, profile: engines.Profile, sm: int, *, exact: bool = False) -> bytes:
    """The engine of a graph. `exact`: float32 products in float32, not in TF32. Raises with the parser's or the
    builder's own reason."""
    trt = module()

    def configure(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        if exact:
            config.clear_flag(trt.BuilderFlag.TF32)

    what = f"TensorRT-RTX {trt.__version__}, for sm_{sm},"
    return engines.build(trt, model, serialized(model), profile, configure, strong=True, what=what)


def accepted(model: ModelProto, target: Target, stack: Stack) -> str:
    """How the TensorRT parser of a stack takes a graph in the opset and precision that it would be exported in: by the
    table of its operators, and by NVIDIA's own parser where that is installed and of the same family."""
    parser = parser_version(stack)
    if parser is None:
        return ""
    lowered = target_graph(model, DeploymentTarget(target, stack, parser))
    asked = preflight(lowered.model) if parser.typing != "weak" else ""
    finding = f"{parser.title} takes it, exported in opset {opset(lowered.model)} and {lowered.precision}"
    return f"{finding}: {asked or 'by the table of its operators'}"


def preflight(model: ModelProto) -> str:
    """Show a graph to the parser if it is installed; which one, or nothing. Raises with its reason."""
    if find_spec(PACKAGE) is None:
        return ""
    trt = module()
    what = f"the parser of TensorRT-RTX {trt.__version__}, of the family of TensorRT 10 and 11,"
    engines.parse(trt, model, serialized(model), strong=True, what=what)
    return f"accepted by the parser of TensorRT-RTX {trt.__version__}, of the family of TensorRT 10 and 11"
