"""Networks by the Python function that builds them, less what was pruned."""

import pytest
import torch
from torch import nn

from edgekit.bundle.family import tied
from edgekit.errors import EdgekitError
from edgekit.nn.module import build, positions, ranges, remove, trust

HERE = __name__


def perceptron(hidden: int = 6):
    return nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 2))


def no_network():
    return 3


@pytest.mark.parametrize(("indices", "text"), [([0, 3, 4, 5], "0,3-5"), ([7], "7"), ([0, 1], "0-1"), ([2, 0], "0,2")])
def test_ranges(indices, text):
    assert ranges(indices) == text
    assert positions(text) == sorted(indices)


def test_what_is_removed_is_gone_and_layers_say_so():
    whole = perceptron().eval()
    norm = [f"1.{key}:0" for key in ("weight", "bias", "running_mean", "running_var")]
    steps = [{"removed": "1,4-5", "from": ["0.weight:0", "0.bias:0", "3.weight:1"]}, {"removed": "1,4-5", "from": norm}]
    cut = remove(perceptron(), steps).eval()
    assert (cut[0].out_features, cut[1].num_features, cut[3].in_features) == (3, 3, 3)
    kept = [0, 2, 3]
    with torch.no_grad():
        for name, value in cut.state_dict().items():
            source = whole.state_dict()[name]
            value.copy_(source[:, kept] if name == "3.weight" else source[kept] if source.shape[:1] == (6,) else source)
        whole[3].weight[:, [1, 4, 5]] = 0
        rows = torch.randn(5, 3)
        assert torch.allclose(cut(rows), whole(rows), atol=1e-6)


def test_a_tied_weight_stays_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert tied(model) == {"head.weight": "embed.weight"}
    remove(model, [{"removed": "2", "from": ["embed.weight:1"]}])
    assert model["head"].weight is model["embed"].weight
    assert model["head"].weight.shape == (5, 3)
    assert model["embed"].embedding_dim == 3


@pytest.mark.parametrize(
    "step",
    [
        {"removed": "9", "from": ["0.weight:0"]}, {"removed": "0", "from": ["9.weight:0"]},
        {"removed": "x", "from": ["0.weight:0"]}, {"removed": "0", "from": ["0.weight:7"]},
        {"removed": "9", "blocks": ""}, {"attributes": {"0.forward": 1}},
        {"attributes": {"0.nothing": 1}}, {"attributes": {"0.in_features": "import os"}},
    ],
)  # fmt: skip
def test_a_list_that_does_not_fit_is_an_error(step):
    with pytest.raises(EdgekitError, match="do not fit the network that the factory builds now"):
        remove(perceptron(), [step])


def test_only_trusted_functions_are_run():
    with pytest.raises(EdgekitError, match=rf"edgekit --trust {HERE}:perceptron"):
        build(f"{HERE}:perceptron")
    trust(f"{HERE}:perceptron")
    assert build(f"{HERE}:perceptron", {"hidden": 4})[0].out_features == 4
    trust(f"{HERE}:no_network")
    with pytest.raises(EdgekitError, match=r"gives a int; expected a torch.nn.Module"):
        build(f"{HERE}:no_network")


def test_a_list_of_removed_parts_that_fills_the_memory_is_refused():
    with pytest.raises(EdgekitError, match="more than 10,000,000 parts are removed at once"):
        remove(perceptron(), [{"removed": "0-99999999999", "from": ["0.weight:0"]}])
