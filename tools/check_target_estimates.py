"""Compare estimates from a device's data sheet with times that others published for it.

    pip install --no-deps --target FOLDER timm==1.0.31 fastervit==1.0.0
    python tools/check_target_estimates.py --peers FOLDER --json target_estimates.json

The authors of EfficientViT (Cai et al. 2023, arXiv 2205.14756) publish times of their networks in TensorRT, float16,
batch 1. timm has the networks; their weights do not matter. `ratio` is the published time in estimates.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import warnings
from pathlib import Path

import onnx
import torch
from peer_networks import use

from edgekit import machine
from edgekit.cost.operators import work
from edgekit.cost.roofline import estimate
from edgekit.graph.shapes import sized
from edgekit.targets.profile import find

PUBLISHED = {  # network, pixels along a side -> milliseconds by device
    ("efficientvit_b1", 224): {"jetson-nano": 24.8, "jetson-agx-orin-64gb": 1.48},
    ("efficientvit_b2", 224): {"jetson-nano": 50.6, "jetson-agx-orin-64gb": 2.63},
    ("efficientvit_b2", 288): {"jetson-nano": 69.9, "jetson-agx-orin-64gb": 3.30},
}


def graph_of(model: torch.nn.Module, side: int) -> onnx.ModelProto:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            model, (torch.randn(1, 3, side, side),), file, opset_version=17, dynamo=False, input_names=["x"],
            output_names=["y"], dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    versions, rows = use(options.peers), []
    timm = importlib.import_module("timm")
    for (name, side), times in PUBLISHED.items():
        graph = graph_of(timm.create_model(name, pretrained=False).eval(), side)
        for target, published in times.items():
            found = 1e3 * estimate(work(graph, sized(graph, 1)), find(target), 1).seconds
            rows.append(
                {
                    "network": name, "side": side, "target": target, "estimate_ms": round(found, 2),
                    "published_ms": published, "ratio": round(published / found, 2),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    if options.json:
        content = {"machine": machine.describe(), "timm": versions["timm"], "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
