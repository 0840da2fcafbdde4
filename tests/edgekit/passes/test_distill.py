"""Distillation: a smaller network that learns the teacher's probabilities."""

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.nn.training import probabilities
from edgekit.passes.distill import Distill

STUDENT = {"embed_dim": 8, "heads": 2}


def test_the_plan_and_what_happened(tiny_candidate, tiny_context):
    compression = Distill(student=STUDENT, epochs=1)
    (change,) = compression.plan(tiny_candidate)
    after = compression.apply(tiny_candidate, tiny_context)
    sizes = [sum(value.size for value in item.weights().values()) for item in (tiny_candidate, after)]
    assert change.before == f"{sizes[0]} parameters"
    assert change.after == f"{sizes[1]} parameters, trained for 1 epochs"
    assert sizes[1] < sizes[0]
    assert after.arguments == {**tiny_candidate.arguments, **STUDENT}


def test_the_student_comes_near_its_teacher(tiny_candidate, tiny_context, tiny_data):
    teacher = probabilities(tiny_candidate.model, tiny_data[1])

    def agreement(epochs):
        student = Distill(student=STUDENT, epochs=epochs, learning_rate=2e-2).apply(tiny_candidate, tiny_context)
        return (probabilities(student.model, tiny_data[1]).argmax(axis=1) == teacher.argmax(axis=1)).mean()

    assert agreement(25) > 0.9
    assert agreement(0) < 0.7, "an untrained student agrees as well, so the test shows nothing"


@pytest.mark.parametrize("student", [{"bands": 3}, {"classes": 5}, {"sequence": 9}, {"context": 2}])
def test_a_student_with_other_inputs_or_outputs_is_refused(student, tiny_candidate, tiny_context):
    with pytest.raises(EdgekitError, match="other inputs or outputs"):
        Distill(student=student, epochs=1).apply(tiny_candidate, tiny_context)


def test_the_student_starts_from_its_own_seed(tiny_candidate, tiny_context):
    import torch

    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # what ran before must not matter
        results.append(Distill(student=STUDENT, epochs=1).apply(tiny_candidate, tiny_context).weights())
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


def test_a_student_by_other_arguments_of_the_factory():
    from edgekit.bundle.family import build
    from edgekit.passes.base import Candidate, Context
    from tests.edgekit.passes.networks import accuracy, arguments_of, trained

    model, train, test = trained("transformer", 12)
    candidate = Candidate("module", arguments_of("transformer"), model)
    student = {"dim": 16, "depth": 1, "hidden": 32}
    after, raw = (
        Distill(student=student, epochs=epochs, learning_rate=1e-2).apply(candidate, Context(train, model, 0))
        for epochs in (6, 0)
    )
    assert after.arguments["arguments"] == student
    assert sum(value.numel() for value in after.model.parameters()) < 0.2 * sum(v.numel() for v in model.parameters())
    assert np.array_equal(after.copy_model()(rows_of(test)).detach(), after.model(rows_of(test)).detach())
    assert accuracy(after.model, test) > 0.6
    assert accuracy(raw.model, test) < 0.3, "an untrained student does as well, so the test shows nothing"
    # a pruned model's student is whole: what was cut from the model is not cut from it again
    pruned = {**candidate.arguments, "pruned": [{"removed": "0", "blocks": "blocks"}]}
    shorter = Candidate("module", pruned, build("module", pruned))
    whole = Distill(student=student, epochs=0).apply(shorter, Context(train, shorter.model, 0))
    assert "pruned" not in whole.arguments
    with pytest.raises(EdgekitError, match="other inputs or outputs"):
        Distill(student={"dim": 16}, epochs=0).apply(candidate, Context(train, lambda rows: model(rows)[:, :3], 0))


def rows_of(data):
    import torch

    return torch.from_numpy(data.inputs["curve"][:4])


def test_a_student_may_start_from_the_original(tiny_candidate, tiny_context):
    before = tiny_candidate.weights()
    student = {"ff_dim": tiny_candidate.arguments["ff_dim"] // 2}
    compression = Distill(student=student, epochs=0, start="original")
    after = compression.apply(tiny_candidate, tiny_context).weights()
    random = Distill(student=student, epochs=0).apply(tiny_candidate, tiny_context).weights()
    same = [name for name in before if name in after and after[name].shape == before[name].shape]
    other = [name for name in after if name not in same]
    assert same
    assert other
    assert all(np.array_equal(after[name], before[name]) for name in same)
    assert not all(np.array_equal(random[name], before[name]) for name in same)  # the twin
    assert all(np.array_equal(after[name], random[name]) for name in other)
    assert f", {len(same)} tensors copied, " in compression.plan(tiny_candidate)[0].after
    with pytest.raises(EdgekitError, match="start"):
        Distill(student=STUDENT, start="orignal")
