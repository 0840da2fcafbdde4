"""The model families that edgekit has: what a bundle's manifest may name without a further package."""

from __future__ import annotations

from edgekit.bundle.family import Family

T2 = Family("t2", "edgekit.nn.t2:build", "edgekit.nn.t2:prunable_groups", ("c", "onnxruntime", "openvino", "torch"))
MODULE = Family("module", "edgekit.nn.module:build")  # any network that a Python function builds
GRAPH = Family("onnx", runtimes=("onnxruntime", "openvino"))  # a graph without a network
HIERA = Family("hiera", "edgekit.nn.hiera:build")  # what `edgekit search` finds
