"""Export a bundle as a deployment kit that builds a TensorRT engine on the device and verifies it there.

An engine runs on one GPU model and one TensorRT release only. So the kit holds the graph, the shapes and the build
script, not the engine.

    kit (exporters/kit.py) + build.sh, with the options of that TensorRT's trtexec

    8.2, 8.5, 8.6   weak typing: flags (--fp16, --int8) permit precisions in addition to the graph's types; layers that
                    must stay in float32 are named one by one (exporters/float32_pinned.py), except for the trtexec of
                    8.2, which has no option for that
    10              strong typing (--stronglyTyped) or flags, as the target's stack says
    11              strong typing; there are no flags

If the Python package `tensorrt` and a GPU with the target's compute capability are present, the exporter also builds
the engine here, stores it in the cache, and runs the kit's own verify.py on it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from edgekit import cache
from edgekit.bundle.files import write_directory
from edgekit.bundle.format import Bundle
from edgekit.errors import EdgekitError
from edgekit.exporter import Export, Exporter
from edgekit.graph.external import LARGEST
from edgekit.targets.profile import Stack, Target
from exporters import engine_check, engines, kit
from exporters.base import MANIFEST, check_destination, hashes, manifest_bytes, publish
from exporters.escape import in_line, in_shell
from exporters.float32_pinned import NOTHING, Float32Pinned
from exporters.onnx_export import OnnxExporter
from exporters.shapes import Profile, for_shapes
from exporters.target_graph import DeploymentTarget, TargetGraph
from exporters.tensorrt_rtx_export import accepted, preflight

ENGINE, SCRIPT = "model.plan", "build.sh"
WORKSPACE = 4096  # MiB at most; more memory finds no faster kernels for networks of this size
JETSON = "/usr/src/tensorrt/bin/trtexec"  # JetPack installs it here, outside PATH
AMPERE = 80  # from this compute capability on, float32 products run in TF32 (10 bits) unless TF32 is disabled


@dataclass(frozen=True, slots=True)
class TensorRtExporter(Exporter):
    """Parameters of a TensorRT kit."""

    target: str = ""
    stack: str = ""  # name of one of the target's stacks with TensorRT; by default the first
    precision: str = ""  # one of the target's plan; by default the plan's first
    opset: int | None = None  # by default 17, or the newest that the stack reads
    axes: tuple[str, ...] = ()  # NAME=LEAST:BEST:LARGEST
    shapes: tuple[str, ...] = ()  # INPUT=MIN:OPT:MAX, each a shape such as 1x3x224x224
    data: str = ""  # .npz with real inputs, which decide the shapes and become the golden rows
    workspace: int | None = None  # MiB that the build may use; by default an eighth of the device's memory
    level: int = 3  # effort of TensorRT's kernel search, 0 to 5; from 8.6 on
    largest: int = LARGEST  # bytes of model.onnx; the weights of a larger model go into a second file

    def __post_init__(self) -> None:
        if not self.target:
            raise EdgekitError("a TensorRT kit is for one device; name it: --target (`edgekit targets` lists them)")
        if not 0 <= self.level <= 5:
            raise EdgekitError(f"level = {self.level}; expected 0 to 5")
        if self.workspace is not None and self.workspace < 1:
            raise EdgekitError(f"workspace = {self.workspace} MiB; expected at least 1")

    @classmethod
    def accepts(cls, model: ModelProto, target: Target, stack: Stack) -> str:
        return accepted(model, target, stack)

    def export(self, bundle: Bundle, directory: str | Path, *, force: bool = False) -> Export:
        """Write the kit if the parser accepts its graph and the outputs agree with the network's. Build the engine too
        if TensorRT and the GPU are here."""
        directory = Path(directory)
        check_destination(directory, force=force)
        bundle, profile = for_shapes(bundle, self.axes, self.shapes, self.data)
        onnx_exporter = OnnxExporter(
            opset=self.opset, weights="float32", target=self.target, stack=self.stack, precision=self.precision
        )
        graph = onnx_exporter.lower_for_target(bundle, "tensorrt")
        assert graph.deployment.parser_version is not None
        parsed = ""
        if graph.deployment.parser_version.typing != "weak":
            parsed = preflight(graph.model)
        written, manifest = kit.base(bundle, graph, profile, self.largest)
        workspace = self.workspace or self._workspace(graph.deployment)
        digest = hashes(written)[kit.MODEL]
        script = build_script(graph.deployment, graph.precision, profile, workspace, self.level, digest, graph.pinned)
        written[SCRIPT] = script.encode()
        notes = unpinned_notes(graph)
        written[kit.README] = kit.readme(graph, profile, f"sh {SCRIPT} && python3 {kit.CHECK}", notes)
        manifest = {
            "format": "edgekit-tensorrt-1",
            **manifest,
            "parser_version": graph.deployment.parser_version.name,
            "parser": parsed or "not run: the extra rtx installs the parser, which stands for TensorRT 10 and 11",
            "workspace_mib": workspace,
            "kept_in_float32": list(graph.pinned.layers),
            "notes": notes,
            "engine": {"file": ENGINE},
            "files": hashes(written),
        }
        manifest["engine"].update(self._built_here(graph, profile, workspace, written, manifest))
        written[MANIFEST] = manifest_bytes(manifest)
        publish(written, directory, force=force)
        sizes = {name: len(content) for name, content in written.items()}
        return Export(directory, sizes, manifest, manifest["checks"])

    def _workspace(self, deployment: DeploymentTarget) -> int:
        return min(WORKSPACE, int(deployment.target.memory.value / 8) >> 20)

    def _built_here(
        self,
        graph: TargetGraph,
        profile: Profile,
        workspace: int,
        written: dict[str, bytes],
        manifest: dict[str, Any],
    ) -> dict[str, Any]:
        """Build and verify the engine if TensorRT and the target's GPU are here. Return the outcome, and add the engine
        to the files."""
        if reason := _obstacle(graph.deployment):
            return {"built": False, "reason": reason}
        trt, capability = importlib.import_module("tensorrt"), _gpu()
        model, version = written[kit.MODEL], str(trt.__version__)
        key = engine_key(model, profile, graph.precision, workspace, self.level, version, capability, graph.pinned)
        stored = cache.folder("tensorrt") / f"{key}.plan"
        cached = cache.read(stored)
        engine = self._engine(trt, graph, profile, workspace, kit.content_of(written)) if cached is None else cached
        try:
            report = self._verified({**written, ENGINE: engine}, manifest)
        except EdgekitError:
            stored.unlink(missing_ok=True)  # so that the next export builds it again
            raise
        if cached is None:
            cache.keep(stored, engine)
        written[ENGINE] = engine
        return {
            "built": True,
            "sha256": hashlib.sha256(engine).hexdigest(),
            "tensorrt": version,
            "sm": capability,
            "cached": cached is not None,
            "report": report,
        }

    def _engine(self, trt: Any, graph: TargetGraph, profile: Profile, workspace: int, content: bytes) -> bytes:
        """Build the engine with this machine's TensorRT."""
        deployment, precision = graph.deployment, graph.precision
        flags = _builder_flags(deployment, precision)
        flags += ["PREFER_PRECISION_CONSTRAINTS"] if graph.pinned.layers else []

        def configure(config: Any) -> None:
            _limit(trt, config, workspace)
            if hasattr(config, "builder_optimization_level"):
                config.builder_optimization_level = self.level
            for flag in flags:
                config.set_flag(getattr(trt.BuilderFlag, flag))
            if precision == "float32" and (deployment.target.sm or 0) >= AMPERE:
                config.clear_flag(trt.BuilderFlag.TF32)

        what, strong = f"TensorRT {trt.__version__}", not deployment.weak
        return engines.build(
            trt, graph.model, content, profile, configure, strong=strong, what=what, pinned=graph.pinned
        )

    def _verified(self, files: dict[str, bytes], manifest: dict[str, Any]) -> dict[str, Any]:
        """Run the kit's own check on its engine and return its report. Raises with its output if it fails."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "kit"
            write_directory(folder, {**files, MANIFEST: manifest_bytes(manifest)})
            command = [sys.executable, str(folder / kit.CHECK), "--runtime", "tensorrt"]
            command += ["--cudart", os.environ.get("EDGEKIT_CUDART", "")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = " ".join((done.stdout + done.stderr).split())
                raise EdgekitError(f"the engine that was built here does not pass its check: {said[-400:]}")
            report: dict[str, Any] = json.loads((folder / "report.json").read_text())
            return report


def _obstacle(deployment: DeploymentTarget) -> str:
    """Say why the engine cannot be built here; "" if it can."""
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed here; build.sh builds it on the device"
    version = str(importlib.import_module("tensorrt").__version__)
    parser_version = deployment.parser_version
    assert parser_version is not None
    if not version.startswith(f"{parser_version.name}."):
        return f"TensorRT {version} is here, the kit is for {parser_version.name}"
    try:
        capability = _gpu()
    except engine_check.Failed as error:
        return f"no GPU can be used here: {error}"
    if capability != deployment.target.sm:
        return f"the GPU here is sm_{capability}, the target is sm_{deployment.target.sm}"
    return ""


def _gpu() -> int:
    """Return the compute capability of this machine's GPU, such as 86. Raises `engine_check.Failed` without one."""
    return engine_check.Cuda(os.environ.get("EDGEKIT_CUDART", "")).compute_capability()


