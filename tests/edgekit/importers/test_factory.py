"""Axes of the outputs, found by making the inputs longer, and names of tied parameters."""

import sys

import numpy as np
import pytest

from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers.factory import from_factory

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.scale = form, nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = x * self.scale
        return {
            "same": lambda: x,
            "pairs": lambda: torch.cat([x, x], 1),
            "padded": lambda: nn.functional.pad(x, (0, 0, 0, 1)),
            "mean": lambda: x.mean(1),
            "halved": lambda: x[:, ::2],
            "two": lambda: (x.sum(2), x.mean((1, 2))),
        }[self.form]()

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))

def build(form="same"):
    return Net(form)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "odd_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("edgekit.nn.module._trusted", set())
    yield "odd_nets"
    sys.modules.pop("odd_nets", None)


def imported(nets, form, axes, outputs=("y",)):
    inputs = [TensorSpec("x", ("batch", *axes))]
    return from_factory(f"{nets}:build", arguments={"form": form}, weights=None, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize(
    ("form", "axes", "expected"),
    [
        ("same", ("time", 3), ("batch", "time", 3)),
        ("same", ("time", "band"), ("batch", "time", "band")),
        ("same", ("4*faces", 3), ("batch", "4*faces", 3)),
        ("pairs", ("time", 3), ("batch", "2*time", 3)),
        ("pairs", ("4*faces", 3), ("batch", "8*faces", 3)),
        ("padded", ("time", 3), ("batch", "y_1", 3)),  # one more than the input is no multiple of it
        ("mean", ("time", 3), ("batch", 3)),
        ("mean", (5, "band"), ("batch", "band")),
        ("halved", ("4*faces", 3), ("batch", "2*faces", 3)),
        ("same", (5, 3), ("batch", 5, 3)),
    ],
)
def test_axes_that_grow_with_an_input_carry_its_name(nets, form, axes, expected):
    assert imported(nets, form, axes).manifest.outputs[0].shape == expected


def test_each_output_has_its_own_axes(nets):
    bundle = imported(nets, "two", ("time", 3), ("sums", "means"))
    assert [(spec.name, spec.shape) for spec in bundle.manifest.outputs] == [
        ("sums", ("batch", "time")),
        ("means", ("batch",)),
    ]
    inputs, outputs = bundle.golden()
    assert np.allclose(outputs["sums"], inputs["x"].sum(axis=2), atol=1e-6)


def test_a_tied_parameter_is_stored_once_and_comes_back_tied(nets):
    specs = [TensorSpec("x", ("batch", 3))]
    bundle = from_factory(f"{nets}:Tied", arguments={}, weights=None, inputs=specs, outputs=["y"])
    assert list(bundle.weights()) == ["first.weight"]
    model = bundle.model()
    assert model.second.weight is model.first.weight
    inputs, outputs = bundle.golden()
    weight = bundle.weights()["first.weight"]
    assert np.allclose(outputs["y"], inputs["x"] @ weight.T @ weight.T, atol=1e-6)


def test_given_weights_are_the_networks_and_others_are_refused(nets):
    def with_weights(**weights):
        specs = [TensorSpec("x", ("batch", 2))]
        return from_factory(f"{nets}:build", arguments={}, weights=weights, inputs=specs, outputs=["y"])

    bundle = with_weights(scale=np.array([3.0], np.float32))
    inputs, outputs = bundle.golden()
    assert np.allclose(outputs["y"], 3 * inputs["x"])
    with pytest.raises(EdgekitError, match="weights do not fit"):
        with_weights(scale=np.ones(2, np.float32))
    with pytest.raises(EdgekitError, match="weights do not fit"):
        with_weights(scael=np.ones(1, np.float32))


def test_a_network_that_does_not_run_says_on_which_shapes(nets):
    with pytest.raises(EdgekitError, match=r"odd_nets:build: does not run on inputs of shapes .*\(8,\)") as caught:
        imported(nets, "pairs", ())
    assert "\n" not in str(caught.value)
