"""What passes share: choice of weights, recovery training, parametrizations of tied weights, and the contract."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.bundle.family import tied
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.passes import base
from edgekit.passes.base import Candidate, Change, Context, Level, Pass, at_least, matrices, problem_with
from edgekit.passes.quantize import Quantize


class Block(nn.Module):
    """Two layers that share a matrix, one inside the other's container, and a head of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
        self.inner[0].weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(self.first(x)))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (("*",), ["first.weight", "head.weight"]),
        (("head.*", "nothing"), ["head.weight"]),
        (("*.bias",), r"no weight matches \*.bias; the model has first.weight, head.weight"),
        (("a", "b"), "no weight matches a, b;"),
    ],
)
def test_matrices_by_pattern(include, expected):
    if isinstance(expected, str):
        with pytest.raises(EdgekitError, match=expected):
            matrices(Block(), include)
    else:
        assert matrices(Block(), include) == expected


@pytest.mark.parametrize("value", [1, 2.5, 3])
def test_a_number_in_its_range(value):
    at_least("bits", value, 1, 3)


@pytest.mark.parametrize("value", [0.99, 3.01, float("nan"), "2", None])
def test_a_number_out_of_its_range_is_named(value):
    with pytest.raises(EdgekitError, match=r"bits = .*; expected 1 to 3"):
        at_least("bits", value, 1, 3)


def test_a_parametrization_of_a_tied_weight_is_one_parameter_until_it_is_removed():
    model = Block()
    before = model.first.weight.detach().clone()
    base.register(model, "first.weight", Doubled())
    names = [name for name, _ in model.named_parameters() if "weight" in name]
    assert names == ["first.parametrizations.weight.original", "head.weight"]
    for layer in (model.first, model.inner[0]):
        assert torch.equal(layer.weight, 2 * before)
    with torch.no_grad():
        model.first.parametrizations.weight.original.add_(1)
    assert torch.equal(model.inner[0].weight, 2 * (before + 1)), "training one trains both"
    trained = base.unregister(model, "first.weight")
    assert torch.equal(trained, before + 1)
    assert tied(model) == {"inner.0.weight": "first.weight"}
    assert torch.equal(model.first.weight, 2 * (before + 1))
    assert not hasattr(model.inner[0], "parametrizations")


def test_only_the_parametrization_of_that_weight_is_removed():
    model = Block()
    for name in ("first.weight", "head.weight"):
        base.register(model, name, Doubled())
    base.unregister(model, "head.weight")
    names = {name for name, _ in model.named_parameters()}
    assert {"head.weight", "first.parametrizations.weight.original"} <= names
    assert base.owner(model, "inner.0.bias") == (model.inner[0], "bias")


def rows(labels):
    return Dataset({"x": np.random.default_rng(0).normal(size=(len(labels), 4)).astype(np.float32)}, np.asarray(labels))


@pytest.mark.parametrize(
    ("labels", "distillation"), [([0, 1, 2, 0], 0.5), ([-1] * 4, 1.0), ([0, -1, -1, -1], 0.5), ([0.5] * 4, 0.5)]
)
def test_recovery_learns_from_labels_and_from_the_original_model(labels, distillation, monkeypatch):
    """The training itself is tested elsewhere; here: what it is asked for."""
    asked, progress = [], []

    def fit(model, data, schedule, *, seed, teacher, progress):
        asked.append((model, data, schedule, seed, teacher))
        progress(1, 3, 0.7)
        return model

    monkeypatch.setattr(base, "fit", fit)
    model, teacher, data = Block(), Block(), rows(labels)
    context = Context(data, teacher, 7, lambda *step: progress.append(step))
    assert base.recover(model, context, 3, 0.02, "stage") is model
    ((trained, given, schedule, seed, by),) = asked
    assert trained is model
    assert given is data
    assert by is teacher
    assert (schedule.epochs, schedule.learning_rate, schedule.distillation, seed) == (3, 0.02, distillation, 7)
    assert progress == [("stage", 1, 3)]


def test_no_epochs_train_nothing_and_epochs_need_a_network():
    model, context = Block().train(), Context(rows([0, 1]), None, 0)
    assert base.recover(model, context, 0, 0.1, "stage") is model
    assert not model.training
    with pytest.raises(EdgekitError, match="stage: there is no network to train; set epochs = 0"):
        base.recover(model, context, 1, 0.1, "stage")
    with pytest.raises(EdgekitError, match="this pass ends in a graph"):
        context.lower(model)
    assert context.progress("stage", 1, 2) is None


def softmax_loss(logits, labels, weights):
    """Cross-entropy by its definition, in float64."""
    logits = logits.double().numpy()
    each = -np.log(np.exp(logits)[np.arange(len(labels)), labels] / np.exp(logits).sum(axis=1))
    return (each * weights[labels]).sum() / weights[labels].sum()


