"""Structured pruning: a unit that does nothing goes first, and its going changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekit.bundle.family import build, prunable_groups
from edgekit.data.dataset import UNKNOWN, Dataset
from edgekit.nn.training import probabilities
from edgekit.passes.base import Candidate
from edgekit.passes.structured_prune import StructuredPrune, importance

USELESS_HEAD, USELESS_UNIT = 1, 11


@pytest.fixture
def with_useless(tiny_candidate, tiny):
    """The tiny model with one head and one feed-forward unit whose outputs nobody reads."""
    model = tiny_candidate.copy_model()
    with torch.no_grad():
        block = model.blocks[0]
        block.attention.combine.weight[:, 2 * USELESS_HEAD : 2 * USELESS_HEAD + 2] = 0
        block.contract.weight[:, USELESS_UNIT] = 0
    return Candidate("t2", tiny.arguments, model)


def test_removing_what_nobody_reads_changes_nothing(with_useless, tiny_context, tiny_data):
    after = StructuredPrune(keep={"heads": 3, "ff_dim": 15}, epochs=0).apply(with_useless, tiny_context)
    before = probabilities(with_useless.model, tiny_data[1])
    assert np.abs(probabilities(after.model, tiny_data[1]) - before).max() < 1e-6
    # the planted failure: one more head, a useful one, and the outputs move
    further = StructuredPrune(keep={"heads": 2}, epochs=0).apply(with_useless, tiny_context)
    assert np.abs(probabilities(further.model, tiny_data[1]) - before).max() > 1e-3


def test_importance_ranks_the_useless_last(with_useless, tiny_context):
    groups = prunable_groups("t2", with_useless.model)
    heads, units = importance(with_useless.model, groups, tiny_context)
    assert heads.argmin() == USELESS_HEAD
    assert units.argmin() == USELESS_UNIT
    assert heads[USELESS_HEAD] == 0
    assert (heads > 0).sum() == 3


def test_importance_is_the_squared_gradient_of_a_gate(tiny_candidate, tiny_context, tiny_data):
    """Against finite differences of the loss in the scale of one head's output, one mini-batch."""
    from edgekit.passes.base import Context

    data = tiny_data[0].take(np.arange(64))
    context = Context(data, tiny_context.teacher, 0)
    scores = importance(tiny_candidate.model, prunable_groups("t2", tiny_candidate.model), context)[0]

    def loss(head: int, gate: float) -> float:
        model = tiny_candidate.copy_model()
        with torch.no_grad():
            model.blocks[0].attention.combine.weight[:, 2 * head : 2 * head + 2] *= gate
            model = model.double()
            logits = model(torch.from_numpy(data.inputs["light_curve"]).double())
            weights = torch.from_numpy(64 / (3 * np.bincount(data.labels)))
            return torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.labels), weight=weights).item()

    for head, score in enumerate(scores.tolist()):
        slope = (loss(head, 1 + 1e-4) - loss(head, 1 - 1e-4)) / 2e-4
        assert score == pytest.approx(slope**2, rel=2e-2, abs=1e-9), head


def test_importance_leaves_no_hooks_behind(tiny_candidate, tiny_context):
    importance(tiny_candidate.model, prunable_groups("t2", tiny_candidate.model), tiny_context)
    assert not any(module._forward_pre_hooks for module in tiny_candidate.model.modules())


def test_the_plan_and_what_happened(tiny_candidate, tiny_context):
    compression = StructuredPrune(keep={"heads": 3, "ff_dim": 5}, epochs=1)
    plan = {change.tensor: change for change in compression.plan(tiny_candidate)}
    after = compression.apply(tiny_candidate, tiny_context)
    assert after.arguments["heads"] == 3
    assert after.arguments["ff_dim"] == 5
    for name, weight in after.weights().items():
        before = tiny_candidate.weights()[name]
        if name in plan:
            assert plan[name].before == str(before.shape)
            assert plan[name].after.split(":")[0] == str(weight.shape)
            assert weight.shape != before.shape
        else:
            assert weight.shape == before.shape, f"{name} lost something that the plan does not tell"


def test_every_block_of_a_deep_model_is_pruned(tiny, tiny_context):
    torch.manual_seed(3)
    arguments = {**tiny.arguments, "layers": 3}
    candidate = Candidate("t2", arguments, build("t2", arguments))
    after = StructuredPrune(keep={"heads": 1, "ff_dim": 2}, epochs=0).apply(candidate, tiny_context)
    for block in after.model.blocks:
        assert block.attention.query.weight.shape == (2, 16)
        assert block.attention.combine.weight.shape == (16, 2)
        assert block.expand.weight.shape == (2, 16)
        assert block.contract.weight.shape == (16, 2)


def test_a_model_pruned_by_half_keeps_its_accuracy_after_recovery(tiny_candidate, tiny_context, tiny_data):
    def accuracy(candidate):
        return (probabilities(candidate.model, tiny_data[1]).argmax(axis=1) == tiny_data[1].labels).mean()

    def pruned(epochs, **keep):
        return accuracy(StructuredPrune(keep=keep, epochs=epochs).apply(tiny_candidate, tiny_context))

    assert pruned(10, heads=2, ff_dim=8) >= 0.97 * accuracy(tiny_candidate)
    # the planted failure: cut to a quarter, the model fails that test, and recovery brings back most of the loss
    cut = pruned(0, heads=1, ff_dim=4)
    assert cut < 0.8 * accuracy(tiny_candidate)
    assert pruned(10, heads=1, ff_dim=4) > cut + 0.2


def test_without_labels_the_models_own_answers_count(tiny_candidate, tiny_context):
    bare = Dataset(tiny_context.train.inputs, np.full(len(tiny_context.train), UNKNOWN))
    pruned = StructuredPrune(keep={"heads": 2}, epochs=1).apply(tiny_candidate, replace(tiny_context, train=bare))
    assert pruned.arguments["heads"] == 2
    groups = prunable_groups("t2", tiny_candidate.model)
    blind, seeing = (
        importance(tiny_candidate.model, groups, replace(tiny_context, train=data))
        for data in (bare, tiny_context.train)
    )
    assert torch.corrcoef(torch.stack([torch.cat(blind), torch.cat(seeing)]))[0, 1] > 0.9, (
        "the model is right on nearly all rows"
    )


def test_a_class_without_training_samples_is_no_obstacle(tiny_candidate, tiny_context, tiny_data):
    from edgekit.passes.base import Context

    two_classes = tiny_data[0].take(np.flatnonzero(tiny_data[0].labels < 2))
    context = Context(two_classes, tiny_context.teacher, 0)
    after = StructuredPrune(keep={"heads": 2}, epochs=1).apply(tiny_candidate, context)
    assert np.isfinite(probabilities(after.model, tiny_data[1])).all()


def test_a_network_of_a_python_function_is_sent_to_the_pass_that_knows_it(tiny_candidate):
    from edgekit.errors import EdgekitError

    foreign = Candidate("module", {"factory": "a:b"}, tiny_candidate.model)
    with pytest.raises(EdgekitError, match="use dependency_prune"):
        StructuredPrune(keep={"heads": 2}).plan(foreign)
