"""Quantization-aware training: the rounding is that of the int8 pass after it, and training through it helps."""

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgekit.compression.metrics import ClassAveragedLogLoss
from edgekit.compression.recipe import Step
from edgekit.compression.subject import applied, for_pass
from edgekit.errors import EdgekitError
from edgekit.nn.training import probabilities
from edgekit.passes.base import Candidate, Context
from edgekit.passes.qat import Qat, RoundedInput, RoundedWeight
from edgekit.passes.static_int8 import StaticInt8


@pytest.fixture
def candidate(tiny_bundle):
    return Candidate(tiny_bundle.manifest.family, tiny_bundle.manifest.arguments, tiny_bundle.model())


def loss(model, data):
    return ClassAveragedLogLoss().value(probabilities(model, data), data.labels)


def test_training_through_two_bits_recovers_what_rounding_alone_loses(candidate, tiny_data):
    train, test = tiny_data
    context = Context(train, candidate.model, 0)
    before = loss(candidate.model, test)
    rounded = loss(Qat(weight_bits=2, epochs=0).apply(candidate, context).model, test)
    trained = Qat(weight_bits=2, epochs=8, learning_rate=3e-3).apply(candidate, context)
    assert rounded - before > 0.01, "two bits should hurt, or the test shows nothing"
    assert loss(trained.model, test) - before < 0.5 * (rounded - before)
    for module in trained.model.modules():
        assert not module._forward_pre_hooks
        assert not hasattr(module, "parametrizations")
    weight = trained.model.classifier.weight.detach()
    steps = weight / (weight.abs().amax(dim=1, keepdim=True))
    assert torch.allclose(steps, steps.round(), atol=1e-4)


def test_the_int8_pass_after_it_does_not_move_the_weights(tiny_job):
    job = tiny_job([])
    bundle = applied(job, Step("qat", {"epochs": 1}))
    model = bundle.model()
    graph = for_pass(StaticInt8(), Candidate(bundle.manifest.family, bundle.manifest.arguments, model), job)
    after = StaticInt8(samples=32).apply(graph, Context(job.train, model, 0))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.model.graph.initializer}
    wanted = model.blocks[0].expand.weight.detach().numpy().T  # a MatMul holds it the other way round
    node = next(
        node
        for node in after.model.graph.node
        if node.op_type == "DequantizeLinear" and "expand.weight" in node.input[0]
    )
    codes, scale = (stored[name].astype(np.float32) for name in node.input[:2])
    assert np.allclose(codes * scale, wanted, atol=1e-6)
    untrained = job.source.model().blocks[0].expand.weight.detach().numpy().T  # planted: off the grid
    peak = np.abs(untrained).max(axis=0)
    assert not np.allclose(np.round(untrained / (peak / 63)) * (peak / 63), untrained, atol=1e-6)


def test_weights_and_inputs_are_rounded_as_the_formula_says():
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (4, 6)).astype(np.float32)
    scale = np.abs(weight).max(axis=1, keepdims=True) / 63
    assert np.allclose(RoundedWeight(7)(torch.from_numpy(weight)).numpy(), np.round(weight / scale) * scale, atol=1e-6)

    x = rng.normal(0.3, 1, (8, 5)).astype(np.float32)
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / 255
    zero = round(-low / step)
    expected = (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
    layer = nn.Linear(5, 2)
    (found,) = RoundedInput(8)(layer, (torch.from_numpy(x),))
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_the_range_is_learnt_while_training_only():
    hook, layer = RoundedInput(8), nn.Linear(1, 1)
    hook(layer, (torch.tensor([[-1.0], [1.0]]),))
    hook(layer.eval(), (torch.tensor([[-100.0], [100.0]]),))
    assert (hook.low, hook.high) == (-1, 1)
    hook(layer.train(), (torch.tensor([[-100.0], [100.0]]),))
    assert hook.high == pytest.approx(0.99 + 0.01 * 100)


def test_gradients_pass_straight_through():
    weight = torch.randn(3, 4, requires_grad=True)
    RoundedWeight(4)(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))


@pytest.mark.parametrize(
    ("options", "words"), [({"weight_bits": 1}, "weight_bits"), ({"activation_bits": 9}, "activation_bits")]
)
def test_bad_parameters(options, words):
    with pytest.raises(EdgekitError, match=words):
        Qat(**options)


def test_nothing_left_to_train(candidate):
    with pytest.raises(EdgekitError, match="no weight matches"):
        Qat(include=("nothing.*",)).plan(candidate)
