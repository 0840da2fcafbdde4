"""PT2E training to a Q/DQ graph: against float64 arithmetic of our own, in both forms, with wrong ones as twins."""

import copy
import functools
import importlib.util
import logging
import sys

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn.utils import fusion

from edgekit.bundle.onnx_file import serialized
from edgekit.compression.guard import Limits
from edgekit.compression.job import Job
from edgekit.compression.measure import outputs_of
from edgekit.compression.recipe import Step
from edgekit.compression.run import check_order
from edgekit.compression.subject import applied, candidate_of, context_of
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.nn.training import tensors
from edgekit.passes import qat_int8
from edgekit.passes.base import Candidate
from edgekit.passes.qat_int8 import QatInt8
from edgekit.passes.static_int8 import StaticInt8
from tests.edgekit.passes import graphs
from tests.edgekit.passes.networks import arguments_of, bundled, trained

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
pytestmark = needs_torchao
CALIBRATION = 200
RECTIFIED = ("stem", "blocks.0.first", "blocks.1.first")  # convolutions of the small net with a Relu behind them


@pytest.fixture(scope="module", autouse=True)
def only_convolutions_in_use():
    """torchao traces 108 patterns of convolutions before batch norms, which takes 18 s; the networks here have two
    dimensions and nothing transposed, so the patterns of the other three functions could match nothing."""
    from torchao.quantization.pt2e import qat_utils

    fold = qat_utils._fold_conv_bn_qat_helper

    def fold_conv2d(graph, function, *arguments, **options):
        return fold(graph, function, *arguments, **options) if function is nn.functional.conv2d else graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat_utils, "_fold_conv_bn_qat_helper", fold_conv2d)
        yield


def test_the_callers_setting_of_logging_comes_back():
    before = logging.root.manager.disable
    try:
        for level in (logging.NOTSET, logging.ERROR):
            logging.disable(level)
            with qat_int8._silence():
                assert logging.root.manager.disable == max(level, logging.WARNING)
            assert logging.root.manager.disable == level
    finally:
        logging.disable(before)


@pytest.fixture(scope="module")
def networks(tiny_bundle, tiny_data):
    """Job by network, trained enough for its numbers to be no accident."""
    found = {"t2": Job(tiny_bundle, [], *tiny_data, Limits(batches=(1, 16)), "error-rate")}
    for kind in ("transformer", "convnet"):
        model, train, test = trained(kind, 2)
        bundle = bundled(kind, arguments_of(kind), model, train)
        found[kind] = Job(bundle, [], train, test.take(np.arange(128)), Limits(batches=(1, 16)), "error-rate")
    return found


def step_of(low, high, scheme):
    return max(-low, high) / 127 if scheme == "s8s8" else (max(high, 0.0) - min(low, 0.0)) / 255


