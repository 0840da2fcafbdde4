"""Write a deployment kit: all files that a device with a GPU needs to build, check and run a model.

Each kit has these files, for every TensorRT version:

model.onnx             the graph in the opset, the operators and the precision of the target
profile.json           least, best and largest shape of every input
golden.npz             inputs, and the outputs that they must give
verify.py              checks and times the model on the device and writes report.json; it needs numpy, the runtime and
                       Python 3.6 or newer
requirements-NAME.txt  the packages to install on the device, with pinned versions
README.md              the purpose of the kit, the commands to run on the device, warnings
manifest.json          SHA-256 of every file, target, versions, tolerances, measured differences
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from edgekit import __version__
from edgekit.bundle.format import GOLDEN, Bundle
from edgekit.errors import EdgekitError
from edgekit.graph.external import files
from edgekit.graph.model import opset
from exporters.base import described
from exporters.damage import check_golden
from exporters.escape import in_line
from exporters.shapes import Profile, shapes_text
from exporters.target_graph import TargetGraph, requirements
from exporters.verify import on_onnxruntime, verify

MODEL, PROFILE, CHECK, README = "model.onnx", "profile.json", "verify.py", "README.md"
# The device adds in another order, and in half it fuses operators that stay in float32 here.
DEVICE = {"float32": 1e-4, "float16": 2e-2, "int8": 5e-2}


def base(
    bundle: Bundle, graph: TargetGraph, profile: Profile, largest: int, *pins: str
) -> tuple[dict[str, bytes], Manifest]:
    """Return the files that every kit has, and its manifest so far. Raises if the graph's outputs differ from the
    network's.

    `pins`: requirements that replace those of the stack.
    """
    written = files(graph.model, MODEL, largest)
    external_data = {name: content for name, content in written.items() if name != MODEL}
    checks = verify(
        {MODEL: written[MODEL]},
        bundle,
        tolerance=graph.tolerance,
        load=partial(on_onnxruntime, external_data=external_data),
        graph=graph.model,
        advice=graph.advice,
    )
    device = max(DEVICE[graph.precision], 2 * checks[0].between_batches)
    golden = check_golden(graph.model, bundle, checks[0].allowed, device)
    written |= {
        PROFILE: (json.dumps(profile, indent=1) + "\n").encode(),
        GOLDEN: bundle.contents[GOLDEN],
        CHECK: (Path(__file__).parent / "engine_check.py").read_bytes(),
        f"requirements-{graph.deployment.target.name}.txt": requirements(graph.deployment, *pins),
    }
    manifest = {
        **described(bundle),
        **graph.described(),
        "runtime": graph.deployment.stack.runtime,
        "operators": sorted({node.op_type for node in graph.model.graph.node}),
        "shapes": profile,
        "least_batch": max(_batches(bundle, profile, "min")),
        "largest_batch": min(_batches(bundle, profile, "max")),
        "device_tolerance": device,
        "checks": [asdict(check) for check in checks],
        **golden,
        "versions": {
            "edgekit": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
        },
    }
    return written, manifest


def _batches(bundle: Bundle, profile: Profile, key: str) -> list[int]:
    """Return the least or largest batch of each input that has one."""
    places = {spec.name: spec.own_axes.index(spec.shape[0]) for spec in bundle.manifest.inputs if not spec.shared}
    return [profile[name][key][place] for name, place in places.items()] or [1]


def readme(graph: TargetGraph, profile: Profile, command: str, notes: Sequence[str] = ()) -> bytes:
    """Return README.md for a person who has the kit but perhaps no edgekit. `command` builds and checks the kit."""
    where, model = graph.deployment, graph.model
    target, stack = where.target, where.stack
    never = [f"- never {item.what}: {item.why}" for item in target.never]
    lines = [
        f"# {model.graph.name} for {target.title}",
        "",
        f"Software: {stack.name}. Precision: {graph.precision}. ONNX opset {opset(model)}. On the device, here:",
        "",
        f"    python3 -m pip install -r requirements-{target.name}.txt",
        f"    {command}",
        "",
        f"{CHECK} needs Python 3.6 or newer, numpy and the runtime. It exits with 0 if the model gives the "
        "golden outputs, and writes report.json with the device, the differences and the times.",
        "",
        "The engine takes these shapes, and no others; another export with --shapes makes one for others:",
        "",
        *(f"- {line}" for line in shapes_text(profile)),
        "",
        f"Why {graph.precision}: {target.plan.reason}",
        *([""] if notes else []),
        *(f"Note: {note}." for note in notes),
        "",
        *never,
    ]
    return ("\n".join(line[: len(line) - len(line.lstrip())] + in_line(line) for line in lines) + "\n").encode()


Manifest = dict[str, Any]


def content_of(written: Mapping[str, bytes]) -> bytes:
    """Return the kit's graph as one file, which a parser can read from memory. Raises if the weights are in a second
    file."""
    if f"{MODEL}.data" in written:
        raise EdgekitError("weights in a second file can only be compiled on the device: export with --to tensorrt")
    return written[MODEL]
