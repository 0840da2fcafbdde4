"""Removing blocks: the one that does nothing goes first, and the bundle alone gives the shorter network again."""

import numpy as np
import pytest
import torch

from edgekit.bundle.family import build
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.data.dataset import UNKNOWN, Dataset
from edgekit.errors import EdgekitError
from edgekit.nn.module import trust
from edgekit.nn.training import probabilities
from edgekit.passes.base import Candidate, Context
from edgekit.passes.remove_layers import RemoveLayers, sensitivity
from tests.edgekit.passes.networks import Transformer, accuracy, arguments_of, bundled, trained

IDLE = 1


@pytest.fixture(scope="module")
def problem():
    """A trained transformer of two blocks with a third between them that passes its input on."""
    short, train, test = trained("transformer", 12)
    arguments = {**arguments_of("transformer"), "arguments": {"depth": 3}}
    model = build("module", arguments)
    model.blocks[0].load_state_dict(short.blocks[0].state_dict())
    model.blocks[2].load_state_dict(short.blocks[1].state_dict())
    rest = {key: value for key, value in short.state_dict().items() if not key.startswith("blocks")}
    model.load_state_dict(rest, strict=False)
    with torch.no_grad():
        for layer in (model.blocks[IDLE].attn.proj, model.blocks[IDLE].fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    candidate = Candidate("module", arguments, model)
    return candidate, Context(train, model, seed=1), test


def test_the_idle_block_goes_and_nothing_changes(problem, tmp_path):
    candidate, context, test = problem
    (change,) = RemoveLayers(count=1).plan(candidate)
    assert change.tensor == "blocks"
    assert change.before == "3 blocks"
    after = RemoveLayers(count=1, epochs=0).apply(candidate, context)
    assert after.arguments["pruned"] == [{"removed": "1", "blocks": "blocks"}]
    expected = probabilities(candidate.model, test)
    assert np.array_equal(probabilities(after.model, test), expected)
    # the planted failure: a block that works
    further = RemoveLayers(count=2, epochs=0).apply(candidate, context)
    assert np.abs(probabilities(further.model, test) - expected).max() > 0.1
    write_bundle(bundled("transformer", further.arguments, further.model, test), tmp_path / "short.edge")
    opened = open_bundle(tmp_path / "short.edge").model()
    assert np.array_equal(probabilities(opened, test), probabilities(further.model, test))


def test_recovery_brings_back_what_a_block_did(problem):
    candidate, context, test = problem
    cut = accuracy(RemoveLayers(count=2, epochs=0).apply(candidate, context).model, test)
    recovered = accuracy(RemoveLayers(count=2, epochs=4, learning_rate=3e-3).apply(candidate, context).model, test)
    print(f"accuracy {accuracy(candidate.model, test):.3f}, cut {cut:.3f}, recovered {recovered:.3f}")
    assert recovered > cut + 0.1


def test_sensitivity_is_the_loss_without_the_block(problem):
    candidate, context, _ = problem
    found = dict(sensitivity(candidate.model, "blocks", [0, 1, 2], context))
    assert min(found, key=found.get) == IDLE
    assert not any(block._forward_hooks for block in candidate.model.blocks)
    bare = Dataset(context.train.inputs, np.full(len(context.train), UNKNOWN))
    without = dict(sensitivity(candidate.model, "blocks", [0, 1, 2], Context(bare, None, 1)))
    assert min(without, key=without.get) == IDLE


class Counting(Transformer):
    """Its code knows how many blocks it has."""

    def forward(self, x):
        x = self.embed(x) + self.position
        for number in range(2):
            x = self.blocks[number](x)
        return self.head(self.norm(x).mean(dim=1))


def counting():
    return Counting(16, 2, 2, 32)


def flat():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8))


def test_what_cannot_lose_a_block_is_refused(problem, tiny_candidate):
    candidate, context, _ = problem

    def of(name):
        trust(f"{__name__}:{name}")
        arguments = {**arguments_of("transformer"), "factory": f"{__name__}:{name}"}
        return Candidate("module", arguments, build("module", arguments))

    with pytest.raises(EdgekitError, match="its code expects a fixed number of them"):
        RemoveLayers(count=1).apply(of("counting"), context)
    with pytest.raises(EdgekitError, match="no ModuleList or Sequential"):
        RemoveLayers(count=1).plan(of("flat"))
    with pytest.raises(EdgekitError, match="one must stay"):
        RemoveLayers(count=3).plan(candidate)
    with pytest.raises(EdgekitError, match=r"'block' in blocks.*did you mean 'blocks'"):
        RemoveLayers(count=1, blocks="block").plan(candidate)
    with pytest.raises(EdgekitError, match="no model built by a Python function"):
        RemoveLayers(count=1).plan(tiny_candidate)
    with pytest.raises(EdgekitError, match="count"):
        RemoveLayers(count=0)
