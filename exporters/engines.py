"""Compile a graph with the Python interface of TensorRT or TensorRT-RTX, which have the same calls: parse, profile,
build.

Errors carry every message of the parser or the builder, with the node's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onnx import ModelProto

from edgekit.errors import EdgekitError
from exporters.float32_pinned import NOTHING, Float32Pinned

Profile = Mapping[str, Mapping[str, list[int]]]  # input: min, opt, max: shape


def parse(trt: Any, model: ModelProto, content: bytes, *, strong: bool, what: str) -> tuple[Any, Any, list[str]]:
    """Parse a graph and return (builder, network) and the log that they write to. Raises with the parser's errors."""
    log: list[str] = []
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(_flags(trt, strong))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        raise EdgekitError(f"{what} refuses the graph: {'; '.join(complaints(parser, model)) or '; '.join(log)}")
    network.name = model.graph.name or "network"
    log.clear()
    # the network points to weights that the parser holds
    return (builder, parser), network, log


def build(
    trt: Any,
    model: ModelProto,
    content: bytes,
    profile: Profile,
    configure: Callable[[Any], None],
    *,
    strong: bool,
    what: str,
    pinned: Float32Pinned = NOTHING,
) -> bytes:
    """Build the engine. `configure` sets the options that differ between versions; `pinned`: layers of a weakly typed
    network that must stay in float32."""
    (builder, _parser), network, log = parse(trt, model, content, strong=strong, what=what)
    for number in range(network.num_layers if pinned.layers else 0):
        layer = network.get_layer(number)
        if layer.name in pinned.layers:
            layer.precision = trt.DataType.FLOAT
        if layer.name in pinned.outputs:
            layer.set_output_type(0, trt.DataType.FLOAT)
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    for name, ranges in profile.items():
        shapes.set_shape(name, tuple(ranges["min"]), tuple(ranges["opt"]), tuple(ranges["max"]))
    config.add_optimization_profile(shapes)
    configure(config)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EdgekitError(f"{what} parses the graph but cannot build it: {'; '.join(log) or 'it gives no reason'}")
    return bytes(engine)


def complaints(parser: Any, model: ModelProto) -> list[str]:
    """Return the parser's errors, each with its node. Versions before 10 give only the node's number."""
    found = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        at = error.node() if hasattr(error, "node") else -1
        known = model.graph.node[at] if 0 <= at < len(model.graph.node) else None
        name = error.node_name() if hasattr(error, "node_name") else known.name if known else ""
        op_type = error.node_operator() if hasattr(error, "node_operator") else known.op_type if known else ""
        prefix = f"node {name!r} ({op_type}): " if name or op_type else ""
        found.append(prefix + " ".join(str(error.desc()).split()))
    return list(dict.fromkeys(found))


def _flags(trt: Any, strong: bool) -> int:
    """Return the flags that create a network: old versions need a bit that new versions no longer have."""
    names = ["EXPLICIT_BATCH", *(["STRONGLY_TYPED"] if strong else [])]
    known = trt.NetworkDefinitionCreationFlag
    return sum(1 << int(getattr(known, name)) for name in names if hasattr(known, name))


def _logger(trt: Any, log: list[str]) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                log.append(" ".join(message.split()))

    return Log()