def engine_key(
    content: bytes,
    profile: Profile,
    precision: str,
    workspace: int,
    level: int,
    version: str,
    capability: int,
    kept: Float32Pinned = NOTHING,
) -> str:
    """Return a hash over all that an engine depends on: model, shapes, precision, TensorRT release and GPU."""
    model = hashlib.sha256(content).hexdigest()
    parts = [model, profile, precision, workspace, level, version, capability, kept.layers, kept.outputs]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def unpinned_notes(graph: TargetGraph) -> list[str]:
    """Return notes on the float32 layers that build.sh cannot guarantee; an empty list if it guarantees them all."""
    parser_version, kept = graph.deployment.parser_version, graph.pinned
    assert parser_version is not None
    if not kept.layers:
        return []
    remedy = f"if {kit.CHECK} then fails, export with --precision float32"
    if "layerPrecisions" not in parser_version.flags:
        return [
            f"trtexec of {parser_version.title} has no option for single layers (they came with 8.4): it may run "
            f"{len(kept.layers)} layers in half that this graph keeps in float32 (manifest.json lists them); {remedy}"
        ]
    if names := kept.unnameable:
        reason = "trtexec cannot keep these layers in float32 because its option cannot hold their names"
        return [f"{reason}: {', '.join(names)}; {remedy}"]
    return []


