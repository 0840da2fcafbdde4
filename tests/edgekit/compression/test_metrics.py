"""Quality: the global class-averaged log-loss, its interval, and the trap of averaging it inside batches."""

import math

import numpy as np
import pytest

from edgekit.compression import metrics
from edgekit.compression.metrics import ClassAveragedLogLoss, ErrorRate, class_means, measure, measure_change, metric
from edgekit.errors import EdgekitError

LOSS = ClassAveragedLogLoss()


def problem(samples=400, classes=5, seed=0):
    """Return random probabilities and labels; class 0 is common, class 4 rare."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, samples, p=np.array([16, 8, 4, 2, 1]) / 31)
    probabilities = rng.dirichlet(np.ones(classes), samples)
    probabilities[np.arange(samples), labels] += rng.random(samples)
    return (probabilities / probabilities.sum(axis=1, keepdims=True)).astype(np.float32), labels


def naive(probabilities, labels):
    """Compute the metric class by class and sample by sample."""
    means = []
    for wanted in sorted(set(labels.tolist())):
        losses = [
            -math.log(row[wanted]) for row, label in zip(probabilities.tolist(), labels, strict=True) if label == wanted
        ]
        means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def test_log_loss_agrees_with_a_loop_and_with_scikit_learn():
    from sklearn.metrics import log_loss

    probabilities, labels = problem()
    expected = naive(probabilities, labels)
    assert LOSS.value(probabilities, labels) == pytest.approx(expected, rel=1e-6)
    weights = 1 / np.bincount(labels)[labels]
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)
    assert log_loss(labels, exact, sample_weight=weights) == pytest.approx(expected, rel=1e-5)
    # the planted failure: without class weights it is another number
    assert log_loss(labels, exact) != pytest.approx(expected, rel=1e-2)


def test_averaging_inside_batches_flatters():
    """The reference reported this number: a class that is absent from a batch counts as a loss of zero there."""
    probabilities, labels = problem()

    def batch_mean(rows):
        losses = metrics.sample_losses(probabilities[rows], labels[rows])
        present = class_means(losses, labels[rows])
        return present.sum() / 5

    batched = np.mean([batch_mean(np.arange(start, start + 16)) for start in range(0, 400, 16)])
    assert batched < 0.9 * LOSS.value(probabilities, labels)


def test_log_loss_by_hand():
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
    labels = np.array([0, 0, 1])
    assert LOSS.value(probabilities, labels) == pytest.approx(((math.log(2) + math.log(4)) / 2 + math.log(10)) / 2)
    assert LOSS.value(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(-math.log(1e-15))


def test_a_class_that_is_absent_does_not_count():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    assert LOSS.value(probabilities, np.array([0, 1])) == pytest.approx(math.log(2))


def test_error_rate():
    probabilities = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]])
    assert ErrorRate().value(probabilities, np.array([0, 1, 1])) == pytest.approx(1 / 3)


def test_metrics_by_name():
    assert metric("error-rate").name == "error rate"
    with pytest.raises(EdgekitError, match=r"unknown metric 'logloss'.*did you mean 'log-loss'"):
        metric("logloss")


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """95 % of the intervals must cover it. With 100 problems and a bootstrap of 60, at least 80 must, and not all of
    them."""
    covered = 0
    truth = LOSS.value(*problem(20_000, seed=999))
    for seed in range(100):
        found = measure(LOSS, *problem(300, seed=seed), resamples=60)
        covered += found.low <= truth <= found.high
    assert 80 <= covered < 100


def test_a_paired_change_is_narrower_than_two_intervals_side_by_side():
    probabilities, labels = problem()
    rng = np.random.default_rng(1)
    after = probabilities * rng.uniform(0.99, 1.0, (len(labels), 1)).astype(np.float32)
    change = measure_change(LOSS, probabilities, after, labels)
    assert change.low <= change.value <= change.high
    assert change.value == pytest.approx(LOSS.value(after, labels) - LOSS.value(probabilities, labels))
    alone = measure(LOSS, after, labels)
    assert change.high - change.low < 0.05 * (alone.high - alone.low)
    assert change.low > 0, "so small a loss is seen only because it is paired"
    same = measure_change(LOSS, probabilities, probabilities, labels)
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_measuring_repeats_itself_and_prints_its_sample_count():
    first, second = (measure(LOSS, *problem()) for _ in range(2))
    assert first == second
    assert "n = 400" in str(first)
    assert measure(LOSS, *problem(), seed=1) != first


def test_rare_classes_never_vanish_from_a_resample():
    labels = np.array([0] * 50 + [1])
    for rows in metrics._resamples(labels, 20, 0):
        assert np.count_nonzero(labels[rows] == 1) == 1
        assert len(rows) == 51


@pytest.mark.parametrize(
    ("probabilities", "labels", "words"),
    [
        (np.array([[0.5, np.nan], [0.5, 0.5]]), np.array([0, 1]), "NaN.*1 of 2"),
        (np.array([[np.inf, 0.0]]), np.array([0]), "NaN or infinite"),
        (np.ones((2, 2)), np.array([0]), "1 labels"),
        (np.ones((0, 2)), np.zeros(0, int), "0 labels"),
        (np.ones(3), np.array([0, 0, 0]), r"\(3,\)"),
        (np.ones((1, 2)), np.array([2]), "labels span 2"),
        (np.ones((1, 2)), np.array([-1]), "labels span -1"),
    ],
)
def test_what_is_no_classifiers_output_is_an_error(probabilities, labels, words):
    for use in (
        lambda: measure(LOSS, probabilities, labels),
        lambda: LOSS.value(probabilities, labels),
        lambda: measure_change(LOSS, probabilities, probabilities, labels),
    ):
        with pytest.raises(EdgekitError, match=words):
            use()


METRIC = """
def worst(outputs, labels):
    return float((outputs.argmax(axis=1) != labels).max())

