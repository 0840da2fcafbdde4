"""Show that golden rows can tell a damaged model: a check that passes whatever the weights are proves nothing.

Each damage changes the graph's stored numbers and keeps its form:

    halved         the weights of one large layer, multiplied by 0.5
    sign flipped   the weights of one large layer, multiplied by -1
    all halved     the weights of all large layers at once
    no biases      all one-dimensional floats that an Add, a Conv, a Gemm or a normalization adds, set to 0

The graph runs on the golden rows with and without the damage, on ONNX Runtime. A damage is found if an output differs
by more than the check allows, in the check's own unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgekit.bundle.format import Bundle
from edgekit.bundle.signature import Signature
from edgekit.bundle.tensors import Arrays
from edgekit.errors import EdgekitError
from edgekit.graph.index import Index
from exporters.verify import differences

Array = npt.NDArray[Any]
LAYERS = 24  # the largest number of layers that are damaged one by one
SHARE = 0.01  # of all the numbers of the model: a layer with fewer is not large
FLIPPED, ROUNDED = " sign flipped", 1e-6  # a difference of this size is rounding
BIASES, TOGETHER = "no biases", "all large layers halved"
MOST = 0.5  # of the large layers: the check on the device must find a damage of as many
ROWS = 1e-3  # the golden rows must show every damage by more than this; the checks' tolerances may be wider
FEW = 1  # rows that run first: a damage that they show needs no others
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
CODES = (TensorProto.INT8, TensorProto.UINT8)
READS = frozenset(
    (
        "MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "ConvInteger", "Gather", "LSTM", "GRU", "RNN",
        "Add", "LayerNormalization", "Cast", "DequantizeLinear", "MatMulNBits",
    )
)  # fmt: skip
ADDS = {"Add": (0, 1), "Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,), "LayerNormalization": (2,)}


@dataclass(frozen=True, slots=True)
class Damage:
    """A way to damage a model: other numbers for stored tensors, by name."""

    name: str
    layer: str  # "" if the damage changes several layers
    tensors: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The result of the self-test. found: the damages that the golden rows show; blind: those that they do not; least:
    the smallest difference of a damage that was found; allowed: the difference that the check allows; unseen: layers of
    which no damage was found; symmetric: layers of which another sign changes no output, though half of the weights
    does, because the model squares what the layer gives, as for a power spectrum: that is no damage."""

    tried: int
    found: int
    least: float
    allowed: float
    blind: tuple[str, ...]
    unseen: tuple[str, ...]
    symmetric: tuple[str, ...] = ()


def damages(model: ModelProto) -> list[Damage]:
    """Return the damages of a graph, the same in every call."""
    index = Index(model)
    layers = _large(model, index)
    changed = {name: (_halved(array), _flipped(array)) for name, array in layers.items()}
    result = []
    for name, (halved, flipped) in changed.items():
        result += [Damage(f"{name} halved", name, {name: halved})] if halved is not None else []
        result.append(Damage(f"{name}{FLIPPED}", name, {name: flipped}))
    together = {name: flipped if halved is None else halved for name, (halved, flipped) in changed.items()}
    if len(together) > 1:
        result.append(Damage(TOGETHER, "", together))
    if biases := _biases(model, index):
        result.append(Damage(BIASES, "", {name: np.zeros_like(array) for name, array in biases.items()}))
    return result


def _large(model: ModelProto, index: Index) -> dict[str, Array]:
    """Return the stored tensors of the large layers, from the largest on."""
    found = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) > 1 and tensor.data_type in FLOATS + CODES and index.is_consumed(tensor.name)
    }
    sizes = {name: int(np.prod(tensor.dims)) for name, tensor in found.items()}
    ranked = sorted(found, key=lambda name: (-sizes[name], name))[:LAYERS]
    total = sum(sizes.values())
    arrays = {name: numpy_helper.to_array(found[name]) for name in ranked if sizes[name] >= SHARE * total}
    return {name: array for name, array in arrays.items() if array.any()}


def _halved(array: Array) -> Array | None:
    """Return half of each number; None for unsigned codes, whose middle the tensor does not tell."""
    if array.dtype.kind == "f":
        return np.asarray(array * array.dtype.type(0.5))
    return array // 2 if array.dtype.kind == "i" else None


def _flipped(array: Array) -> Array:
    """Return the numbers with the other sign; for unsigned codes, mirrored about their middle."""
    if array.dtype.kind == "u":
        return np.asarray(array.min() + array.max() - array)  # codes may be indices of a palette
    return np.asarray(-np.maximum(array, -127) if array.dtype == np.int8 else -array)


def _biases(model: ModelProto, index: Index) -> dict[str, Array]:
    """Return the stored vectors that are added and are not zero."""
    found: dict[str, Array] = {}
    for node in model.graph.node:
        for slot in ADDS.get(node.op_type, ()):
            tensor = index.initializers.get(node.input[slot]) if slot < len(node.input) else None
            if tensor is not None and len(tensor.dims) == 1 and tensor.data_type in FLOATS and tensor.dims[0] > 1:
                found[tensor.name] = numpy_helper.to_array(tensor)
    return {name: array for name, array in found.items() if array.any()}