def rounded(x, low, high, scheme):
    """x on 8 bits over a range: 255 steps and a zero point, or 127 of either sign."""
    scale = step_of(low, high, scheme)
    if scheme == "s8s8":
        return torch.clamp(torch.round(x / scale), -127, 127) * scale
    zero = round(-min(low, 0.0) / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


def by_hand(job: Job, scheme: str, bits: int = 7):
    """Outputs on the test rows of the network in float64, its products rounded by hooks; ranges from the training rows
    that the pass draws."""
    model = copy.deepcopy(job.source.model()).double().eval()
    for module in list(model.modules()):
        if isinstance(getattr(module, "norm", None), nn.BatchNorm2d):
            module.first, module.norm = fusion.fuse_conv_bn_eval(module.first, module.norm), nn.Identity()
    ranges = {}

    def on_range(key, x):
        low, high = ranges.setdefault(key, (float(x.min()), float(x.max())))
        return rounded(x, low, high, scheme)

    steps, flat = {}, set()  # of weights; names of modules that run as Conv or Gemm, whose bias is int32

    def enter(module, inputs):
        if inputs[0].ndim == 2 or isinstance(module, nn.Conv2d):
            flat.add(names[module])
        return (on_range(names[module], inputs[0]), *inputs[1:])

    names = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        peak = module.weight.detach().abs().amax(dim=tuple(range(1, module.weight.ndim)), keepdim=True)
        scale = peak / (2 ** (bits - 1) - 1)
        module.weight.data = torch.round(module.weight.data / scale) * scale
        steps[name] = scale.flatten()
        module.register_forward_pre_hook(enter)
        if isinstance(module, nn.Conv2d) and scheme == "u8s8":
            relu = torch.relu if name in RECTIFIED else lambda y: y
            module.register_forward_hook(lambda _, __, y, name=name, relu=relu: on_range(f"{name} out", relu(y)))
    rows = np.sort(np.random.default_rng(job.seed).permutation(len(job.train))[:CALIBRATION])
    with torch.no_grad():
        model(*[x.double() for x in tensors(job.train.take(rows))])
        for name in flat if scheme == "u8s8" else ():
            step = step_of(*ranges[name], scheme) * steps[name]
            bias = model.get_submodule(name).bias
            bias.copy_(torch.round(bias / step) * step)
        return model(*[x.double() for x in tensors(job.test)]).softmax(dim=-1).numpy()


@pytest.fixture(scope="module")
def quantized(networks):
    """quantized(kind, scheme): what the pass makes of a network without training, made once."""
    return functools.cache(lambda kind, scheme: applied(networks[kind], step(scheme=scheme)))


def outputs(job, bundle):
    return outputs_of(Job(job.source, [], job.train, job.test), bundle, candidate_of(bundle))


def step(**parameters):
    return Step("qat_int8", {"epochs": 0, "samples": CALIBRATION, **parameters})


CASES = [("t2", "s8s8"), ("transformer", "u8s8"), ("convnet", "u8s8")]


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_the_graph_computes_what_rounding_by_hand_gives(networks, quantized, kind, scheme):
    job = networks[kind]
    got = outputs(job, quantized(kind, scheme))
    expected = by_hand(job, scheme)
    assert graphs.relative(got, expected) < 1e-3  # a value that lies at a tie may fall either way
    wrong = {
        "not rounded": outputs(job, job.source),
        "8 bits for 7": by_hand(job, scheme, bits=8),
        "the other scheme": by_hand(job, "s8s8" if scheme == "u8s8" else "u8s8"),
    }
    for what, planted in wrong.items():
        assert graphs.relative(got, planted) > 2e-3, what


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_the_forms_hold_what_their_runtimes_read(quantized, kind, scheme):
    candidate = candidate_of(quantized(kind, scheme))
    stored, nodes = graphs.stored(candidate), candidate.model.graph.node
    rounders = [node for node in nodes if node.op_type == "QuantizeLinear"]
    assert rounders
    assert all(node.input[0] not in stored for node in rounders), "a weight is stored in float32 and rounded again"
    zeros = [stored[node.input[2]] for node in rounders]
    assert {zero.dtype for zero in zeros} == {np.dtype(np.uint8 if scheme == "u8s8" else np.int8)}
    assert any(zeros) == (scheme == "u8s8")
    made = {output: node for node in nodes for output in node.output}
    products = [node for node in nodes if node.op_type in ("MatMul", "Gemm", "Conv")]
    weighted = [node for node in products if made[node.input[1]].op_type == "DequantizeLinear"]
    inner = {"t2": 2, "transformer": 4, "convnet": 0}[kind]  # of attention: both factors are activations
    assert len(products) - len(weighted) == inner
    for node in weighted:
        codes = stored[made[node.input[1]].input[0]]
        assert codes.dtype == np.int8
        assert np.abs(codes).max() == 63  # 7 bits, and every channel reaches them
        assert made[node.input[0]].op_type == "DequantizeLinear"
        if node.op_type != "MatMul":
            assert (node.input[2] in stored) == (scheme == "s8s8"), "int32 biases in one scheme, float32 in the other"
    weights = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear" and node.input[0] in stored}
    assert not [node for node in nodes if node.op_type == "Transpose" and node.input[0] in weights]


def test_batches_of_any_length_give_the_same_rows(networks, quantized):
    job, bundle = networks["t2"], quantized("t2", "s8s8")
    whole = outputs(job, bundle)
    shape = candidate_of(bundle).model.graph.input[0].type.tensor_type.shape.dim[0]
    assert shape.dim_param
    for rows in (1, 3, 50):
        part = Job(job.source, [], job.train, job.test.take(np.arange(rows)))
        assert np.allclose(outputs(part, bundle), whole[:rows], atol=1e-6)


def test_training_recovers_what_two_bits_lose_repeats_itself_and_leaves_its_candidate_alone(networks):
    job = networks["t2"]
    candidate = candidate_of(job.source)
    context = context_of(job, candidate.model, 0)
    before = {name: value.tobytes() for name, value in candidate.weights().items()}

    def accuracy(probabilities):
        return float((probabilities.argmax(axis=1) == job.test.labels).mean())

    whole = accuracy(outputs(job, job.source))
    rough = accuracy(graphs.run(QatInt8(weight_bits=2, epochs=0).apply(candidate, context), dict(job.test.inputs)))
    training = QatInt8(weight_bits=2, epochs=3, learning_rate=3e-3)
    first, second = (training.apply(candidate, context) for _ in range(2))
    assert serialized(first.model) == serialized(second.model)
    assert {name: value.tobytes() for name, value in candidate.weights().items()} == before
    assert whole - rough > 0.02, "two bits should hurt, or the test shows nothing"
    assert accuracy(graphs.run(first, dict(job.test.inputs))) > rough + 0.5 * (whole - rough)


def test_evaluating_moves_no_range(networks, monkeypatch):
    """Rows far out of range after training leave the result as it is; planted: with observers left on they do not."""
    from edgekit.passes import qat_int8

    job = networks["t2"]
    wild = Dataset({name: 100 * array for name, array in job.test.inputs.items()}, job.test.labels)

    class SeenError(Exception):
        """The ranges before and after; the graph need not be written."""

    def settled(network, context):
        before(network, context)
        ranges = spread(network)
        network.eval()(*tensors(wild))
        raise SeenError(ranges == spread(network))

    def spread(network):
        return [
            float(value) for name, value in network.named_buffers() if name.endswith("scale") and value.numel() == 1
        ]

    before = qat_int8._settle
    monkeypatch.setattr(qat_int8, "_settle", settled)
    with pytest.raises(SeenError, match="True"):
        applied(job, step())
    before = lambda network, context: None  # noqa: E731
    with pytest.raises(SeenError, match="False"):
        applied(job, step())


def test_what_is_left_alone_says_why(networks):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.inner = nn.Embedding(7, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 7, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x):
            return self.head(self.inner(self.words(x)))

    plan = {change.tensor: change.after for change in QatInt8().plan(Candidate("module", {}, Tied()))}
    assert "not of a Linear" in plan["words.weight"]
    assert plan["inner.weight"].startswith("int8")
    with pytest.raises(EdgekitError, match="not of a Linear"):
        QatInt8(include=("words.*",)).plan(Candidate("module", {}, Tied()))


def test_a_pass_on_the_network_cannot_follow(networks):
    job = networks["t2"]
    with pytest.raises(EdgekitError, match=r"pass 2 \('cluster'\).*qat_int8"):
        check_order(job.source, [Step("qat_int8", {}), Step("cluster", {"bits": 4})])
    check_order(job.source, [Step("cluster", {"bits": 4}), Step("qat_int8", {}), Step("fold", {})])


def test_torch_export_fails_in_one_line(networks, monkeypatch):
    def branches(self, x):
        return x if x.sum() > 0 else -x

    job = networks["transformer"]
    kind = type(job.source.model())
    monkeypatch.setattr(kind, "forward", branches)
    candidate = candidate_of(job.source)
    with pytest.raises(EdgekitError, match=r"cannot capture.*use qat"):
        QatInt8(epochs=0).apply(candidate, context_of(job, candidate.model, 0))


def test_without_torchao_the_error_names_the_extra(networks, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(EdgekitError, match=r"edgekit\[qat\]"):
        applied(networks["t2"], step())


@pytest.mark.parametrize(("options", "words"), [({"scheme": "u8u8"}, "u8s8"), ({"weight_bits": 1}, "weight_bits")])
def test_bad_parameters(options, words):
    with pytest.raises(EdgekitError, match=words):
        QatInt8(**options)


def test_int32_biases_are_the_float_ones(networks, quantized):
    job, candidate = networks["convnet"], candidate_of(quantized("convnet", "u8s8"))
    stored = {item.name: numpy_helper.to_array(item) for item in candidate.model.graph.initializer}
    wanted = job.source.model().head.bias.detach().numpy()
    errors = [
        np.abs(stored[node.input[0]].astype(np.float64) * stored[node.input[1]] - wanted) / stored[node.input[1]]
        for node in candidate.model.graph.node
        if node.op_type == "DequantizeLinear"
        and stored.get(node.input[0], np.zeros(0)).dtype == np.int32
        and stored[node.input[0]].shape == wanted.shape
    ]
    assert len(errors) == 1
    assert errors[0].max() < 0.501  # of a step


def test_a_value_that_is_pooled_and_rounded_again_keeps_its_grid(monkeypatch):
    def grids_around_the_pool(model):
        dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
        (pool,) = (node for node in model.graph.node if node.op_type == "MaxPool")
        (after,) = (node for node in model.graph.node if pool.output[0] in node.input)
        (back,) = (node for node in dequantized.values() if node.input[0] == after.output[0])
        scales = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer}
        return [scales[node.input[1]] for node in (dequantized[pool.input[0]], after, back)]

    border = np.ones((9, 9))
    border[-1] = 2  # the largest values are where the pool does not look
    monkeypatch.setattr("edgekit.passes.static_int8.PICKS", ())
    model = StaticInt8().apply(graphs.pooled(), graphs.context(3, 9, 9, scale=border)).model
    monkeypatch.undo()
    before, after, back = grids_around_the_pool(model)
    assert before != after == back
    qat_int8._share_grids(model)
    assert grids_around_the_pool(model) == [before] * 3
