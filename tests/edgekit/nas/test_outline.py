"""Counts without a network equal those of the network, and of the graph that the runtime runs."""

import io
import warnings
from collections import Counter

import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgekit.cost.memory import peak
from edgekit.cost.profiled import optimized_work
from edgekit.nas.outline import outline
from edgekit.nn import hiera
from edgekit.nn.hiera_config import HieraConfig, arguments, published

CONFIGS = [
    HieraConfig(
        (1, 2, 2, 2), ("rep", "inverted", "window", "global"), (1, 3, 2, 2), (True, True, True), 16, 16, 4, "conv3x2",
        image=64, channels=1, classes=5,
    ),
    HieraConfig((2, 1, 2), ("separable", "inverted", "rep"), (1, 3, 1), (True, False), 16, 16, stem="patch4", image=32),
    HieraConfig((1, 1, 2), ("window", "window", "global"), (2, 3, 4), (True, True), 32, 16, 4, image=64, classes=10),
    HieraConfig((2, 2), ("window", "global"), (2, 3), (False,), 24, 8, 4, "conv3x2", image=32, classes=10),
    HieraConfig((1, 2, 2), ("rep", "levit", "levit"), (1, 2, 3), (True, True), 16, 16, 4, image=64, classes=10),
    HieraConfig((2, 1, 1), ("window", "levit", "global"), (2, 3, 2), (True, True), 32, 16, 4, image=64, classes=10),
]  # fmt: skip


def exported(config: HieraConfig) -> onnx.ModelProto:
    model = hiera.build(fused=True, **arguments(config)).eval()
    image, file = torch.randn(2, config.channels, config.image, config.image), io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            model, (image,), file, opset_version=17, dynamo=False, input_names=["x"], output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_and_operations_are_those_of_the_network(config):
    model = hiera.build(fused=True, **arguments(config)).eval()
    image = torch.randn(3, config.channels, config.image, config.image)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    found = outline(config, 3)
    assert found.parameters == sum(value.numel() for value in model.parameters())
    assert 2 * found.macs == counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS)
def test_operators_are_those_that_the_runtime_runs(config):
    graph = [item for item in optimized_work(exported(config), 1).operators if not item.view and not item.sizes_only]
    ours = [item for item in outline(config).work.operators if not item.view]
    # Conv works on blocks of channels: the way back to images is a Transpose here; the last product is a Gemm
    names = {"ReorderOutput": "Transpose", "Gemm": "MatMul"}
    theirs, found = (Counter(names.get(i.op_type, i.op_type) for i in items) for items in (graph, ours))
    found["Add"] -= 1  # the bias of the last product
    # up to two more, where blocks of one size end and others begin
    assert 0 <= theirs.pop("Transpose", 0) - found.pop("Transpose", 0) <= 2
    assert found == theirs
    mine, other = ([i for i in items if i.product] for items in (ours, graph))
    if "levit" in config.kinds:  # the runtime computes its queries, keys and values in an order of its own
        mine, other = (sorted(items, key=lambda i: (i.columns, i.matrices, i.operations)) for items in (mine, other))
    assert [i.columns for i in mine] == [i.columns for i in other]
    # a convolution of few channels is padded to whole blocks
    for own, their in zip(mine, other, strict=True):
        assert own.matrices == their.matrices
        assert own.operations <= their.operations <= 2 * own.operations


def test_activations_are_near_those_of_the_graph():
    for config in CONFIGS:
        expected = peak(optimized_work(exported(config), 1))[0]
        assert abs(outline(config).activations / expected - 1) < 0.15


def test_the_published_tiny_network():
    found = outline(published((1, 2, 7, 2), 96, 1))
    assert (found.parameters, found.macs) == (27_910_216, 4_900_830_720)
