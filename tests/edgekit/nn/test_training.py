"""Training: a stopped and resumed run equals an uninterrupted one, and every class counts equally."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekit.bundle.family import build
from edgekit.compression.metrics import metric
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.nn import training
from edgekit.nn.training import Schedule, _moving_average, balanced_class_weights, fit, probabilities

SCHEDULE = Schedule(epochs=4, batch=48, learning_rate=5e-3)


def untrained(tiny, **arguments):
    torch.manual_seed(0)
    return build("t2", {**tiny.arguments, **arguments})


def snapshot(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def noisy(data: Dataset, rng: np.random.Generator) -> Dataset:
    """An augmentation that uses randomness."""
    curve = data.inputs["light_curve"]
    return Dataset({"light_curve": curve + rng.normal(0, 0.1, curve.shape).astype(np.float32)}, data.labels)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_gives_the_same_bits(stop, tiny, tiny_data, tmp_path):
    options = {"seed": 3, "augment": noisy}
    straight = fit(untrained(tiny), tiny_data[0], SCHEDULE, **options)

    def interrupt(done, total, loss):
        if done == stop:
            raise StoppedError

    with pytest.raises(StoppedError):
        fit(untrained(tiny), tiny_data[0], SCHEDULE, **options, checkpoint=tmp_path / "c", progress=interrupt)
    torch.manual_seed(99)  # another process would have another state
    resumed_epochs = []
    resumed = fit(
        build("t2", tiny.arguments),
        tiny_data[0],
        SCHEDULE,
        **options,
        checkpoint=tmp_path / "c",
        progress=lambda done, total, loss: resumed_epochs.append(done),
    )
    assert resumed_epochs == list(range(stop + 1, 5)), "it began where it was stopped"
    assert snapshot(resumed) == snapshot(straight)
    assert not resumed.training
    # the planted failure: another seed does not
    assert snapshot(fit(untrained(tiny), tiny_data[0], SCHEDULE, **{**options, "seed": 4})) != snapshot(straight)


def test_a_finished_run_is_not_run_again(tiny, tiny_data, tmp_path):
    first = fit(untrained(tiny), tiny_data[0], SCHEDULE, seed=0, checkpoint=tmp_path / "c")
    epochs = []
    again = fit(
        untrained(tiny), tiny_data[0], SCHEDULE, seed=0, checkpoint=tmp_path / "c", progress=lambda *x: epochs.append(x)
    )
    assert epochs == []
    assert snapshot(again) == snapshot(first)


@pytest.mark.parametrize(
    ("schedule", "seed", "arguments", "words"),
    [
        (replace(SCHEDULE, epochs=5), 0, {}, "another schedule or seed"),
        (SCHEDULE, 1, {}, "another schedule or seed"),
        (SCHEDULE, 0, {"heads": 2}, "another network"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(schedule, seed, arguments, words, tiny, tiny_data, tmp_path):
    fit(untrained(tiny), tiny_data[0], SCHEDULE, seed=0, checkpoint=tmp_path / "c")
    with pytest.raises(EdgekitError, match=words):
        fit(untrained(tiny, **arguments), tiny_data[0], schedule, seed=seed, checkpoint=tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_refused(content, tiny, tiny_data, tmp_path):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(EdgekitError, match="delete it to start over"):
        fit(untrained(tiny), tiny_data[0], SCHEDULE, seed=0, checkpoint=tmp_path / "c")


def test_training_learns(tiny, tiny_data):
    train, test = tiny_data
    loss = metric("log-loss").value
    before = loss(probabilities(untrained(tiny), test), test.labels)
    losses = []
    model = fit(
        untrained(tiny), train, replace(SCHEDULE, epochs=8), seed=0, progress=lambda d, t, loss: losses.append(loss)
    )
    assert loss(probabilities(model, test), test.labels) < 0.5 * before
    assert losses[-1] < 0.6 * losses[0]
    assert abs(before - math.log(3)) < 0.5


def test_divergence_is_an_error_that_says_what_to_do(tiny, tiny_data):
    data = Dataset({"light_curve": tiny_data[0].inputs["light_curve"] * np.float32(1e38)}, tiny_data[0].labels)
    with pytest.raises(EdgekitError, match=r"diverged in epoch 1.*learning rate"):
        fit(untrained(tiny), data, SCHEDULE, seed=0)


def test_balanced_weights_make_every_class_count_alike():
    labels = np.array([0] * 6 + [1] * 3 + [3])
    weights = balanced_class_weights(labels, 5)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 0.0, 10 / 3, 0.0])
    assert np.bincount(labels, weights=weights.numpy()[labels])[[0, 1, 3]] == pytest.approx([10 / 3] * 3)


def test_the_objective_is_the_metric(tiny):
    """A model that can only learn its bias gives every class the same share, however rare it is."""
    labels = np.array([0] * 60 + [1] * 30 + [2] * 6)
    data = Dataset({"light_curve": np.zeros((96, 12, 2), np.float32)}, labels)
    model = fit(
        untrained(tiny, dropout=0.0), data, Schedule(epochs=30, batch=96, learning_rate=3e-2, averaging=0.0), seed=0
    )
    assert probabilities(model, data)[0] == pytest.approx([1 / 3] * 3, abs=0.02)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_class_without_samples_is_no_obstacle(missing, tiny, tiny_data):
    part = tiny_data[0].take(np.flatnonzero(tiny_data[0].labels != missing))
    teacher = untrained(tiny)
    for options in ({}, {"teacher": teacher}):
        schedule = replace(SCHEDULE, epochs=1, distillation=0.5 if options else 0.0)
        model = fit(untrained(tiny), part, schedule, seed=0, **options)
        assert np.isfinite(probabilities(model, part)).all()


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_any_number_of_steps(steps, tiny, tiny_data):
    """torch's one-cycle schedule divides by zero when its rise takes exactly one step of ten."""
    data = tiny_data[0].take(np.arange(16))
    model = fit(untrained(tiny), data, Schedule(epochs=steps, batch=16), seed=0)
    assert np.isfinite(probabilities(model, data)).all()


