"""Train the network through the int8 arithmetic in which it will run, and return a graph with that arithmetic (Jacob et
al. 2018, arXiv 1712.05877, section 3), by torch.export and torchao's PT2E.

    network --export--> captured --prepare--> rounds while it trains --convert--> Q/DQ --> graph, codes stored

The schemes, the products and the other rounded values are those of `static_int8`, but the activations keep the scales
with which the weights were trained. Use `qat` if you need a network afterwards: `dynamic_int8` converts it to the
faster graph on most CPUs, and it can be exported below opset 18. `qat` needs no torchao.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import nn
from torch.fx import GraphModule

from edgekit.bundle.family import tied
from edgekit.errors import EdgekitError, missing_extra, unknown
from edgekit.graph.index import Index
from edgekit.graph.model import attribute, eliminate_dead_nodes, name_nodes, unique_name, value_names
from edgekit.nn.exported import Exported, dynamic_shapes, example
from edgekit.nn.training import tensors
from edgekit.passes.base import (
    Candidate,
    Change,
    Context,
    GraphCandidate,
    Pass,
    at_least,
    frozen,
    matrices,
    owner,
    recover,
)
from edgekit.passes.qat import PRODUCTS
from edgekit.passes.static_int8 import SCHEMES, dequantized, picked_from

WIDEST_BIAS = 2**30  # in int32, with room for sums


@dataclass(frozen=True, slots=True)
class QatInt8(Pass[Candidate]):
    """`scheme`: as in `static_int8`; `weight_bits`: the grid of the weights, whose codes are always int8: 7 for any
    CPU, 8 for VNNI, ARM and TensorRT. `samples`: training rows that initialize the ranges of activations."""

    name: ClassVar[str] = "qat_int8"
    summary: ClassVar[str] = "train through int8 by torchao's PT2E, and leave its graph in Q/DQ form"
    lowers: ClassVar[bool] = True
    epochs_parameter: ClassVar[str] = "epochs"
    computes_in: ClassVar[tuple[str, ...]] = ("int8",)
    scheme_parameter: ClassVar[str] = "scheme"
    weight_bits_parameter: ClassVar[str] = "weight_bits"

    scheme: str = "u8s8"
    weight_bits: int = 7
    epochs: int = 3
    learning_rate: float = 5e-4
    samples: int = 256
    include: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise unknown("scheme", self.scheme, SCHEMES)
        at_least("weight_bits", self.weight_bits, 2, 8)
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)
        at_least("samples", self.samples, 1, 1_000_000)

    def plan(self, candidate: Candidate) -> list[Change]:
        after = f"int8 ({self.weight_bits} bit), trained; inputs {self.scheme[:2]}"
        found = self._obstacles(candidate)
        changes = [Change(name, "float32", f"left in float32: {why}" if why else after) for name, why in found.items()]
        if all(found.values()):
            left = "; ".join(f"{change.tensor}: {change.after}" for change in changes[:5])
            raise EdgekitError(f"qat_int8: no weight that matches {', '.join(self.include)} can be quantized ({left})")
        return changes

    def apply(self, candidate: Candidate, context: Context) -> GraphCandidate:
        self.plan(candidate)
        names = [name for name, why in self._obstacles(candidate).items() if not why]
        model = candidate.copy_model()
        frozen(model, candidate.encodings)
        with _silence():
            try:
                from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

                from edgekit.passes.qat_quantizer import Int8Quantizer
            except ModuleNotFoundError as error:
                raise missing_extra(error.name or "torchao", "qat", "qat_int8") from None
            quantizer = Int8Quantizer(self.scheme, self.weight_bits, names)
            network: nn.Module = Exported(prepare_qat_pt2e(_captured(model, context), quantizer))
            _start_ranges(network, context, self.samples)
            network = recover(network, context, self.epochs, self.learning_rate, self.name)
            _settle(network, context)
            converted = convert_pt2e(network.graph, fold_quantize=False)
            return GraphCandidate(stored(context.lower(Exported(converted)), self.scheme))

    def _obstacles(self, candidate: Candidate) -> dict[str, str]:
        """Return the matching weights, each with the reason why it cannot be quantized, or ""."""
        aliases = tied(candidate.model)
        shared = set(aliases) | set(aliases.values())
        result = {}
        for name in matrices(candidate.model, self.include):
            reason = "" if isinstance(owner(candidate.model, name)[0], PRODUCTS) else "not of a Linear or Conv layer"
            reason = reason or ("it is tied and stays one tensor" if name in shared else "")
            result[name] = reason or ("encoded by an earlier pass" if name in candidate.encodings else "")
        return result


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress torch's deprecation warnings, and torchao's warnings about missing GPU libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)


def _captured(model: nn.Module, context: Context) -> GraphModule:
    """Capture the network as operators, in training mode, for batches of any length."""
    try:
        program = torch.export.export(
            model.train(), example(context.inputs), dynamic_shapes=dynamic_shapes(context.inputs)
        )
        return program.module(check_guards=False)
    except Exception as error:  # torch.export raises the errors of the network's own code, and many others
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EdgekitError(f"qat_int8: torch.export cannot capture the network ({reason[0]}); use qat") from error


def _start_ranges(network: nn.Module, context: Context, samples: int) -> None:
    """Initialize the ranges of activations from training rows, drawn with the seed and run as one batch, because the
    first batch counts in full."""
    rows = np.sort(np.random.default_rng(context.seed).permutation(len(context.train))[:samples])
    with torch.no_grad():
        network.eval()(*tensors(context.train.take(rows)))


def _settle(network: nn.Module, context: Context) -> None:
    """Set the scales of weights from the averaged weights that training returns, not from its last step; then freeze
    all ranges."""
    from torchao.quantization.pt2e import FakeQuantize

    rounders = [module for module in network.modules() if isinstance(module, FakeQuantize)]
    for module in rounders:
        if not module.is_per_channel:
            module.disable_observer()
    with torch.no_grad():
        network.eval()(*tensors(context.train.take(np.arange(1))))
    for module in rounders:
        module.disable_observer()


def stored(model: ModelProto, scheme: str) -> ModelProto:
    """Return the exported graph with its weights as codes in the layout that the products read, and with int32 biases
    if the scheme has them."""
    name_nodes(model)
    graph = model.graph
    _share_grids(model)
    index = Index(model)
    producers, floats = index.producers, index.initializers
    # by rounded value; the flag says whether it is a weight
    scales: dict[str, tuple[npt.NDArray[np.float64], bool]] = {}
    for node in list(graph.node):
        if node.op_type != "DequantizeLinear":
            continue
        scale = numpy_helper.to_array(floats[node.input[1]]).astype(np.float64)
        rounder, low, high = producers.get(node.input[0]), -128.0, 127.0
        if rounder is not None and rounder.op_type == "Clip":  # PT2E clips to a narrower grid
            low, high = (float(numpy_helper.to_array(floats[name])) for name in rounder.input[1:3])
            rounder = producers[rounder.input[0]]
        weight = floats.get(rounder.input[0]) if rounder is not None else None
        scales[node.output[0]] = scale, weight is not None
        if weight is not None:
            _store_weight(model, node, weight, scale, (low, high))
    if scheme == "u8s8":
        for node in list(graph.node):
            if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2] in floats:
                _store_bias(model, node, floats[node.input[2]], scales)
    eliminate_dead_nodes(model)
    return model


def _share_grids(model: ModelProto) -> None:
    """Give a value that is rounded, pooled and rounded again one grid: see `picked_from`."""
    rounded = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    producers = Index(model).producers
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        origin = picked_from(producers, node.input[0], rounded)
        if origin == node.input[0]:
            continue
        clipped = {
            other.output[0]
            for other in model.graph.node
            if other.op_type == "Clip" and other.input[0] == node.output[0]
        }
        for other in rounded.values():
            if other.input[0] in (node.output[0], *clipped):
                other.input[1:] = rounded[origin].input[1:]
        node.input[1:] = rounded[origin].input[1:]


def _store_weight(
    model: ModelProto, node: NodeProto, weight: TensorProto, scale: npt.NDArray[np.float64], ends: tuple[float, float]
) -> None:
    """Replace a weight and its rounding by codes; they are transposed if a product reads the weight through a
    Transpose."""
    value, axis = numpy_helper.to_array(weight).astype(np.float64), int(attribute(node, "axis", 1))
    shape = [-1 if number == axis else 1 for number in range(value.ndim)]
    codes = np.round(value / scale.reshape(shape)).clip(*ends).astype(np.int8)
    consumers = [other for other in model.graph.node if node.output[0] in other.input]
    name = node.output[0]
    if len(consumers) == 1 and consumers[0].op_type == "Transpose" and value.ndim == 2:
        codes, axis, name = codes.T, 1 - axis, consumers[0].output[0]
        model.graph.node.remove(consumers[0])
    tensors_, nodes = dequantized(model, unique_name(weight.name, value_names(model)), codes, scale, axis)
    model.graph.node.remove(node)
    model.graph.initializer.extend(tensors_)
    nodes[0].output[0] = name
    model.graph.node.insert(0, nodes[0])


def _store_bias(
    model: ModelProto, node: NodeProto, bias: TensorProto, scales: Mapping[str, tuple[npt.NDArray[np.float64], bool]]
) -> None:
    """Store a bias in int32, in steps of the product's scale, if both factors are rounded and 31 bits hold it."""
    if not all(name in scales for name in node.input[:2]):
        return
    (activation, _), (weight, stored_) = (scales[name] for name in node.input[:2])
    codes = np.round(numpy_helper.to_array(bias).astype(np.float64) / (activation * weight))
    if stored_ and np.abs(codes).max() < WIDEST_BIAS:
        name = unique_name(f"{node.name}.bias", value_names(model))
        tensors_, nodes = dequantized(model, name, codes.astype(np.int32), activation * weight, 0)
        model.graph.initializer.extend(tensors_)
        model.graph.node.insert(0, nodes[0])
        node.input[2] = name