def build_script(
    deployment: DeploymentTarget,
    precision: str,
    profile: Profile,
    workspace: int,
    level: int,
    digest: str,
    kept: Float32Pinned = NOTHING,
) -> str:
    """Return build.sh. It checks the graph and the TensorRT release, then calls trtexec with that release's options."""
    parser_version, target = deployment.parser_version, deployment.target
    assert parser_version is not None
    command = " \\\n    ".join(
        [
            '"$TRTEXEC"',
            *(in_shell(option) for option in options(deployment, precision, profile, workspace, level, kept)),
        ]
    )
    program = JETSON if target.kind == "jetson" else "trtexec"
    compact = parser_version.name.replace(".", "")
    return f"""#!/bin/sh
# Builds {ENGINE} for {in_line(target.title)} with {in_line(deployment.stack.name)}.
# Run it on the device: an engine fits one GPU and one release.
#   sh build.sh && python3 {kit.CHECK}
# $TRTEXEC names another trtexec.
set -eu
cd "$(dirname "$0")"
TRTEXEC="${{TRTEXEC:-{program}}}"
if ! command -v "$TRTEXEC" > /dev/null; then
    echo "build.sh: $TRTEXEC is not here; it comes with TensorRT (on Jetsons {JETSON}); name it in \\$TRTEXEC" >&2
    exit 1
fi
found=$("$TRTEXEC" --help 2>&1 | sed -n 's/.*\\[TensorRT v\\([0-9.]*\\)\\].*/\\1/p' | head -n 1)
case "$found" in
    {compact}*|{parser_version.name}.*) ;;
    "") echo "build.sh: $TRTEXEC does not say which TensorRT it is; taken for {parser_version.name}" >&2 ;;
    *) echo "build.sh: this is TensorRT $found; this kit is for {parser_version.name}; export another" >&2
       exit 1 ;;
esac
echo "{digest}  {kit.MODEL}" | sha256sum -c - > /dev/null || {{
    echo "build.sh: {kit.MODEL} is not the file that was exported; copy it again" >&2
    exit 1
}}
{command}
echo "built {ENGINE}; now: python3 {kit.CHECK}"
"""


def options(
    deployment: DeploymentTarget,
    precision: str,
    profile: Profile,
    workspace: int,
    level: int,
    kept: Float32Pinned = NOTHING,
) -> list[str]:
    """Return the options of trtexec for the parser version of the deployment target."""
    parser_version = deployment.parser_version
    assert parser_version is not None
    dialect = parser_version.dialect
    pool = dialect["workspace"]
    size = f"--workspace={workspace}" if pool == "workspace" else f"--{pool}=workspace:{workspace}"
    found = [f"--onnx={kit.MODEL}", f"--saveEngine={ENGINE}", "--timingCacheFile=timing.cache", size]
    for key in ("min", "opt", "max"):
        shapes = ",".join(f"{name}:{'x'.join(map(str, ranges[key]))}" for name, ranges in profile.items())
        found.append(f"--{key}Shapes={shapes}")
    if "level" in dialect:
        found.append(f"--{dialect['level']}={level}")
    if not deployment.weak:
        found += [f"--{dialect['strong']}"] if "strong" in dialect else []
    found += [f"--{flag.lower()}" for flag in _builder_flags(deployment, precision)]
    if "layerPrecisions" in parser_version.flags:
        found += kept.options()
    if precision == "float32" and (deployment.target.sm or 0) >= AMPERE:
        found.append("--noTF32")
    return [*found, f"--{dialect['stop']}"]


def _builder_flags(deployment: DeploymentTarget, precision: str) -> list[str]:
    """Return the precisions that the builder may choose from if typing is weak. In an int8 model the other layers may
    run in float16 if the plan has it."""
    if not deployment.weak:
        return []
    flags = {"float32": [], "float16": ["FP16"], "int8": ["INT8"]}[precision]
    return [*flags, "FP16"] if precision == "int8" and "float16" in deployment.target.plan.order else flags


def _limit(trt: Any, config: Any, workspace: int) -> None:
    if hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    else:
        config.max_workspace_size = workspace << 20