def test_a_teacher_and_its_weight_go_together(tiny, tiny_data):
    for teacher, distillation in ((None, 0.5), (untrained(tiny), 0.0)):
        with pytest.raises(EdgekitError, match="go together"):
            fit(untrained(tiny), tiny_data[0], replace(SCHEDULE, distillation=distillation), seed=0, teacher=teacher)


def test_the_teacher_is_learned_from_and_not_changed(tiny, tiny_bundle, tiny_data):
    teacher = tiny_bundle.model()
    before = snapshot(teacher)
    wrong = Dataset(tiny_data[0].inputs, (tiny_data[0].labels + 1) % 3)  # labels that contradict the teacher
    student = fit(
        untrained(tiny),
        wrong,
        Schedule(epochs=10, batch=32, learning_rate=1e-2, distillation=1.0),
        seed=0,
        teacher=teacher,
    )
    agreement = probabilities(student, tiny_data[1]).argmax(1) == probabilities(teacher, tiny_data[1]).argmax(1)
    assert agreement.mean() > 0.9
    assert snapshot(teacher) == before


def test_the_teacher_is_asked_once_where_rows_stay_the_same(tiny, tiny_bundle, tiny_data, monkeypatch):
    """The answers of the teacher do not change, so they are kept. If rows are remade before each epoch, or are too many
    to keep, the teacher runs again."""
    asked = []
    teacher = tiny_bundle.model()
    teacher.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    schedule, rows = Schedule(epochs=3, batch=32, distillation=0.5), len(tiny_data[0])

    def learnt(**options):
        asked.clear()
        torch.manual_seed(0)
        model = fit(untrained(tiny), tiny_data[0], schedule, seed=0, teacher=teacher, **options)
        return model.state_dict(), sum(asked)

    kept, once = learnt()
    assert once == rows
    _, remade = learnt(augment=lambda data, rng: data)
    assert remade == 3 * rows
    monkeypatch.setattr(training, "KNOWN", 0)
    again, each = learnt()
    assert each == 3 * rows
    assert all(torch.allclose(kept[name], again[name], atol=1e-5) for name in kept)
    # planted: answers that belong to other rows
    real = training.outputs
    monkeypatch.setattr(training, "KNOWN", 2**25)
    monkeypatch.setattr(training, "outputs", lambda *given, **options: [real(*given, **options)[0][::-1].copy()])
    wrong, _ = learnt()
    assert not all(torch.allclose(wrong[name], again[name], atol=1e-5) for name in wrong)


