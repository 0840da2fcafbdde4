"""Small ONNX graphs, data for them and a way to run them, for the tests of passes on graphs."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgekit.data.dataset import Dataset
from edgekit.passes.base import Context, GraphCandidate

OPSET = 17


def tensor(name, array):
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def graph(nodes, tensors, inputs, outputs, opset=OPSET):
    """A checked candidate. nodes: (operator, inputs, output, attributes); inputs, outputs: {name: shape}."""
    made = [
        helper.make_node(operator, reads.split(), [to], name=f"{to}.{operator}", **attributes)
        for operator, reads, to, attributes in nodes
    ]
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in part.items()]
        for part in (inputs, outputs)
    ]
    stored = [tensor(name, np.asarray(array)) for name, array in tensors.items()]
    model = helper.make_model(
        helper.make_graph(made, "small", *values, stored), opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return GraphCandidate(model)


def normal(seed, *shape, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def mlp(inner=48):
    """x (batch, 32) -> MatMul + bias, Relu -> Gemm with transB -> y (batch, 10)."""
    return graph(
        [
            ("MatMul", "x up", "h0", {}),
            ("Add", "h0 up.bias", "h1", {}),
            ("Relu", "h1", "h2", {}),
            ("Gemm", "h2 down down.bias", "y", {"transB": 1}),
        ],
        {
            "up": normal(1, 32, inner, scale=0.2),
            "up.bias": normal(2, inner, scale=0.1),
            "down": normal(3, 10, inner, scale=0.2),
            "down.bias": normal(4, 10, scale=0.1),
        },
        {"x": ("batch", 32)},
        {"y": ("batch", 10)},
    )


def convolutional():
    """x (batch, 3, 8, 8) -> Conv, BatchNormalization, Relu -> Conv -> mean -> Gemm -> y (batch, 5)."""
    return graph(
        [
            ("Conv", "x c1 c1.bias", "a", {"pads": [1, 1, 1, 1]}),
            ("BatchNormalization", "a gamma beta mean variance", "b", {"epsilon": 1e-3}),
            ("Relu", "b", "c", {}),
            ("Conv", "c c2", "d", {"strides": [2, 2]}),
            ("GlobalAveragePool", "d", "e", {}),
            ("Flatten", "e", "f", {}),
            ("Gemm", "f out out.bias", "y", {}),
        ],
        {
            "c1": normal(1, 12, 3, 3, 3, scale=0.3),
            "c1.bias": normal(2, 12),
            "gamma": normal(3, 12),
            "beta": normal(4, 12),
            "mean": normal(5, 12),
            "variance": normal(6, 12) ** 2 + 0.1,
            "c2": normal(7, 16, 12, 3, 3, scale=0.2),
            "out": normal(8, 16, 5),
            "out.bias": normal(9, 5),
        },
        {"x": ("batch", 3, 8, 8)},
        {"y": ("batch", 5)},
    )


def pooled():
    """x (batch, 3, 9, 9) -> Conv, Relu -> pool, whose border of one pixel has no use -> Conv, Relu -> Gemm -> y."""
    return graph(
        [
            ("Conv", "x c1 c1.bias", "a", {}),
            ("Relu", "a", "b", {}),
            ("MaxPool", "b", "c", {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("Conv", "c c2 c2.bias", "d", {}),
            ("Relu", "d", "e", {}),
            ("Flatten", "e", "f", {}),
            ("Gemm", "f out out.bias", "y", {}),
        ],
        {
            "c1": normal(1, 16, 3, 3, 3, scale=0.3),
            "c1.bias": normal(2, 16),
            "c2": normal(7, 16, 16, 2, 2, scale=0.2),
            "c2.bias": normal(3, 16),
            "out": normal(8, 64, 5),
            "out.bias": normal(9, 5),
        },
        {"x": ("batch", 3, 9, 9)},
        {"y": ("batch", 5)},
    )


def block():
    """A transformer block without attention: x (batch, 6, 32) -> normalized -> up, Relu, down -> + x -> y."""
    return graph(
        [
            ("LayerNormalization", "x gamma beta", "n", {"axis": -1}),
            ("MatMul", "n up", "h0", {}),
            ("Add", "h0 up.bias", "h1", {}),
            ("Relu", "h1", "h2", {}),
            ("MatMul", "h2 down", "h3", {}),
            ("Add", "x h3", "y", {}),
        ],
        {
            "gamma": normal(1, 32) + 2,
            "beta": normal(2, 32, scale=0.1),
            "up": normal(3, 32, 64, scale=0.2),
            "up.bias": normal(4, 64, scale=0.1),
            "down": normal(5, 64, 32, scale=0.2),
        },
        {"x": ("batch", 6, 32)},
        {"y": ("batch", 6, 32)},
    )


def dictionary():
    """One sparse-coding step of a CRATE block: relu(x + eta (x D - x D D^T) - eta lambda), D used as itself and
    transposed; then a matrix of its own."""
    return graph(
        [
            ("Transpose", "D", "Dt", {"perm": [1, 0]}),
            ("MatMul", "x D", "a", {}),
            ("MatMul", "a Dt", "b", {}),
            ("Sub", "a b", "c", {}),
            ("Mul", "c eta", "d", {}),
            ("Add", "x d", "e", {}),
            ("Sub", "e threshold", "f", {}),
            ("Relu", "f", "g", {}),
            ("MatMul", "g out", "y", {}),
        ],
        {
            "D": normal(1, 32, 32, scale=0.2),
            "eta": np.float32(0.1),
            "threshold": np.float32(0.01),
            "out": normal(2, 32, 32, scale=0.2),
        },
        {"x": ("batch", 32)},
        {"y": ("batch", 32)},
    )


def run(candidate, inputs, *names, optimized=True):
    """Outputs (or other values, by name) of the candidate under onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = candidate.copy_model()
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {"x": inputs} if isinstance(inputs, np.ndarray) else inputs
    outputs = session.run(list(names) or None, arrays)
    return outputs[0] if len(outputs) == 1 else outputs


def context(*shape, seed=0, rows=200, scale=None):
    """Calibration data x of this shape; `scale`: of its features."""
    x = normal(seed + 100, rows, *shape) * (1 if scale is None else np.asarray(scale, np.float32))
    return Context(Dataset({"x": x}, np.zeros(rows, np.int64)), None, seed=seed)


def stored(candidate):
    """The tensors of the file by name."""
    return {item.name: numpy_helper.to_array(item) for item in candidate.model.graph.initializer}


def operators(candidate):
    return [node.op_type for node in candidate.model.graph.node]


def size(candidate):
    return len(candidate.model.SerializeToString())


def relative(got, expected):
    """||got - expected|| / ||expected|| in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
