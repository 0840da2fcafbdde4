"""Choosing tokens: by the rules, and the same ones again."""

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from runtimes.llm.sampling import Sampling, choose, probabilities

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))


def kept(**options):
    weights = probabilities(LOGITS.astype(np.float64), Sampling(temperature=1.0, **options))
    return np.flatnonzero(weights).tolist()


def test_temperature_0_takes_the_largest():
    assert choose(LOGITS, Sampling(), [], 0) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.76}, [0, 1, 2]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"min_p": 0.4, "top_k": 4, "top_p": 0.99}, [0, 1]),
    ],
)
def test_which_tokens_may_be_chosen(options, expected):
    assert kept(**options) == expected


def by_sorting(scores, sampling):
    """The weights by the definition, with all tokens sorted."""
    weights = np.exp((scores - scores.max()) / sampling.temperature)
    order = np.argsort(-weights, kind="stable")
    kept = min(sampling.top_k or len(order), len(order))
    if sampling.top_p < 1:
        ends = weights[order].cumsum()
        kept = min(kept, int(np.searchsorted(ends, sampling.top_p * ends[-1])) + 1)
    if sampling.min_p:
        kept = min(kept, int((weights[order] >= sampling.min_p).sum()))
    weights[order[kept:]] = 0.0
    return weights


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 0.9999}, {"top_k": 40}, {"top_k": 1}, {"min_p": 0.05},
        {"top_p": 0.95, "top_k": 40}, {"top_p": 0.8, "top_k": 500, "min_p": 0.01}, {},
    ],
)  # fmt: skip
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_the_tokens_are_those_of_a_whole_sort(options, spread):
    rng = np.random.default_rng(7)
    for rounded in (3, 1):  # with one digit, many logits are equal
        scores = rng.normal(0, spread, 5000).round(rounded)
        scores[rng.random(5000) < 0.1] = -np.inf  # what a grammar excludes
        sampling = Sampling(temperature=0.8, **options)
        np.testing.assert_array_equal(probabilities(scores, sampling), by_sorting(scores, sampling))


def test_frequencies_are_the_probabilities():
    drawn = np.bincount([choose(LOGITS, Sampling(1.0, seed=1), [], n) for n in range(4000)], minlength=5) / 4000
    assert np.abs(drawn - np.exp(LOGITS)).max() < 0.025
    hot = np.bincount([choose(LOGITS, Sampling(2.0, seed=1), [], n) for n in range(4000)], minlength=5) / 4000
    expected = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
    assert np.abs(hot - expected).max() < 0.025
    assert np.abs(hot - np.exp(LOGITS)).max() > 0.05


def test_a_choice_depends_on_its_seed_and_its_number_alone():
    first = [choose(LOGITS, Sampling(1.0, seed=5), [], n) for n in range(50)]
    backwards = [choose(LOGITS, Sampling(1.0, seed=5), [], n) for n in reversed(range(50))]
    assert first == backwards[::-1]
    assert first != [choose(LOGITS, Sampling(1.0, seed=6), [], n) for n in range(50)]


def test_a_repetition_is_less_probable():
    assert choose(LOGITS, Sampling(repetition=3.0), [0], 0) == 1
    assert choose(-LOGITS, Sampling(repetition=3.0), [4], 0) == 3


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"min_p": 1}, {"seed": -1}],
)
def test_values_that_mean_nothing_are_refused(options):
    with pytest.raises(EdgekitError, match=f"{next(iter(options))} ="):
        Sampling(**options)
