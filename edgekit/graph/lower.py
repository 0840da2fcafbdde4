"""Lower a network to an ONNX graph with either of torch's exporters; the graph is readable, portable and checked.

If compression passes encoded the weights, the graph may store the codes, which it decodes exactly.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from edgekit import __version__
from edgekit.bundle.encoding import Affine, Encoding
from edgekit.bundle.family import tied
from edgekit.bundle.format import KEY, Bundle, model_key
from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.graph.cleanup import shapes, strip, tidy
from edgekit.graph.model import opset as opset_of
from edgekit.graph.model import stored_graph
from edgekit.graph.network import Network
from edgekit.graph.opset import OLDEST, to_opset
from edgekit.nn.exported import dynamic_shapes, example

Exporter = Literal["torchscript", "dynamo"]  # one of torch's two; dynamo writes opset 18 or newer
FAVOURED = 17  # every runtime since 2022 reads it; from this opset on LayerNormalization is one node
# torch's TorchScript exporter writes these as requested; its successor silently raises 16 and 17 to 18
TRACED_OPSETS = range(16, 21)
OPSETS = range(OLDEST, TRACED_OPSETS.stop)  # older ones are rewritten from 17
DYNAMO_OPSET = 18  # if an older one is requested, it silently writes 18
# Operators that ONNX Runtime, TensorRT 8.6 (the last for Pascal cards), OpenVINO and the common converters all read.
PORTABLE = frozenset(
    (
        "Abs", "Add", "And", "ArgMax", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Clip", "Concat",
        "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "CumSum", "DequantizeLinear", "Div", "Elu", "Equal", "Erf",
        "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "Gemm", "GlobalAveragePool", "Greater",
        "GreaterOrEqual", "HardSigmoid", "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Less",
        "LessOrEqual", "Log", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "PRelu",
        "QuantizeLinear", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu",
        "Reshape", "Resize", "Shape", "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "Softplus", "Split", "Sqrt",
        "Squeeze", "Sub", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    )
)  # fmt: skip
Array = npt.NDArray[Any]


def lower(
    bundle: Bundle,
    *,
    weights: Literal["encoded", "float32"] = "encoded",
    opset: int | None = None,
    exporter: Exporter = "torchscript",
) -> ModelProto:
    """Return the bundle as a checked graph: the graph that it holds, or its network lowered to one.

    weights: "encoded" stores the codes that compression passes produced; "float32" stores decoded numbers.
    """
    if bundle.is_graph:
        return stored_graph(bundle)
    model = float_graph(bundle, opset=opset, exporter=exporter)
    encodings = bundle.encodings() if weights == "encoded" else {}
    return quantized_graph(model, encodings) if encodings else model


def float_graph(
    bundle: Bundle,
    network: nn.Module | None = None,
    *,
    opset: int | None = None,
    exporter: Exporter = "torchscript",
) -> ModelProto:
    """Return the bundle's network as a checked float32 graph. `network` replaces it by another one with the same inputs
    and outputs.

    opset: by default 17, the newest that every runtime since 2022 reads; the dynamo exporter writes at least 18.
    """
    network, wanted = Network(bundle, network).eval(), opset or FAVOURED
    if exporter == "dynamo":
        model = _trace_dynamo(network, bundle, max(wanted, DYNAMO_OPSET))
        strip(model)
        model.graph.name = bundle.manifest.name
        helper.set_model_props(model, {KEY: model_key(bundle)})
        onnx.checker.check_model(model, full_check=True)
        return model
    model = _trace(network, bundle, wanted if wanted in TRACED_OPSETS else FAVOURED)
    buffers = {name.partition(".")[2]: value.numpy() for name, value in network.named_buffers()}
    tidy(model, "network", buffers, tied(network.network))
    model.graph.name = bundle.manifest.name
    model.producer_name, model.producer_version = "edgekit", __version__
    helper.set_model_props(model, {KEY: model_key(bundle)})
    if wanted < TRACED_OPSETS.start:
        model = to_opset(model, wanted).model
    _check(model, wanted, (*bundle.manifest.inputs, *bundle.manifest.outputs))
    return model


def quantized_graph(model: ModelProto, encodings: Mapping[str, Encoding]) -> ModelProto:
    """Return a copy of a float graph that stores the encoded weights as codes and decodes them exactly."""
    quantized = ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if strange := sorted(set(encodings) - set(stored)):
        raise EdgekitError(
            f"encoded weight {strange[0]!r} is not in the exported graph, which holds {', '.join(stored)}; "
            "export with weights='float32'"
        )
    graph.ClearField("initializer")
    graph.ClearField("node")
    for name, tensor in stored.items():
        if name in encodings:
            tensors, nodes = _decoder(name, encodings[name], numpy_helper.to_array(tensor))
            graph.initializer.extend(tensors)
            graph.node.extend(nodes)
        else:
            graph.initializer.append(tensor)
    graph.node.extend(model.graph.node)
    _check_graph(quantized, opset_of(model))
    return quantized


def _check(model: ModelProto, opset: int, specs: tuple[TensorSpec, ...]) -> None:
    """Raise unless the graph is valid and portable and has the requested opset and the manifest's shapes."""
    _check_graph(model, opset)
    found = shapes(model)
    for spec in specs:
        got = found.get(spec.name)
        fits = got is not None and len(got) == len(spec.shape)
        if not fits or any(
            isinstance(w, int) and isinstance(g, int) and w != g for w, g in zip(spec.shape, got or (), strict=False)
        ):
            raise EdgekitError(
                f"ONNX: {spec.name!r} has shape {got} in the exported graph; the manifest says {spec.shape_text}"
            )


