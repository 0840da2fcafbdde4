"""A captured network in its two modes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgekit.bundle.tensors import TensorSpec
from edgekit.nn.exported import Exported, dynamic_shapes, example

SPECS = (TensorSpec("x", ("batch", 6)),)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        x = F.dropout(self.norm(self.inner(x)), 0.1, self.training)
        heads = x.reshape(-1, 1, 3, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2 if self.training else 0.0)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    net = Net().train()
    program = torch.export.export(net, example(SPECS), dynamic_shapes=dynamic_shapes(SPECS))
    return net, Exported(program.module(check_guards=False))


def rates(exported):
    return [
        next(arg for arg in (*node.args[1:], *node.kwargs.values()) if isinstance(arg, float))
        for node in exported.graph.graph.nodes
        if "dropout" in str(node.target)
    ]


def test_evaluation_is_the_networks_own_and_training_its_own_again(pair):
    net, exported = pair
    x = torch.randn(5, 6)
    for _ in range(2):  # there and back
        assert torch.allclose(exported.eval()(x), net.eval()(x), atol=1e-6)
        exported.train(), net.train()
        torch.manual_seed(1)
        found = exported(x)
        torch.manual_seed(1)
        assert torch.allclose(found, net(x), atol=1e-6)
        assert rates(exported) == [0.1]
    assert torch.allclose(exported.graph.norm.running_mean, net.norm.running_mean, atol=1e-6)


def test_a_copy_has_a_mode_of_its_own(pair):
    _, exported = pair
    other = copy.deepcopy(exported).eval()
    x = torch.randn(64, 6)
    assert torch.equal(other(x), other(x))
    assert not torch.equal(exported(x), exported(x))


def test_planted_torchaos_own_switch_changes_the_rate(pair):
    export = pytest.importorskip("torchao.quantization.pt2e")
    _, exported = pair
    export.move_exported_model_to_eval(exported.graph)
    export.move_exported_model_to_train(exported.graph)
    assert rates(exported) != [0.1]  # if this fails, it has been repaired there