def test_the_loss_is_that_of_the_labels_or_of_the_original_output():
    generator = torch.Generator().manual_seed(0)
    output, original = (torch.randn(4, 3, generator=generator) for _ in range(2))
    labels, everything = np.array([0, 1, 2, 0]), np.array([0, 0, 0, 0, 1, 2])
    weights = base.balanced_class_weights(everything, 3).double().numpy()
    assert len(set(weights)) > 1
    found = base.loss(output, labels, everything, original)
    assert float(found) == pytest.approx(softmax_loss(output, labels, weights), rel=1e-6)
    unlabelled = np.array([0, 1, 2, -1])
    found = base.loss(output, unlabelled, unlabelled, original)
    assert float(found) == pytest.approx(softmax_loss(output, original.argmax(1).numpy(), np.ones(3)), rel=1e-6)
    numbers = np.arange(12, dtype=np.float32)
    found = base.loss(output, numbers, numbers, original)
    assert float(found) == pytest.approx(((output.numpy().ravel() - numbers) ** 2).mean(), rel=1e-6)
    deep, other = output[:, :, None], original[:, :, None]
    found = base.loss(deep, labels, everything, other)
    assert float(found) == pytest.approx(float(((deep - other) ** 2).mean()), rel=1e-6)


def test_synthetic_rows_of_the_inputs_that_a_network_describes():
    described = {"inputs": {"x": "float32:batch,4", "mask": "int64:batch,2"}}
    x, mask = base.example_inputs(Candidate("module", described, Block()))
    assert (tuple(x.shape), x.dtype, tuple(mask.shape), mask.dtype) == ((2, 4), torch.float32, (2, 2), torch.int64)
    with pytest.raises(EdgekitError, match="does not say what its network is called with; import the model again"):
        base.example_inputs(Candidate("module", {}, Block()))


def test_weights_of_a_candidate_are_copies_under_their_first_names():
    model = Block()
    weights = Candidate("module", {}, model).weights()
    assert set(weights) == set(model.state_dict()) - {"inner.0.weight"}
    weights["head.weight"][:] = 0
    assert model.head.weight.abs().min() > 0


@dataclass(frozen=True, slots=True)
class Good(Pass[Candidate]):
    name: ClassVar[str] = "good"
    summary: ClassVar[str] = "do nothing"
    epochs_parameter: ClassVar[str] = "rounds"
    rounds: int = 3
    rate: float = 0.1

    def plan(self, candidate):
        return [Change("w", "a", "b")]

    def apply(self, candidate, context):
        return candidate


def broken(**attributes):
    """Good with other class attributes."""
    return type("Broken", (Good,), {"__slots__": (), **attributes})


class NotFrozen(Pass[Candidate]):
    name, summary = "good", "a class without parameters"


@dataclass(slots=True)
class NotFrozenEither(Pass[Candidate]):
    name: ClassVar[str] = "good"


@dataclass(frozen=True, slots=True)
class NoPlan(Pass[Candidate]):
    name: ClassVar[str] = "good"
    summary: ClassVar[str] = "plan nothing"

    def apply(self, candidate, context):
        return candidate


@pytest.mark.parametrize(
    ("pass_class", "problem"),
    [
        (Good, ""),
        (broken(level=Level.GRAPH), ""),
        (Good(), "it does not derive from edgekit.passes.base.Pass"),
        (dict, "it does not derive from edgekit.passes.base.Pass"),
        (NotFrozen, "it is not a frozen dataclass"),
        (NotFrozenEither, "it is not a frozen dataclass"),
        (broken(summary=None), "it declares no 'summary'"),
        (broken(name=7, summary=7), "it declares no 'name'"),
        (broken(name="other"), "its name is 'other', and it is registered as 'good'"),
        (NoPlan, "it has no method 'plan'"),
        (broken(level="both"), "its level is 'both'; expected network or graph"),
        *(
            (broken(**{role: "side"}), f"its {role} is 'side', which is not among its parameters rate, rounds")
            for role in base.PARAMETERS
        ),
    ],
)
def test_the_contract_of_a_pass(pass_class, problem):
    assert problem_with(pass_class, "good") == problem


def test_what_a_pass_declares_is_found(register):
    register("edgekit.passes", "good", Good)
    assert base.load_pass("good") is Good
    assert list(base.parameters_of(Good)) == ["rounds", "rate"]
    assert Good().without_training() == replace(Good(), rounds=0)
    plain = broken(epochs_parameter="", computes_in=("int8",))()
    assert plain.without_training() is plain
    assert (plain.precisions(), Quantize().precisions()) == (("int8",), ())
    register("edgekit.passes", "bad", Good)
    with pytest.raises(EdgekitError, match=r"'bad'.*its name is 'good'"):
        base.load_pass("bad")
