"""Pruning through the dependency graph: of networks that edgekit has never seen, heads and channels, and shapes that a
bundle alone gives again."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.bundle.family import build
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.data.dataset import UNKNOWN, Dataset
from edgekit.errors import EdgekitError
from edgekit.nn.module import positions, trust
from edgekit.nn.training import probabilities
from edgekit.passes.base import Candidate, Context
from edgekit.passes.dependency_prune import DependencyPrune
from tests.edgekit.passes.networks import Attention, accuracy, arguments_of, bundled, trained

pytest.importorskip("torch_pruning")
SCHEDULES = {"transformer": 12, "convnet": 6}


@pytest.fixture(scope="module", params=SCHEDULES)
def problem(request):
    """(kind, candidate, context, test rows) of a trained network."""
    model, train, test = trained(request.param, SCHEDULES[request.param])
    candidate = Candidate("module", arguments_of(request.param), model)
    return request.param, candidate, Context(train, model, seed=3), test


def test_a_network_pruned_by_half_keeps_97_per_cent_of_its_accuracy(problem, record_property):
    kind, candidate, context, test = problem
    before = accuracy(candidate.model, test)
    after, cut = (
        DependencyPrune(sparsity=0.5, epochs=epochs).apply(candidate, context).model for epochs in (8, 0)
    )  # the planted failure: without recovery the same cut fails the same criterion
    record_property(
        "accuracy", {"original": before, "one shot": accuracy(cut, test), "recovered": accuracy(after, test)}
    )
    print(f"{kind}: {before:.3f}, one shot {accuracy(cut, test):.3f}, recovered {accuracy(after, test):.3f}")
    assert before > 0.9
    assert accuracy(after, test) >= 0.97 * before
    assert accuracy(cut, test) < 0.97 * before
    sizes = [sum(value.numel() for value in model.parameters()) for model in (candidate.model, after)]
    assert sizes[1] < 0.3 * sizes[0], "half of the channels on both sides is a quarter of a matrix"


def test_a_plan_and_its_application_look_for_units_once(problem, monkeypatch):
    """Finding them cuts every head on trial, which takes a large network longer than a step of recovery."""
    from edgekit.passes import dependency_prune

    _, candidate, context, _ = problem
    looked = []

    def find(*given):
        looked.append(given)
        return real(*given)

    real = dependency_prune.find_groups
    monkeypatch.setattr(dependency_prune, "find_groups", find)
    candidate = replace(candidate, model=candidate.copy_model())
    built = DependencyPrune(sparsity=0.5, epochs=0)
    assert built.plan(candidate)
    built.apply(candidate, context)
    assert len(looked) == 1
    DependencyPrune(sparsity=0.25, epochs=0).plan(candidate)
    assert len(looked) == 2, "what can go depends on the share"
    built.plan(replace(candidate, model=candidate.copy_model()))
    assert len(looked) == 3, "another network, though it be alike"


def test_the_bundle_alone_gives_the_pruned_network_again(problem, tmp_path):
    kind, candidate, context, test = problem
    once = DependencyPrune(sparsity=0.25, epochs=1).apply(candidate, context)
    twice = DependencyPrune(sparsity=0.5, epochs=0, round_to=4).apply(once, context)
    for number, after in enumerate((once, twice)):
        path = tmp_path / f"{number}.edge"
        write_bundle(bundled(kind, after.arguments, after.model, test), path)
        opened = open_bundle(path)
        assert np.array_equal(probabilities(opened.model(), test), probabilities(after.model, test))
        assert opened.weights().keys() == candidate.weights().keys()
    assert twice.arguments["pruned"][: len(once.arguments["pruned"])] == once.arguments["pruned"]
    # the planted failure: without the list the weights do not fit
    with pytest.raises(EdgekitError, match="do not fit"):
        build("module", candidate.arguments, once.weights())


def test_the_plan_and_what_happened(problem):
    _, candidate, context, _ = problem
    compression = DependencyPrune(sparsity=0.5, epochs=0)
    before = {name: value.shape for name, value in candidate.weights().items()}
    plan = [change for change in compression.plan(candidate) if "left alone" not in change.after]
    after = compression.apply(candidate, context).weights()
    told = {change.tensor: change.after.split(":")[0] for change in plan}
    assert {name for name in before if before[name] != after[name].shape} == set(told)
    assert all(told[name] == str(after[name].shape) for name in told)
    assert any("8 channels; none can go" in change.after for change in compression.plan(candidate))  # the classifier


@pytest.mark.parametrize("options", [{"importance": "magnitude"}, {"global_ranking": True}])
def test_other_rankings_choose_otherwise(problem, options):
    _, candidate, context, test = problem
    usual = DependencyPrune(sparsity=0.5, epochs=0).apply(candidate, context)
    other = DependencyPrune(sparsity=0.5, epochs=0, **options).apply(candidate, context)
    assert other.arguments["pruned"] != usual.arguments["pruned"]
    assert np.isfinite(probabilities(other.model, test)).all()


def test_layers_have_shares_of_their_own(problem):
    kind, candidate, context, _ = problem
    name = {"transformer": "blocks.1.fc1", "convnet": "blocks.1.first"}[kind]
    after = DependencyPrune(sparsity=0, layers={"blocks.*": 0, name: 0.75}, epochs=0).apply(candidate, context)
    changed = {key for key, value in after.weights().items() if value.shape != candidate.weights()[key].shape}
    assert f"{name}.weight" in changed
    assert all(key.startswith(name.rpartition(".")[0]) for key in changed)
    size = len(candidate.weights()[f"{name}.weight"])
    assert len(after.weights()[f"{name}.weight"]) == size // 4
    with pytest.raises(EdgekitError, match=r"unknown layer 'blokcs.*' in layers"):
        DependencyPrune(sparsity=0.5, layers={"blokcs.*": 0}).plan(candidate)


def test_what_nobody_reads_goes_first_and_nothing_changes(problem):
    kind, candidate, context, test = problem
    model = candidate.copy_model()
    with torch.no_grad():
        if kind == "transformer":
            model.blocks[0].attn.proj.weight[:, 8:16] = 0  # the second head
            share = {"layers": {"*": 0, "blocks.0.attn": 0.25}}
        else:
            model.head.weight[:, 16:24] = 0  # units of the gate, each two rows of its layer
            share = {"layers": {"*": 0, "gate": 0.25}}
    useless = Candidate("module", candidate.arguments, model)
    after = DependencyPrune(sparsity=0, epochs=0, **share).apply(useless, context)
    removed = [positions(step["removed"]) for step in after.arguments["pruned"] if "removed" in step]
    assert set(removed[0]) & set(range(8, 24))
    assert np.abs(probabilities(after.model, test) - probabilities(model, test)).max() < 1e-5
    # the planted failure: the same number of units that somebody reads
    cut = DependencyPrune(sparsity=0, epochs=0, **share).apply(candidate, context)
    assert np.abs(probabilities(cut.model, test) - probabilities(candidate.model, test)).max() > 1e-3


def test_rows_without_labels_will_do(problem):
    _, candidate, context, _ = problem
    bare = Dataset(context.train.inputs, np.full(len(context.train), UNKNOWN))
    after = DependencyPrune(sparsity=0.5, epochs=0).apply(candidate, replace(context, train=bare))
    assert after.arguments["pruned"]


class Strange(nn.Module):
    """What must be left alone: torch's own attention, heads in an order of their own, names that say nothing, a matrix
    that is used as itself and transposed, a layer of groups, a wide output."""

    def __init__(self):
        super().__init__()
        self.embed, self.torch = nn.Linear(3, 32), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.own = Attention(32, 4)
        self.own.forward = None
        self.dictionary = nn.Parameter(torch.randn(32, 32) / 8)
        self.grouped, self.out = nn.Conv1d(32, 32, 1, groups=4), nn.Linear(32, 64)

    def forward(self, x):
        x = self.torch(self.embed(x))
        parts = self.own.qkv(x).reshape(*x.shape[:2], 4, 3, 8).permute(3, 0, 2, 1, 4)  # heads outside, q k v inside
        x = x + self.own.proj(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape))
        x = x + (x @ self.dictionary).relu() @ self.dictionary.T
        return self.out(self.grouped(x.transpose(1, 2)).mean(dim=2))


def strange() -> nn.Module:
    return Strange()


def candidate_of(name: str, inputs: dict) -> Candidate:
    trust(f"{__name__}:{name}")
    torch.manual_seed(0)
    arguments = {"factory": f"{__name__}:{name}", "arguments": {}, "inputs": inputs}
    return Candidate("module", arguments, build("module", arguments))


def test_what_cannot_be_pruned_is_named_and_left_alone():
    candidate = candidate_of("strange", {"x": "float32:batch,5,3"})
    plan = DependencyPrune(sparsity=0.5).plan(candidate)
    alone = {change.tensor: change.after for change in plan if "left alone" in change.after}
    assert "MultiheadAttention" in alone["torch.self_attn"]
    assert "another order" in alone["own"]
    assert "outputs of the network" in alone["out"]
    assert "embed" in alone, "its channels run through torch's attention and the dictionary"
    cut = {change.tensor for change in plan} - set(alone)
    assert cut == {"torch.linear1.weight", "torch.linear1.bias", "torch.linear2.weight"}


def test_groups_of_heads_that_share_a_key_go_together():
    from tests.conformance.models import INPUTS

    arguments = {"factory": "tests.conformance.models:llama_block", "arguments": {}, "inputs": INPUTS["llama_block"]}
    trust(arguments["factory"])
    torch.manual_seed(0)
    candidate = Candidate("module", arguments, build("module", arguments))
    groups = [change for change in DependencyPrune(sparsity=0.5).plan(candidate) if "groups of heads" in change.after]
    assert {change.tensor.removeprefix("attention.") for change in groups} == {
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "o_proj.weight",
    }


def test_it_says_what_is_missing(problem, monkeypatch, tiny_candidate):
    _, candidate, _, _ = problem
    with pytest.raises(EdgekitError, match="use structured_prune instead"):
        DependencyPrune(sparsity=0.5).plan(tiny_candidate)
    unknown = {key: value for key, value in candidate.arguments.items() if key != "inputs"}
    with pytest.raises(EdgekitError, match="import the model again"):
        DependencyPrune(sparsity=0.5).plan(replace(candidate, arguments=unknown))
    with pytest.raises(EdgekitError, match="no channels or heads"):
        DependencyPrune(sparsity=0).apply(candidate, None)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(EdgekitError, match=r"pip install 'edgekit\[prune\]'"):
        DependencyPrune(sparsity=0.375).plan(candidate)  # found before, it would be known


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"sparsity": 0.99}, "sparsity"),
        ({"layers": {"a": -1.0}}, r"layers\.a"),
        ({"round_to": 0}, "round_to"),
        ({"importance": "luck"}, "luck"),
        ({"epochs": -1}, "epochs"),
    ],
)
def test_parameters_out_of_range_are_named(options, word):
    with pytest.raises(EdgekitError, match=word):
        DependencyPrune(**{"sparsity": 0.5, **options})