def sensitivity(model: ModelProto, bundle: Bundle, allowed: float) -> Sensitivity:
    """Run the graph on the bundle's golden rows with each damage, and count the damages that a check with this
    tolerance finds."""
    inputs, _ = bundle.golden()
    few = {name: array[:FEW] for name, array in inputs.items()}
    tried = damages(model)
    names = [spec.name for spec in bundle.manifest.outputs]
    run = _runner(model, tried, names, bundle.manifest.signature)
    plain = [run(rows, {}) for rows in (few, inputs)]
    blind, least, unchanged = [], np.inf, set[str]()
    for damage in tried:
        difference = 0.0
        for rows, expected in zip((few, inputs), plain, strict=True):
            difference = _difference(run(rows, damage.tensors), expected)
            if not difference <= allowed:  # also true for NaN
                break
        if difference <= allowed:
            blind.append(damage.name)
            if difference <= min(ROUNDED, allowed) and damage.name.endswith(FLIPPED):
                unchanged.add(damage.layer)
        else:
            least = float(np.fmin(least, difference))
    seen = {damage.layer for damage in tried if damage.name not in blind}
    symmetric = tuple(sorted(unchanged & seen))
    blind = [name for name in blind if name.removesuffix(FLIPPED) not in symmetric]
    required = [damage for damage in tried if damage.name != BIASES]
    unseen = dict.fromkeys(damage.layer or damage.name for damage in required if damage.layer not in seen)
    count = len(tried) - len(symmetric)
    return Sensitivity(count, count - len(blind), least, allowed, tuple(blind), tuple(unseen), symmetric)


def check_golden(model: ModelProto, bundle: Bundle, allowed: float, device: float) -> dict[str, Any]:
    """Raise unless the golden rows can tell a damaged model. Return what the manifest says about it.

    The rows must show every damage of a layer by more than ROWS, or by more than the exporter's tolerance `allowed` if
    that is less. The biases of some models hardly change an output, so the manifest only says whether the rows show
    that they are lost. The check on the `device`, whose tolerance may be wide, must find the damage of all layers
    together, and of MOST large layers at least one damage. The manifest names the layers of which it finds none.
    """
    rows = sensitivity(model, bundle, min(allowed, ROWS))
    if not rows.tried:
        raise EdgekitError(
            f"{bundle.manifest.name}: the graph itself stores no weights of two or more axes, so no check can tell a "
            "damaged model. Nothing was written; if they are in branches that depend on an input, import the model "
            "with that input fixed: edgekit import --fix NAME=NUMBER"
        )
    check = sensitivity(model, bundle, max(allowed, device))
    layers = {damage.layer for damage in damages(model) if damage.layer}
    lost = check.unseen if TOGETHER in check.unseen or len(check.unseen) > (1 - MOST) * len(layers) else ()
    of_layers = tuple(name for name in rows.blind if name != BIASES)
    for found, blind in ((rows, of_layers), (check, lost)):
        if blind:
            others = f", nor with {len(blind) - 1} others" if len(blind) > 1 else ""
            raise EdgekitError(
                f"{bundle.manifest.name}: these golden rows cannot tell a damaged model: with the damage {blind[0]!r} "
                f"no output differs by more than {found.allowed:.1e}{others}. Nothing was written; use real inputs as "
                "golden rows: edgekit import --data FILE.npz"
            )
    return {"golden": {"rows": asdict(rows), "device": asdict(check)}}


def _difference(got: Arrays, expected: Arrays) -> float:
    return float(np.max([differences(name, value, expected[name]).max(initial=0) for name, value in got.items()]))


def _runner(
    model: ModelProto, tried: list[Damage], names: list[str], signature: Signature
) -> Callable[[Arrays, Mapping[str, Array]], Arrays]:
    """Return run(rows, damaged tensors). One session serves the damages of tensors that products and tables read. A
    damage of another tensor gets its own session, because some operators run only on constants."""
    index = Index(model)
    changed = {name for damage in tried for name in damage.tensors}
    free = {
        name for name in changed if all(item.node and item.node.op_type in READS for item in index.consumptions(name))
    }
    session = _overridable(model, free)

    def run(rows: Arrays, tensors: Mapping[str, Array]) -> Arrays:
        if tensors.keys() <= free:
            return dict(zip(names, signature.run(session.run, names, {**rows, **tensors}), strict=True))
        own = _overridable(with_tensors(model, tensors), set())
        return dict(zip(names, signature.run(own.run, names, rows), strict=True))

    return run


def with_tensors(model: ModelProto, tensors: Mapping[str, Array]) -> ModelProto:
    """Return a copy of the graph with other numbers in stored tensors."""
    copied = ModelProto()
    copied.CopyFrom(model)
    for tensor in copied.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    return copied


def _overridable(model: ModelProto, names: set[str]) -> Any:
    """Open the graph such that a caller may give other numbers for these stored tensors: they are listed among the
    inputs, so one session serves all damages."""
    copied = ModelProto()
    copied.CopyFrom(model)
    copied.ir_version = max(copied.ir_version, 4)  # the first in which a stored tensor is only a default
    listed = {value.name for value in copied.graph.input}
    for tensor in copied.graph.initializer:
        if tensor.name in names - listed:
            copied.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = (
        4  # it warns of each stored tensor that can be replaced, and prints errors that are handled
    )
    return onnxruntime.InferenceSession(copied.SerializeToString(), options, providers=["CPUExecutionProvider"])