def test_the_average_follows_short_runs_and_smooths_long_ones():
    update = _moving_average(0.9)
    average, by_hand = torch.zeros(1), 0.0
    for step in range(1, 200):
        update([average], [torch.ones(1) * step], step)
        keep = min(0.9, (1 + step) / (10 + step))
        by_hand = keep * by_hand + (1 - keep) * step
        assert average.item() == pytest.approx(by_hand, rel=1e-5)
    short = torch.zeros(1)
    for step in range(1, 20):  # from 0 to 1 in twenty steps: a fixed 0.995 would have moved a tenth of the way
        _moving_average(0.995)([short], [torch.ones(1)], step)
    assert short.item() > 0.9


def test_probabilities_do_not_depend_on_the_batch_and_leave_the_mode(tiny_bundle, tiny_data):
    model = tiny_bundle.model().train()
    one, all_ = (probabilities(model, tiny_data[1], batch=size) for size in (1, 1000))
    assert model.training
    assert np.abs(one - all_).max() < 1e-5
    assert all_.sum(axis=1) == pytest.approx(np.ones(len(all_)), abs=1e-5)


def test_numbers_are_learnt_by_squared_error():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(256, 3)).astype(np.float32)
    wanted = (inputs @ np.float32([[1, 0], [0, -2], [3, 0]])).astype(np.float32)
    schedule = Schedule(epochs=30, batch=32, learning_rate=1e-1, averaging=0.5)

    def loss(data, **how):
        torch.manual_seed(0)
        model = fit(torch.nn.Linear(3, 2), data, replace(schedule, **how), seed=0, teacher=teacher if how else None)
        return float(((model(torch.from_numpy(inputs)).detach().numpy() - wanted) ** 2).mean())

    teacher = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([[1.0, 0, 3], [0, -2, 0]]))
    start = float((wanted**2).mean())
    assert loss(Dataset({"x": inputs}, wanted)) < 0.05 * start
    # from the teacher alone the labels may say anything; half and half they pull
    assert loss(Dataset({"x": inputs}, -wanted), distillation=1.0) < 0.05 * start
    assert loss(Dataset({"x": inputs}, -wanted), distillation=0.5) > 0.2 * start


def test_the_first_output_of_a_sequence_is_learnt_from_the_teacher():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 4)

        def forward(self, x):
            return self.layer(x), x  # (samples, steps, 4), and what is no business of training

    data = Dataset({"x": np.random.default_rng(0).normal(size=(64, 5, 2)).astype(np.float32)}, np.full(64, -1))
    torch.manual_seed(0)
    teacher, student = Two().eval(), Two()
    before = float((student.layer.weight - teacher.layer.weight).detach().abs().max())
    schedule = Schedule(epochs=20, batch=8, learning_rate=3e-2, averaging=0.5, distillation=1.0)
    fit(student, data, schedule, seed=0, teacher=teacher)
    assert float((student.layer.weight - teacher.layer.weight).detach().abs().max()) < 0.1 * before
    with pytest.raises(EdgekitError, match=r"outputs have shape \(5, 4\) per row"):
        fit(
            Two(),
            replace(data, labels=np.zeros(64, np.int64)),
            replace(schedule, distillation=0.5),
            seed=0,
            teacher=teacher,
        )
