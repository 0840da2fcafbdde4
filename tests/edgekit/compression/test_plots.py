"""Pictures: their numbers are right, and they are reproducible, self-contained and harmless."""

import subprocess
import sys
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from edgekit.compression import plots
from edgekit.compression.guard import Latency
from edgekit.compression.plots import Point
from edgekit.errors import EdgekitError

START = Point(0, "original", 50_000, 0.54, 0.54, 0.54, kept=True)
STEPS = [
    Point(1, "structured_prune", 30_000, 0.545, 0.542, 0.549, kept=True),
    Point(2, "magnitude_prune", 20_000, 0.9, 0.85, 0.95, kept=False),
    Point(3, "cluster", 12_000, 0.548, 0.543, 0.553, kept=True),
]
LATENCY = [Latency(1, 0.4, 0.3, 0.75, 0.7, 0.8), Latency(256, 90.0, 99.0, 1.1, 1.05, 1.2)]


def predictions(samples=20_000, *, sharpness=1.0):
    """Draw labels from the probabilities themselves; with `sharpness` above 1, the returned probabilities are too
    confident."""
    rng = np.random.default_rng(3)
    logits = 2 * rng.normal(size=(samples, 4))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) > rng.random((samples, 1))).argmax(axis=1)
    stated = np.exp(sharpness * logits)
    return stated / stated.sum(axis=1, keepdims=True), labels


def curves():
    curve = plots.reliability(*predictions(400))
    return {"as they come": curve, "balanced": curve}


FIGURES = {
    "trajectory": lambda: plots.trajectory(START, STEPS, 0.01, "log-loss"),
    "trajectory of nothing": lambda: plots.trajectory(START, [], None, "log-loss"),
    "bytes": lambda: plots.bytes_per_pass(START, STEPS),
    "latency": lambda: plots.latency_bars(LATENCY),
    "confusion": lambda: plots.confusion_matrix(plots.confusion(*predictions(400)), list("abcd")),
    "reliability": lambda: plots.reliability_curve(curves()),
    "days": lambda: plots.loss_by_days([0, 3, 30], np.array([[2.0, 1.5, 1.0], [2.1, 1.4, 1.1]]), 0.9, 2.6, "log-loss"),
}


def test_confusion_counts_true_against_predicted():
    probabilities = np.array([[0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.6, 0.4, 0.0], [0.0, 0.3, 0.7], [0.5, 0.2, 0.3]])
    labels = np.array([0, 1, 1, 2, 2])
    by_hand = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]])
    assert np.array_equal(plots.confusion(probabilities, labels), by_hand)
    assert not np.array_equal(plots.confusion(probabilities, labels[::-1]), by_hand)


def test_confusion_refuses_labels_that_are_not_classes():
    with pytest.raises(EdgekitError, match="labels span 0 to 7"):
        plots.confusion(np.full((2, 3), 1 / 3), np.array([0, 7]))


def test_a_calibrated_predictor_lies_on_the_diagonal_and_an_over_confident_one_below():
    honest = plots.reliability(*predictions())
    boastful = plots.reliability(*predictions(sharpness=2.5))
    assert honest.error < 0.02
    assert boastful.error > 0.08
    used = honest.counts > 0
    assert np.mean((honest.low <= honest.confidence)[used] & (honest.confidence <= honest.high)[used]) > 0.7
    used = boastful.counts > 50
    assert (boastful.high < boastful.confidence)[used][1:].all()


def test_reliability_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.35, 0.65]])
    labels = np.array([0, 0, 1, 1, 1])
    plain = plots.reliability(probabilities, labels)
    assert plain.counts.tolist() == [0] * 6 + [2] + [0] * 2 + [3]
    assert plain.accuracy[[6, 9]] == pytest.approx([1 / 2, 2 / 3])
    assert plain.error == pytest.approx((2 * 0.15 + 3 * (0.95 - 2 / 3)) / 5)
    assert np.isnan(plain.accuracy[0])
    # classes alike: class 0 has two samples of weight 1/2, class 1 three of 1/3
    balanced = plots.reliability(probabilities, labels, balanced=True)
    assert balanced.accuracy[9] == pytest.approx(1 / (1 + 1 / 3))
    assert balanced.accuracy[9] != pytest.approx(plain.accuracy[9])


def test_a_certain_prediction_has_a_bin():
    certain = plots.reliability(np.array([[1.0, 0.0]]), np.array([0]))
    assert certain.counts[-1] == 1
    assert certain.error == 0


@pytest.mark.parametrize("name", FIGURES)
def test_svg_is_reproducible_well_formed_and_small(name):
    figure = FIGURES[name]()
    alone = plots.to_svg(figure, "what it shows")
    within = plots.to_svg(figure, "what it shows", inline=True)
    assert alone == plots.to_svg(FIGURES[name](), "what it shows")
    for text, inline in ((alone, False), (within, True)):
        root = ElementTree.fromstring(text)
        assert root.get("aria-label") == "what it shows"
        assert ("var(--plot-ink" in text) == inline
        assert ("width" in root.attrib) != inline
        assert len(text) < 60_000
        links = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith(("href", "src"))]
        assert all(value.startswith(("#", "data:image/png")) for value in links)
        assert "<style" not in text  # it would restyle the page around it


def test_a_different_number_gives_a_different_picture():
    other = [*STEPS[:2], Point(3, "cluster", 12_001, 0.548, 0.543, 0.553, kept=True)]
    assert plots.to_svg(plots.bytes_per_pass(START, STEPS), "") != plots.to_svg(plots.bytes_per_pass(START, other), "")


def test_rolled_back_passes_are_said_to_be():
    text = plots.to_svg(plots.bytes_per_pass(START, STEPS), "sizes")
    assert text.count("rolled back") == 1
    assert "20,000, rolled back" in text


def test_a_pass_far_beyond_the_limit_is_drawn_at_the_edge_with_its_value():
    far = plots.trajectory(START, STEPS, 0.01, "log-loss")
    assert far.axes[0].get_ylim()[1] < 0.7
    assert "2: 0.9" in plots.to_svg(far, "")
    near = plots.trajectory(START, [STEPS[0], STEPS[2]], 0.01, "log-loss")
    assert "3: " not in plots.to_svg(near, "")


def test_labels_are_text_whatever_they_hold():
    evil = Point(1, "<script>$\\frac{</script>", 10, 0.5, 0.5, 0.5, kept=True)
    text = plots.to_svg(plots.bytes_per_pass(START, [evil]), '"><script>')
    assert "<script" not in text
    ElementTree.fromstring(text)


def test_png_is_reproducible():
    figure = plots.latency_bars(LATENCY)
    assert plots.to_png(figure)[:8] == b"\x89PNG\r\n\x1a\n"
    assert plots.to_png(figure) == plots.to_png(figure)


def test_matplotlib_is_left_as_it_was():
    before = dict(mpl.rcParams)
    plots.to_svg(plots.latency_bars(LATENCY), "times")
    assert dict(mpl.rcParams) == before


def test_no_window_system_is_touched():
    code = "import sys, edgekit.compression.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
