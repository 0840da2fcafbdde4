"""As much of TensorRT's Python interface as exporting and checking use; what an engine computes, onnxruntime does.

$FAKE_TENSORRT is the version that it plays: before 8.5 engines have bindings, from 10 on there are no flags of
EXPLICIT_BATCH. Device addresses are those of `cudart.c`, which are the host's. The parser refuses the operators in
$FAKE_TENSORRT_LACKS. $FAKE_TENSORRT_WRONG makes its engines compute nonsense.
"""

import ctypes
import enum
import json
import os

import numpy as np
import onnx
import onnxruntime

__version__ = os.environ.get("FAKE_TENSORRT", "10.13.3.9")
MAJOR, MINOR = (int(part) for part in __version__.split(".")[:2])
MAGIC = b"FAKE PLAN"
LOG = []  # what was set on the last builder's configuration


class ILogger:
    ERROR, INTERNAL_ERROR, WARNING = "error", "internal error", "warning"


class Logger(ILogger):
    def __init__(self, severity):
        self.severity = severity


class NetworkDefinitionCreationFlag(enum.IntEnum):
    if MAJOR < 10:
        EXPLICIT_BATCH = 0
    else:
        STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    FP16, INT8, TF32, PREFER_PRECISION_CONSTRAINTS = range(4)


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, INT64, BOOL = range(6)


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class Layer:
    def __init__(self, name):
        self.name, self.precision, self.types = name, None, {}

    def set_output_type(self, number, kind):
        self.types[number] = kind


class Network:
    def __init__(self, flags):
        self.flags, self.name, self.content, self.layers = flags, "", b"", []

    @property
    def num_layers(self):
        return len(self.layers)

    def get_layer(self, number):
        return self.layers[number]


class Config:
    def __init__(self):
        self.made = {"flags": [], "cleared": [], "profiles": []}
        if (MAJOR, MINOR) >= (8, 6):
            self.builder_optimization_level = 3
        if (MAJOR, MINOR) >= (8, 4):
            self.set_memory_pool_limit = lambda pool, size: self.made.update(workspace=size)

    def set_flag(self, flag):
        self.made["flags"].append(flag.name)

    def clear_flag(self, flag):
        self.made["cleared"].append(flag.name)

    def add_optimization_profile(self, profile):
        self.made["profiles"].append(profile.shapes)


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, *shapes):
        self.shapes[name] = shapes


class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        return Network(flags)

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        if not config.made["profiles"]:
            self.logger.log(ILogger.ERROR, "Network has dynamic or shape inputs, but no optimization profile")
            return None
        made = dict(
            config.made, network=network.flags, workspace=config.made.get("workspace") or config.max_workspace_size
        )
        made["float32"] = [layer.name for layer in network.layers if layer.precision is DataType.FLOAT]
        made["float32 outputs"] = [layer.name for layer in network.layers if layer.types.get(0) is DataType.FLOAT]
        made["level"] = getattr(config, "builder_optimization_level", None)
        LOG.append(made)
        return MAGIC + json.dumps({"version": __version__, **made}).encode() + b"\n" + network.content


class ParserError:
    def __init__(self, number, node, what):
        self.number, self.what = number, what
        if MAJOR >= 10:
            self.node_name, self.node_operator = lambda: node.name, lambda: node.op_type

    def node(self):
        return self.number

    def desc(self):
        return self.what


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.errors = network, []

    def parse(self, content):
        lacking = os.environ.get("FAKE_TENSORRT_LACKS", "").split(",")
        for number, node in enumerate(onnx.load_from_string(content).graph.node):
            if node.op_type in lacking:
                self.errors.append(ParserError(number, node, f"no importer found for {node.op_type}"))
            self.network.layers.append(Layer(node.name))
        self.network.content = content
        return not self.errors

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, number):
        return self.errors[number]


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, content):
        head, _, graph = content.partition(b"\n")
        made = json.loads(head[len(MAGIC) :]) if head.startswith(MAGIC) else {"version": ""}
        if made["version"] != __version__:
            return None
        return (Engine if (MAJOR, MINOR) >= (8, 5) else OldEngine)(graph, made["profiles"][0])


class Base:
    """A stand-in with the inputs first, then the outputs."""

    def __init__(self, graph, profile):
        self.profile = profile
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = self.session.get_inputs(), self.session.get_outputs()
        self.names = [value.name for value in (*self.inputs, *self.outputs)]

    def kind(self, name):
        kinds = {value.name: value.type for value in (*self.inputs, *self.outputs)}
        kind = {"tensor(float)": DataType.FLOAT, "tensor(int64)": DataType.INT64}[kinds[name]]
        return DataType.INT32 if kind == DataType.INT64 and MAJOR < 9 else kind  # it knew no int64

    def create_execution_context(self):
        return Context(self) if isinstance(self, Engine) else OldContext(self)


class Engine(Base):
    @property
    def num_io_tensors(self):
        return len(self.names)

    def get_tensor_name(self, number):
        return self.names[number]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if self.names.index(name) < len(self.inputs) else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self.kind(name)


class OldEngine(Base):
    @property
    def num_bindings(self):
        return len(self.names)

    def get_binding_name(self, number):
        return self.names[number]

    def binding_is_input(self, number):
        return number < len(self.inputs)

    def get_binding_dtype(self, number):
        return self.kind(self.names[number])


class BaseContext:
    def __init__(self, engine):
        self.engine, self.shapes = engine, {}

    def shape(self, name):
        """Output shapes are known once those of the inputs are."""
        if name not in self.shapes:
            feeds = {
                value.name: np.zeros(self.shapes[value.name], np.int64 if "int64" in value.type else np.float32)
                for value in self.engine.inputs
            }
            names = [value.name for value in self.engine.outputs]
            found = self.engine.session.run(names, feeds)
            self.shapes.update({key: array.shape for key, array in zip(names, found, strict=True)})
        return self.shapes[name]

    def set_shape(self, name, shape):
        least, _, largest = self.engine.profile[name]
        if not all(low <= axis <= high for low, axis, high in zip(least, shape, largest, strict=True)):
            return False
        self.shapes = {key: value for key, value in self.shapes.items() if key != name}
        for value in self.engine.outputs:
            self.shapes.pop(value.name, None)
        self.shapes[name] = shape
        return True

    def execute_v2(self, addresses):
        engine = self.engine
        types = {DataType.FLOAT: np.float32, DataType.INT32: np.int32, DataType.INT64: np.int64}
        arrays = {}
        for name, address in zip(engine.names, addresses, strict=True):
            kind = np.dtype(types[engine.kind(name)])
            size = int(np.prod(self.shape(name))) * kind.itemsize
            memory = (ctypes.c_char * size).from_address(address)
            arrays[name] = np.frombuffer(memory, kind).reshape(self.shape(name))
        feeds = {
            value.name: arrays[value.name].astype(np.int64 if "int64" in value.type else np.float32)
            for value in engine.inputs
        }
        names = [value.name for value in engine.outputs]
        for name, got in zip(names, engine.session.run(names, feeds), strict=True):
            arrays[name][...] = got[::-1] if os.environ.get("FAKE_TENSORRT_WRONG") else got
        return True


class Context(BaseContext):
    def set_input_shape(self, name, shape):
        return self.set_shape(name, shape)

    def get_tensor_shape(self, name):
        return self.shape(name)


class OldContext(BaseContext):
    def set_binding_shape(self, number, shape):
        return self.set_shape(self.engine.names[number], shape)

    def get_binding_shape(self, number):
        return self.shape(self.engine.names[number])
