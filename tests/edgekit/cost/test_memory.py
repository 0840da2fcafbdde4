"""Memory by liveness, against a simulation that allocates and frees."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.cost.memory import memory, peak, size_text
from edgekit.cost.operators import VIEWS, work
from edgekit.cost.roofline import estimate
from edgekit.errors import EdgekitError
from edgekit.graph.shapes import sized
from edgekit.targets import profile
from edgekit.targets.profile import Figure


def random_graph(seed, nodes=40):
    """Return a graph of additions, multiplications and reshapes of values of several sizes, some of which are read late
    or never again."""
    rng = np.random.default_rng(seed)
    sizes = {"x0": 60, "x1": 360}
    made = []
    for number in range(nodes):
        operator = rng.choice(["Relu", "Mul", "Reshape", "Concat", "Slice"])
        name, to = str(rng.choice(list(sizes))), f"v{number}"
        if operator == "Relu":
            made.append(helper.make_node("Relu", [name], [to], f"n{number}"))
            sizes[to] = sizes[name]
        elif operator == "Mul":
            others = [item for item in sizes if sizes[item] == sizes[name]]
            made.append(helper.make_node("Mul", [name, str(rng.choice(others))], [to], f"n{number}"))
            sizes[to] = sizes[name]
        elif operator == "Reshape":
            made.append(helper.make_node("Reshape", [name, "flat"], [to], f"n{number}"))
            sizes[to] = sizes[name]
        elif operator == "Concat":
            made.append(helper.make_node("Concat", [name, name], [to], f"n{number}", axis=0))
            sizes[to] = 2 * sizes[name]
        else:
            made.append(helper.make_node("Slice", [name, "zero", "ten"], [to], f"n{number}"))
            sizes[to] = 10
    outputs = ["v3", f"v{nodes - 1}"]
    graph = helper.make_graph(
        made,
        "random",
        [
            helper.make_tensor_value_info("x0", TensorProto.FLOAT, (60,)),
            helper.make_tensor_value_info("x1", TensorProto.FLOAT, (360,)),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.array([value]), name) for name, value in (("flat", -1), ("zero", 0), ("ten", 10))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def simulated(model, values):
    """Return the largest number of bytes at once in an allocator with reference counts."""
    stored = {item.name for item in model.graph.initializer}
    owner = {item.name: item.name for item in model.graph.input}
    uses = {}
    for node in model.graph.node:
        for name in node.input:
            if name not in stored:
                uses[name] = uses.get(name, 0) + 1
    for item in [*model.graph.input, *model.graph.output]:
        uses[item.name] = uses.get(item.name, 0) + 1  # the caller's, never let go of
    buffers = {item.name: [values[item.name].bytes, uses[item.name]] for item in model.graph.input}
    most = 0.0
    for node in model.graph.node:
        (to,) = node.output
        if node.op_type in VIEWS:
            owner[to] = owner[node.input[0]]
            buffers[owner[to]][1] += uses.get(to, 0)
        else:
            owner[to] = to
            buffers[to] = [values[to].bytes, uses.get(to, 0)]
        most = max(most, sum(size for size, _ in buffers.values()))
        for name in [item for item in node.input if item not in stored]:
            buffers[owner[name]][1] -= 1
        for name in [name for name, (_, count) in buffers.items() if count <= 0]:
            del buffers[name]
    return most


@pytest.mark.parametrize("seed", range(25))
def test_the_peak_is_what_an_allocator_sees(seed):
    model = random_graph(seed)
    sizes = sized(model, 1)
    done = work(model, sizes)
    assert peak(done)[0] == simulated(model, sizes.values)


def test_planted_keeping_everything_or_nothing_would_be_found():
    model = random_graph(0)
    sizes = sized(model, 1)
    everything = sum(sizes.values[name].bytes for node in model.graph.node for name in node.output)
    largest = max(sizes.values[name].bytes for node in model.graph.node for name in node.output)
    assert largest < peak(work(model, sizes))[0] < everything


def chain(rows, width=1000):
    weights = numpy_helper.from_array(np.zeros((width, width), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], "product"), helper.make_node("Relu", ["h"], ["y"], "relu")],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", width))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return work(model, sized(model, rows))


def test_weights_activations_and_a_reserve():
    target = profile.find("jetson-orin-nano-4gb")
    found = memory(chain(10), target)
    assert found.weights == 4e6
    assert (found.activations, found.at) == (3 * 40_000, "relu")  # x, h and y
    assert found.needed == 4e6 + 120_000 + found.reserve
    assert found.reserve > memory(chain(10), profile.find("tesla-p40")).reserve, "it shares with the system"
    assert found.fits


def test_a_model_that_does_not_fit_says_so_with_the_numbers():
    small = replace(profile.find("tesla-p40"), memory=Figure(0.7e9, "assumed"))
    estimate(chain(1000), small, 1000).check_memory()
    found = estimate(chain(10_000), small, 10_000)
    assert not found.memory.fits
    numbers = r"not fit on tesla-p40 at batch size 10000: weights 4 MB \+ activations 120 MB"
    with pytest.raises(EdgekitError, match=numbers):
        found.check_memory()
    assert "DOES NOT FIT in 700 MB" in str(found.memory)


def test_half_precision_takes_half():
    target = profile.find("rtx-3060-12gb")
    full, half = (estimate(chain(10), target, 10, precision=name).memory for name in ("float32", "float16"))
    assert (half.weights, half.activations) == (full.weights / 2, full.activations / 2)


def test_sizes_for_people():
    texts = [size_text(count) for count in (12, 1.5e3, 66_264, 3.55e8, 1.41e11)]
    assert texts == ["12 B", "1.5 kB", "66.3 kB", "355 MB", "141 GB"]
