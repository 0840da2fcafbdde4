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
import re
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
from edgekit.bundle.tensors import multiple
from edgekit.errors import EdgekitError, unknown
from edgekit.graph.external import files
from edgekit.graph.model import opset
from exporters.base import described
from exporters.escape import in_line
from exporters.target_graph import TargetGraph, requirements
from exporters.verify import on_onnxruntime, verify

MODEL, PROFILE, CHECK, README = "model.onnx", "profile.json", "verify.py", "README.md"
BATCH = (1, 16, 64)  # least, best, largest: a few alerts, up to the batch that a small device holds
LONGER = 4  # times the golden data's length, of any other free axis
# The device adds in another order, and in half it fuses operators that stay in float32 here.
DEVICE = {"float32": 1e-4, "float16": 2e-2, "int8": 5e-2}
AXIS = re.compile(r"([^=]+)=(\d+):(\d+):(\d+)")
Profile = dict[str, dict[str, list[int]]]


def profile_of(bundle: Bundle, axes: tuple[str, ...]) -> Profile:
    """Read the shapes from 'NAME=LEAST:BEST:LARGEST'. By default the batch is 1, 16, 64, and every other free axis goes
    from its least length over the golden data's length to four times that. Raises if a length does not suit the model
    or if the golden data's length is outside the range."""
    golden, _ = bundle.golden()
    found: dict[str, tuple[int, int, int]] = {}
    for spec in bundle.manifest.inputs:
        for number, (axis, length) in enumerate(zip(spec.shape, golden[spec.name].shape, strict=True)):
            if isinstance(axis, str):
                found[axis] = (multiple(axis), length, LONGER * length) if number else BATCH
    for text in axes:
        parts = AXIS.fullmatch(text)
        if not parts:
            raise EdgekitError(f"axis {text!r}; expected NAME=LEAST:BEST:LARGEST, such as batch=1:16:64")
        name = next((axis for axis in found if parts[1] in (axis, axis.rpartition("*")[2])), None)
        if name is None:
            raise unknown("axis", parts[1], found, where=bundle.manifest.name)
        lengths = int(parts[2]), int(parts[3]), int(parts[4])
        step = multiple(name)
        if sorted(lengths) != list(lengths) or min(lengths) < 1 or any(length % step for length in lengths):
            of = f" multiples of {step}" if step > 1 else ""
            raise EdgekitError(f"axis {text!r}; expected three rising lengths of at least 1{of}")
        found[name] = lengths
    for spec in bundle.manifest.inputs:
        for number, (axis, length) in enumerate(zip(spec.shape, golden[spec.name].shape, strict=True)):
            if number and isinstance(axis, str) and not found[axis][0] <= length <= found[axis][2]:
                raise EdgekitError(
                    f"axis {axis!r} from {found[axis][0]} to {found[axis][2]} leaves out the golden data's {length}, "
                    "with which the device is checked"
                )
    return {
        spec.name: {
            key: [found[axis][number] if isinstance(axis, str) else axis for axis in spec.shape]
            for number, key in enumerate(("min", "opt", "max"))
        }
        for spec in bundle.manifest.inputs
    }


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
        advice=graph.advice,
    )
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
        "least_batch": max(ranges["min"][0] for ranges in profile.values()),
        "largest_batch": min(ranges["max"][0] for ranges in profile.values()),
        "device_tolerance": max(DEVICE[graph.precision], 2 * checks[0].between_batches),
        "checks": [asdict(check) for check in checks],
        "versions": {
            "edgekit": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
        },
    }
    return written, manifest


def readme(graph: TargetGraph, command: str, notes: Sequence[str] = ()) -> bytes:
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
