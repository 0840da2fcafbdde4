"""Every method against a naive reference, and what all of them promise: exact counts, no padding, reading order."""

import dataclasses

import numpy as np
import pytest
import torch

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.base import Scores, apportion
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import anyres, single, tiled
from edgekit.passes.visual_tokens.methods import METHODS, method
from tests.edgekit.passes.visual_tokens import naive

CANVASES = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))  # of tiles with 56 pixels and 6 x 6 tokens
IMAGES = [anyres(size, CANVASES, 56, 6) for size in ((112, 112), (80, 107), (50, 170), (90, 30))]
IMAGES += [single(6, 6), tiled((1, 2), 6, 6)]


def scored(geometry, seed=0, width=12):
    """Features and scores of an image, with one token far more attended to than the others."""
    torch.manual_seed(seed)
    views, tokens = geometry.views, geometry.tokens
    attention = torch.rand(4, views, tokens) ** 3
    attention[:, :, 7] += 2
    scores = Scores(attention, 3, 2, torch.randn(views, tokens, 3, 5), torch.rand(views, tokens))
    return torch.randn(views, tokens, width), scores


def chosen(name, geometry, rate=0.2, seed=0):
    features, scores = scored(geometry, seed)
    return method(name).select(features, scores, geometry, Budget(rate=rate)), naive.Image(features, scores, geometry)


@pytest.mark.parametrize("geometry", IMAGES)
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("hired", naive.hired), ("fastervlm", naive.fastervlm), ("divprune", naive.divprune), ("scope", naive.scope),
        ("cdpruner", naive.cdpruner), ("edgekit", naive.mean_attention),
    ],
)  # fmt: skip
def test_a_method_keeps_what_its_formula_keeps(name, reference, geometry):
    rate = 0.1 if name in ("divprune", "cdpruner") else 0.2  # beyond the features' rank all determinants are 0
    found, image = chosen(name, geometry, rate)
    expected = reference(image, geometry, Budget(rate=rate).count(geometry))
    assert len(expected) == len(set(expected)) == Budget(rate=rate).count(geometry)
    assert set(found.indices.tolist()) == set(expected)
    assert found.weights is None


@pytest.mark.parametrize("geometry", IMAGES)
@pytest.mark.parametrize(("name", "reference"), [("prumerge", naive.prumerge), ("visionzip", naive.visionzip)])
def test_a_method_merges_as_its_formula_merges(name, reference, geometry):
    found, image = chosen(name, geometry)
    expected = reference(image, geometry, Budget(rate=0.2).count(geometry))
    assert set(found.indices.tolist()) == set(expected)
    for row, index in enumerate(found.indices.tolist()):
        weights = np.zeros(found.weights.shape[1])
        for token, weight in expected[index].items():
            weights[token] = weight
        np.testing.assert_allclose(found.weights[row].numpy(), weights, atol=1e-5)
    features, _ = scored(geometry)
    np.testing.assert_allclose(
        found.features(features).numpy(), found.weights.double().numpy() @ image.features, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("geometry", IMAGES)
@pytest.mark.parametrize("rate", [0.4, 0.2, 0.1, 0.05])
def test_counts_are_exact_and_tokens_are_of_the_image_in_reading_order(name, geometry, rate):
    budget = Budget(rate=rate)
    if name == "base-view" and budget.count(geometry) > geometry.tokens:
        with pytest.raises(EdgekitError, match="more than the 36 of the base view"):
            chosen(name, geometry, rate)
        return
    found, _ = chosen(name, geometry, rate)
    indices = found.indices.tolist()
    assert len(set(indices)) == len(indices)
    if method(name).exact:
        assert len(indices) == budget.count(geometry)
    else:
        assert len(indices) <= budget.count(geometry)
    if not method(name).exact:  # it may keep padding, which the wrong canvas shows
        return
    assert geometry.valid.flatten()[found.indices].all()
    places = geometry.order[found.indices].tolist()
    assert places == sorted(places)
    again, _ = chosen(name, geometry, rate)
    assert torch.equal(again.indices, found.indices)


def test_the_released_hired_gives_strips_for_tiles():
    """All attention is in the top left quarter of the base view: the paper gives it to the first tile, the released
    code to the two tiles at the top, and not to the bottom (facts of its fault 1)."""
    geometry = IMAGES[0]
    features, scores = scored(geometry)
    attention = torch.full_like(scores.attention, 1e-3)
    attention[0, 0].view(6, 6)[:3, :3] = 1.0
    scores = dataclasses.replace(scores, attention=attention)
    counts = {}
    for name in ("hired", "hired-released"):
        found = method(name).select(features, scores, geometry, Budget(rate=0.2)).indices // 36
        counts[name] = torch.bincount(found, minlength=5).tolist()
    assert counts["hired"][1] > 0.9 * sum(counts["hired"][1:])
    released = counts["hired-released"]
    assert released[1] == released[2] > released[3] >= 0
    assert sum(released) <= 36


def test_the_released_hired_loses_tokens_where_the_image_is_not_square():
    found, _ = chosen("hired-released", IMAGES[2])
    assert len(found.indices) < Budget(rate=0.2).count(IMAGES[2])


def test_downsampling_takes_the_mean_of_cells():
    found, _ = chosen("downsample", single(6, 6), 0.25)  # 9 cells of 2 x 2
    np.testing.assert_allclose(found.weights.sum(1).numpy(), 1.0, atol=1e-6)
    for row in found.weights:
        cell = row.nonzero().flatten()
        assert len(cell) == 4
        assert (cell // 6).unique().numel() == (cell % 6).unique().numel() == 2
    assert sorted(found.weights.nonzero()[:, 1].tolist()) == list(range(36))


def test_a_tie_goes_to_the_lower_index():
    geometry = single(4, 4)
    scores = Scores(torch.ones(1, 1, 16), 1, 0, torch.ones(1, 16, 1, 2), torch.ones(1, 16))
    for name in ("fastervlm", "hired", "divprune"):
        found = method(name).select(torch.ones(1, 16, 4), scores, geometry, Budget(tokens=4))
        assert found.indices.tolist() == [0, 1, 2, 3], name


@pytest.mark.parametrize("seed", range(30))
def test_parts_are_those_of_the_largest_remainder(seed):
    rng = np.random.default_rng(seed)
    caps = rng.integers(0, 20, 5).tolist()
    weights = (rng.random(5) * (rng.random(5) > 0.2)).tolist()
    count = int(rng.integers(0, sum(caps) + 4))
    found = apportion(count, weights, caps)
    assert found == naive.shares(count, weights, caps)
    assert sum(found) == min(count, sum(caps))
    assert all(part <= cap for part, cap in zip(found, caps, strict=True))


def test_what_a_method_needs_is_named():
    geometry = single(4, 4)
    scores = Scores(torch.ones(1, 1, 16), 1, 0)
    for name, message in (("prumerge", "tower's keys"), ("visionzip", "tower's keys"), ("cdpruner", "the question")):
        with pytest.raises(EdgekitError, match=message):
            method(name).select(torch.ones(1, 16, 4), scores, geometry, Budget(tokens=4))
    with pytest.raises(EdgekitError, match="hired2"):
        method("hired2")
    with pytest.raises(EdgekitError, match="layer 5 has no scores; the tower ran layers 0 to 0"):
        scores.layer(5)


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "above 0"), (1.5, "at most 1"), (0, "at least 1"), (True, "a rate such as"), ("0.2", "a rate such as")],
)
def test_a_bad_budget_is_refused(value, message):
    with pytest.raises(EdgekitError, match=message):
        Budget.of(value)
