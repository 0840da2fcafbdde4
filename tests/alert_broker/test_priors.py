"""Priors: Bayes' rule by hand, and files with faults."""

import numpy as np
import pytest

from alert_broker import plasticc
from alert_broker.priors import SHARES, Prior, weigh
from edgekit.errors import EdgekitError

CLASSES = tuple(plasticc.CLASSES.values())


def test_probabilities_are_weighted_by_the_shares():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
    weights = Prior("mine", {"a": 1.0, "b": 2.0, "c": 1.0}).weights(("a", "b", "c"), "model")
    found = weigh(probabilities, weights)
    np.testing.assert_allclose(found, [[0.4, 0.4, 0.2], [0, 0, 0], [1, 0, 0]], atol=1e-6)
    assert Prior.named("uniform").weights(CLASSES, "model") is None
    halved = Prior("half", {name: share / 2 for name, share in SHARES["lsst"].items()}).weights(CLASSES, "model")
    np.testing.assert_allclose(halved, Prior.named("lsst").weights(CLASSES, "model"))  # only the ratios count
    assert weigh(probabilities, np.ones(3))[0].tolist() == probabilities[0].tolist()


def test_the_prior_of_a_survey_is_the_whole_challenge():
    assert sum(SHARES["lsst"].values()) == 3_479_801  # objects of PLAsTiCC's test set in the fourteen classes
    assert set(SHARES["lsst"]) == set(CLASSES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SNIa = 0", "expected a share above 0"),
        ("SNIa = true", "expected a share above 0"),
        ("SNIa = nan", "expected a share above 0"),
        ("SNIa 0.4", "is not TOML"),
        ("", "names no class"),
        ("SNIa = 1", "has no share for mu-Lens"),
        ("Nova = 1", "unknown class 'Nova'"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, text, said):
    path = tmp_path / "shares.toml"
    path.write_text(text)
    with pytest.raises(EdgekitError, match=said):
        Prior.named(str(path)).weights(CLASSES, "model")


def test_an_unknown_prior_names_the_known_ones(tmp_path):
    with pytest.raises(EdgekitError, match="uniform, lsst"):
        Prior.named("Uniform")
    with pytest.raises(EdgekitError, match="does not exist"):
        Prior.named(str(tmp_path / "none.toml"))
