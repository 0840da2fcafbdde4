"""What a kit for a device's GPU holds, whichever TensorRT it is for: graph, shapes, golden data, check, pins, manifest.

model.onnx             in the opset, the operators and the precision of the target
profile.json           least, best and largest shape of every input
golden.npz             inputs, and the outputs they must give
verify.py              checks and times it on the device, writes report.json; numpy and the runtime, Python 3.6 or newer
requirements-NAME.txt  what to install there, pinned
README.md              what this is, what to type there, what to know
manifest.json          SHA-256 of every file, target, versions, tolerances, what was measured here
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
from exporters.target_graph import TargetGraph, requirements
from exporters.verify import on_onnxruntime, verify

MODEL, PROFILE, CHECK, README = "model.onnx", "profile.json", "verify.py", "README.md"
BATCH = (1, 16, 64)  # least, best, largest: a trickle of alerts, and what a small device holds
LONGER = 4  # times the golden data's length, of any other free axis
# the device adds in another order, and in half it fuses what is in float32 here
DEVICE = {"float32": 1e-4, "float16": 2e-2, "int8": 5e-2}
AXIS = re.compile(r"([^=]+)=(\d+):(\d+):(\d+)")
Profile = dict[str, dict[str, list[int]]]


def profile_of(bundle: Bundle, axes: tuple[str, ...]) -> Profile:
    """Shapes from 'NAME=LEAST:BEST:LARGEST'; else batch 1, 16, 64, and other free axes from their least length over the
    golden data's to four times that. Raises where a length does not suit the model or the golden data lies outside."""
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
    """The files that every kit has, and its manifest so far. Raises if the graph does not give what the network does.

    `pins`: requirements in place of the stack's.
    """
    written = files(graph.model, MODEL, largest)
    beside = {name: content for name, content in written.items() if name != MODEL}
    checks = verify(
        {MODEL: written[MODEL]},
        bundle,
        tolerance=graph.tolerance,
        load=partial(on_onnxruntime, beside=beside),
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
        "largest_batch": min(ranges["max"][0] for ranges in profile.values()),
        "device_tolerance": max(DEVICE[graph.precision], 2 * checks[0].allowed),
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
    """README.md for who has the directory, and perhaps not edgekit. `command`: what builds and checks it there."""
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
        f"{CHECK} needs Python 3.6 or newer and numpy beside the runtime. It exits with 0 if the golden outputs come "
        "out, and writes report.json: what ran, how far off it was, how long it took.",
        "",
        f"Why {graph.precision}: {target.plan.reason}",
        *([""] if notes else []),
        *(f"Know this: {note}." for note in notes),
        "",
        *never,
    ]
    return ("\n".join(lines) + "\n").encode()


Manifest = dict[str, Any]


def content_of(written: Mapping[str, bytes]) -> bytes:
    """The graph of a kit as a parser takes it from memory; weights in a second file are more than that holds."""
    if f"{MODEL}.data" in written:
        raise EdgekitError("weights in a second file can only be compiled on the device: export with --to tensorrt")
    return written[MODEL]