def _check_graph(model: ModelProto, opset: int) -> None:
    domains = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if domains != {"ai.onnx": opset}:
        raise EdgekitError(
            f"ONNX: asked for opset {opset}, the exporter wrote {domains}; "
            f"expected {OPSETS[0]} to {OPSETS[-1]} of ai.onnx"
        )
    for node in model.graph.node:
        if node.op_type not in PORTABLE or node.domain not in ("", "ai.onnx"):
            raise EdgekitError(
                f"ONNX: node {node.name!r} is a {node.op_type}, which not every runtime reads; "
                f"rewrite that layer with portable operators: {', '.join(sorted(PORTABLE))}"
            )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EdgekitError(f"ONNX: the exported graph is not valid: {str(error).splitlines()[0]}") from error


def _trace(network: Network, bundle: Bundle, opset: int) -> ModelProto:
    """Return the graph as torch writes it. Nothing is folded, because folding would lose the parameters' names."""
    manifest = bundle.manifest
    specs = (*manifest.inputs, *manifest.outputs)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            # Deprecated, but it honours the opset. If the tracer makes a length constant, `verify` finds it at other
            # lengths.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                example(manifest.inputs),
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=opset,
                do_constant_folding=False,
                input_names=[spec.name for spec in manifest.inputs],
                output_names=[spec.name for spec in manifest.outputs],
                dynamic_axes={
                    spec.name: {number: axis for number, axis in enumerate(spec.shape) if isinstance(axis, str)}
                    for spec in specs
                },
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = next(line for line in f"{error}\n(no reason given)".splitlines() if line.strip())
        raise EdgekitError(
            f"torch cannot write {manifest.family} as ONNX opset {opset}: {reason}; try another opset "
            f"({TRACED_OPSETS[0]} to {TRACED_OPSETS[-1]})"
        ) from error
    return onnx.load_from_string(buffer.getvalue())


def _trace_dynamo(network: Network, bundle: Bundle, opset: int) -> ModelProto:
    """Return the graph as torch.export and onnxscript's optimizer write it."""
    manifest = bundle.manifest
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs optional packages that are missing
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                example(manifest.inputs),
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in manifest.inputs],
                output_names=[spec.name for spec in manifest.outputs],
                dynamic_shapes=(dynamic_shapes(manifest.inputs),),  # of *inputs
                verbose=False,
            )
            assert program is not None
            model: ModelProto = program.model_proto
            return model
    except Exception as error:  # the stages of the exporter raise many types
        raise EdgekitError(f"torch's dynamo exporter cannot write {manifest.family}: {type(error).__name__}") from error
    finally:
        logger.setLevel(level)


def _decoder(name: str, encoding: Encoding, weight: Array) -> tuple[list[TensorProto], list[NodeProto]]:
    """Return initializers and nodes that compute the weight from its codes. A linear layer's weight is (out, in) in the
    network but (in, out) in a MatMul, so its codes and scales are transposed here, once.

    Integers are decoded by Cast and Mul, which runtimes fold when they load the model: the result is exact and as fast
    as float32. DequantizeLinear would do the same, but ONNX Runtime 1.32 then also quantizes the *activations* to int8
    (MatMulNBits, accuracy level 4): t2 became 1.2 times slower and its probabilities changed by 6e-5.
    """
    transposed = not np.array_equal(encoding.decode(), weight)
    turn = np.transpose if transposed else np.asarray
    assert np.array_equal(turn(encoding.decode()), weight), f"{name}: codes do not give the weight in the graph"
    codes = numpy_helper.from_array(np.ascontiguousarray(turn(encoding.codes)), f"{name}.codes")
    numbers = f"{name}.Cast"
    to = TensorProto.FLOAT if isinstance(encoding, Affine) else TensorProto.INT32  # Gather takes no bytes
    cast = helper.make_node("Cast", [codes.name], [numbers], numbers, to=to)
    if isinstance(encoding, Affine):
        scale = numpy_helper.from_array(np.ascontiguousarray(turn(encoding.scale)), f"{name}.scale")
        return [codes, scale], [cast, helper.make_node("Mul", [numbers, scale.name], [name], f"{name}.Mul")]
    palette = numpy_helper.from_array(encoding.palette, f"{name}.palette")
    return [codes, palette], [cast, helper.make_node("Gather", [palette.name, numbers], [name], f"{name}.Gather")]