def broken(outputs, labels):
    raise ZeroDivisionError("no labels")
"""


@pytest.fixture
def my_metrics(tmp_path, monkeypatch):
    import sys

    (tmp_path / "my_metrics.py").write_text(METRIC)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "my_metrics"
    sys.modules.pop("my_metrics", None)


def test_a_metric_of_the_users(my_metrics):
    probabilities, labels = problem()
    worst = metrics.metric("my_metrics:worst")
    assert measure(worst, probabilities, labels).value == float((probabilities.argmax(axis=1) != labels).any())
    assert "def worst" in metrics.source("my_metrics:worst")
    with pytest.raises(EdgekitError, match=r"metric my_metrics:broken: ZeroDivisionError: no labels"):
        measure(metrics.metric("my_metrics:broken"), probabilities, labels)
    with pytest.raises(EdgekitError, match="my_metrics:nothing"):
        metrics.metric("my_metrics:nothing")


def test_the_source_of_a_metric_holds_the_functions_that_it_calls(my_metrics, tmp_path):
    """A state that was judged with another helper must not be taken from the cache."""
    before = metrics.source("my_metrics:worst")
    text = METRIC.replace('ZeroDivisionError("no labels")', 'ValueError("a longer text")')
    (tmp_path / "my_metrics.py").write_text(text)
    assert metrics.source("my_metrics:worst") == text != before
    assert metrics.source("math:fsum") == metrics.source("error-rate") == ""


@pytest.mark.parametrize("name", ["log-loss", "error-rate"])
def test_a_metric_under_which_more_is_better_is_refused(name):
    """If the guard took an accuracy for a loss, a model that forgot everything would pass."""
    outputs, labels = problem()
    metrics.check_direction(metrics.metric(name), outputs, labels)  # lower is better: nothing to say
    accuracy = metrics.Custom("m:accuracy", lambda found, wanted: (found.argmax(axis=1) == wanted).mean())
    with pytest.raises(
        EdgekitError, match="m:accuracy: 1 for right answers and 0 for wrong ones; lower must be better"
    ):
        metrics.check_direction(accuracy, outputs, labels)


def test_the_direction_of_a_metric_of_numbers():
    labels = np.array([1.0, 2.0, 4.0], np.float32)
    outputs = labels[:, None] + 0.5
    r2 = metrics.Custom("r2", lambda found, wanted: 1 - ((found[:, 0] - wanted) ** 2).sum() / wanted.var())
    with pytest.raises(EdgekitError, match="r2: 1 for right answers"):
        metrics.check_direction(r2, outputs, labels)
    metrics.check_direction(
        metrics.Custom("mse", lambda found, wanted: ((found[:, 0] - wanted) ** 2).mean()), outputs, labels
    )
    # nothing is said where labels do not spell out an answer, or the metric takes no such answers
    metrics.check_direction(r2, outputs, np.stack([labels, labels], axis=1))
    metrics.check_direction(r2, np.zeros((3, 2, 5)), np.array([0, 1, 1]))
    metrics.check_direction(metrics.Custom("picky", lambda found, wanted: found.no_such_thing), outputs, labels)


def test_metrics_without_labels_compare_with_the_original():
    original = np.array([[0.1, 0.9], [0.8, 0.2]])
    changed, relative = metrics.metric("changed"), metrics.metric("relative-error")
    assert not changed.labelled
    assert changed.value(original[:, ::-1], original) == 1
    assert changed.value(original, original) == relative.value(original, original) == 0
    assert relative.value(1.1 * original, original) == pytest.approx(0.1)
    codes = np.array([[1, 2, 3], [4, 5, 6]])
    assert changed.value(np.where(codes == 5, 0, codes), codes) == pytest.approx(1 / 6)


def test_regression_is_measured_in_the_labels_unit():
    metric = metrics.metric("mean-absolute-error")
    assert measure(metric, np.array([[1.0], [3.0]]), np.array([[1.5], [3.0]])).value == 0.25
    with pytest.raises(EdgekitError, match="mean-absolute-error"):
        metric.value(np.ones((2, 1)), np.ones(2))


def test_scores_that_are_no_probabilities_have_no_log_loss():
    with pytest.raises(EdgekitError, match="do not add up to 1; use error-rate"):
        LOSS.value(np.array([[3.0, -1.0]]), np.array([0]))


@pytest.mark.parametrize("name", ["log-loss", "error-rate"])
def test_an_interval_is_that_of_the_metric_itself_on_every_resample(name):
    """Losses are computed once for all resamples; a metric that is only a function is called for each."""
    probabilities, labels = problem()
    rng = np.random.default_rng(1)
    after = rng.dirichlet(np.ones(5), len(labels)).astype(np.float32)
    itself = metrics.metric(name)
    called = metrics.Custom("called for each", itself.value)
    assert measure(itself, probabilities, labels) == measure(called, probabilities, labels)
    assert measure_change(itself, probabilities, after, labels) == measure_change(called, probabilities, after, labels)
    assert measure(itself, probabilities, labels) != measure(itself, after, labels)
