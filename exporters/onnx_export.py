"""Export a bundle to ONNX: a small, portable, readable graph, proved against the network it came from.

model.onnx             float32; for a target, in the precision of its plan
model.onnx.data        its weights, where one file would be too large
model.quantized.onnx   the same network with its encoded weights stored as 8-bit codes, decoded inside the graph
golden.npz             inputs, and the outputs they must give
verify.py              checks both on the device; needs numpy and onnxruntime only
requirements-NAME.txt  for a target: what to install there, pinned
manifest.json          SHA-256 of every file, opset, operators, tolerances, what was measured
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from edgekit import __version__
from edgekit.bundle.encoding import Affine, Encoding
from edgekit.bundle.format import GOLDEN, GRAPH, Bundle, TensorSpec
from edgekit.errors import EdgekitError
from edgekit.graph.cleanup import shapes, strip, tidy
from edgekit.graph.external import LARGEST, files
from edgekit.graph.model import load
from edgekit.graph.model import opset as opset_of
from edgekit.graph.network import Network
from edgekit.graph.opset import OLDEST, to_opset
from edgekit.nn.exported import dynamic_shapes, example
from edgekit.nn.module import tied
from exporters.base import (
    KEY,
    MANIFEST,
    Export,
    check_destination,
    described,
    hashes,
    manifest_bytes,
    model_key,
    publish,
)
from exporters.target_graph import FAVOURED, TargetGraph, deployment_target, requirements, target_graph
from exporters.verify import TOLERANCE, on_onnxruntime, verify

TRACED_OPSETS = range(
    16, 21
)  # what torch's TorchScript exporter writes as asked; its successor silently raises 16 and 17 to 18
OPSETS = range(OLDEST, TRACED_OPSETS.stop)  # older ones are rewritten from 17
DYNAMO_OPSET = 18  # asked for less, it writes 18 and says nothing
# Operators that ONNX Runtime, TensorRT 8.6 (the last for Pascal cards), OpenVINO and the common converters all read
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
FLOAT, QUANTISED = "model.onnx", "model.quantized.onnx"
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class OnnxExporter:
    """Parameters of an ONNX export."""

    # none: 17, the first with LayerNormalization in one node, the last that TensorRT 8.6 (a Tesla P40's) reads
    opset: int | None = None
    weights: Literal["encoded", "float32"] = "encoded"  # encoded: also write the codes that compression passes left
    exporter: Literal["torchscript", "dynamo"] = "torchscript"  # of torch's; dynamo writes opset 18 at least
    target: str = ""  # a device's name: its opset, operators and precision
    stack: str = ""  # one of the target's, by name; else its first
    precision: str = ""  # of the target's plan; else the plan's first
    largest: int = LARGEST  # bytes of model.onnx; above, its weights go into a second file

    def __post_init__(self) -> None:
        if self.opset is not None and self.opset not in OPSETS:
            raise EdgekitError(f"ONNX opset {self.opset} cannot be written; expected {OPSETS[0]} to {OPSETS[-1]}")
        if self.weights not in ("encoded", "float32"):
            raise EdgekitError(f"ONNX weights = {self.weights!r}; expected 'encoded' or 'float32'")
        if self.exporter not in ("torchscript", "dynamo"):
            raise EdgekitError(f"ONNX exporter = {self.exporter!r}; expected 'torchscript' or 'dynamo'")
        if (self.stack or self.precision) and not self.target:
            raise EdgekitError("ONNX: a stack or a precision is a target's; name one: `edgekit targets` lists them")

    def export(self, bundle: Bundle, directory: str | Path, *, force: bool = False) -> Export:
        """Write model, golden data, device check and manifest, once ONNX Runtime gives what the network gives.

        Raises, and writes nothing, if an output is beyond tolerance at any batch size.
        """
        directory = Path(directory)
        check_destination(directory, force=force)
        lowered = self.lower_for_target(bundle) if self.target else None
        model = lowered.model if lowered else stored_graph(bundle) if bundle.is_graph else self.float_graph(bundle)
        models = {FLOAT: model}
        plain = lowered is None or (
            lowered.precision == "float32" and lowered.deployment.stack.runtime == "onnxruntime"
        )
        if plain and not bundle.is_graph and self.weights == "encoded" and (encodings := bundle.encodings()):
            quantized = self.quantized_graph(model, encodings)
            if quantized.ByteSize() < model.ByteSize():  # a few codes save less than the nodes that decode them take
                models[QUANTISED] = quantized
        graphs: dict[str, bytes] = {}
        for name, graph in models.items():
            graphs |= files(graph, name, self.largest)
        beside = {name: content for name, content in graphs.items() if name not in models}
        tolerance = lowered.tolerance if lowered else TOLERANCE
        advice = lowered.advice if lowered else "try another --opset"
        sources = {name: graphs[name] for name in models}
        checks = verify(
            sources, bundle, tolerance=tolerance, load=partial(on_onnxruntime, beside=beside), advice=advice
        )
        records = [asdict(check) for check in checks]
        check_script = (Path(__file__).parent / "device_check.py").read_bytes()
        written = {**graphs, GOLDEN: bundle.contents[GOLDEN], "verify.py": check_script}
        if lowered:
            written[f"requirements-{lowered.deployment.target.name}.txt"] = requirements(lowered.deployment)
        manifest = {
            "format": "edgekit-onnx-1",
            **described(bundle),
            **(lowered.described() if lowered else {}),
            "opset": opset_of(model),
            "models": {
                name: {
                    "bytes": len(graphs[name]) + len(graphs.get(f"{name}.data", b"")),
                    "operators": sorted({node.op_type for node in graph.graph.node}),
                    "tolerance": next(check.allowed for check in checks if check.file == name),
                }
                for name, graph in models.items()
            },
            "checks": records,
            "versions": {
                "edgekit": __version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                "numpy": np.__version__,
            },
            "files": hashes(written),
        }
        written[MANIFEST] = manifest_bytes(manifest)
        publish(written, directory, force=force)
        return Export(directory, {name: len(content) for name, content in written.items()}, manifest, records)

    def lower_for_target(self, bundle: Bundle, runtime: str = "") -> TargetGraph:
        """The graph as the target's stack reads it, the first stack with this runtime if one is named."""
        where = deployment_target(self.target, runtime, self.stack)
        source = replace(self, opset=None, target="", stack="", precision="")
        model = stored_graph(bundle) if bundle.is_graph else source.float_graph(bundle)
        if self.opset is not None and self.opset > opset_of(model) and not bundle.is_graph:
            model = replace(source, opset=self.opset).float_graph(bundle)
        return target_graph(model, where, self.precision, self.opset)

    def graph(self, bundle: Bundle) -> ModelProto:
        """The bundle as a checked ONNX model; weights as codes where it has them, unless `weights` is 'float32'; the
        graph itself where the bundle holds one."""
        if bundle.is_graph:
            return stored_graph(bundle)
        model = self.float_graph(bundle)
        encodings = bundle.encodings() if self.weights == "encoded" else {}
        return self.quantized_graph(model, encodings) if encodings else model

    def float_graph(self, bundle: Bundle, network: nn.Module | None = None) -> ModelProto:
        """The bundle as a checked float32 ONNX model; on request with another network behind the same inputs and
        outputs."""
        network, wanted = Network(bundle, network).eval(), self.opset or FAVOURED
        if self.exporter == "dynamo":
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
        self._check(model, bundle.manifest.inputs, bundle.manifest.outputs)
        return model

    def quantized_graph(self, model: ModelProto, encodings: dict[str, Encoding]) -> ModelProto:
        """A copy of a float graph that stores the encoded weights as codes and decodes them in the graph, exactly."""
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

    def _check(self, model: ModelProto, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        """Raise unless the graph is valid, portable, of the opset asked for and of the shapes promised."""
        _check_graph(model, self.opset or FAVOURED)
        found = shapes(model)
        for spec in (*inputs, *outputs):
            got = found.get(spec.name)
            fits = got is not None and len(got) == len(spec.shape)
            if not fits or any(
                isinstance(w, int) and isinstance(g, int) and w != g
                for w, g in zip(spec.shape, got or (), strict=False)
            ):
                raise EdgekitError(
                    f"ONNX: {spec.name!r} has shape {got} in the exported graph; the manifest says {spec.shape_text}"
                )


def stored_graph(bundle: Bundle) -> ModelProto:
    """The graph that the bundle holds, marked as this bundle's."""
    model = load(bundle.contents[GRAPH], str(bundle.path or bundle.manifest.name))
    others = {item.key: item.value for item in model.metadata_props if item.key != KEY}
    helper.set_model_props(model, {**others, KEY: model_key(bundle)})
    return model


def _trace(network: Network, bundle: Bundle, opset: int) -> ModelProto:
    """The graph as torch writes it, nothing folded: folding would lose the parameters' names."""
    manifest = bundle.manifest
    specs = (*manifest.inputs, *manifest.outputs)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            # deprecated, but it honours the opset; what tracing bakes in, `verify` finds at other lengths
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
    """The graph as torch.export and onnxscript's optimizer write it."""
    manifest = bundle.manifest
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports optional packages that are not there
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
    except Exception as error:  # the exporter wraps whatever its many stages raise
        raise EdgekitError(f"torch's dynamo exporter cannot write {manifest.family}: {type(error).__name__}") from error
    finally:
        logger.setLevel(level)


def _decoder(name: str, encoding: Encoding, weight: Array) -> tuple[list[TensorProto], list[NodeProto]]:
    """Initializers and nodes that give the weight from its codes. A linear layer's weight is (out, in) in the network
    but (in, out) in a MatMul: its codes and scales are transposed here, once.

    Integers are decoded by Cast and Mul, which runtimes fold when they load the model: the result is exact, and as fast
    as float32. DequantizeLinear says the same, but ONNX Runtime 1.32 reads it as leave to quantize the *activations*
    to int8 (MatMulNBits, accuracy level 4): t2 became 1.2 times slower and its probabilities moved by 6e-5.
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
