"""Weights that two modules share: one set of codes, stored once, and still one weight when the bundle is opened."""

import sys

import numpy as np
import pytest
import torch

from edgekit.bundle.family import tied
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.bundle.tensors import parse_spec
from edgekit.compression.job import Job
from edgekit.compression.recipe import Step
from edgekit.compression.subject import applied
from edgekit.data.dataset import Dataset
from edgekit.importers.factory import from_factory

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

def build():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "tied_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    source = from_factory(
        "tied_nets:build",
        arguments={},
        weights=None,
        inputs=[parse_spec("x:float32:batch,12")],
        outputs=["probabilities"],
    )
    rng = np.random.default_rng(0)
    rows = Dataset({"x": rng.normal(0, 1, (90, 12)).astype(np.float32)}, np.arange(90) % 3)
    yield Job(source, [], rows, rows)
    sys.modules.pop("tied_nets", None)


@pytest.mark.parametrize(
    "step",
    [
        Step("cluster", {"bits": 3, "epochs": 1}), Step("quantize", {"bits": 4, "epochs": 1}),
        Step("magnitude_prune", {"sparsity": 0.5, "epochs": 1}),
    ],
    ids=lambda step: step.name,
)  # fmt: skip
def test_a_tied_weight_stays_tied(step, job, tmp_path):
    assert tied(job.source.model()) == {"second.weight": "first.weight"}
    bundle = write_bundle(applied(job, step), tmp_path / "tied.edge")
    opened = open_bundle(tmp_path / "tied.edge")
    assert "second.weight" not in opened.weights(), "stored twice"
    model = opened.model()
    assert tied(model) == {"second.weight": "first.weight"}
    weight = model.first.weight.detach().numpy()
    if step.name == "cluster":
        assert len(np.unique(weight)) <= 8
    inputs, outputs = bundle.golden()
    with torch.no_grad():
        again = model(torch.from_numpy(inputs["x"])).softmax(-1).numpy()
    assert np.array_equal(again, outputs["probabilities"])
    assert not np.array_equal(weight, job.source.model().first.weight.detach().numpy())
