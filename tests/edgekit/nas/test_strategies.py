"""Proposals: pure functions of the study, the number and the history; fronts against the definition."""

import itertools
import re

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.nas import strategies
from edgekit.nas.space import key_of, open_space
from edgekit.nas.spec import Limits
from edgekit.nas.strategies import (
    STRATEGIES,
    Tried,
    crowding,
    draw,
    effects,
    factor_weights,
    fronts,
    propose,
    some,
    survivors,
)  # fmt: skip

PLAIN = {
    "stem": ["patch4"], "head_dim": [16], "mask_unit": [8], "depths": [[1]], "ratios": [[1]], "kinds": [["rep"]],
    "pools": [], "image": 32,
}  # fmt: skip
SPACE = open_space({"name": "hiera2d", "image": 64, "width": [16, 32, 64], "head_dim": [16], "mask_unit": [8]})


def study(strategy, count, generation=6, wanted=64, seed="s"):
    """Try networks of which wide ones are better."""
    history, known = [], set()
    for number in range(count):
        choice, config = propose(strategy, SPACE, seed, number, generation, history, known, lambda config: [])
        known.add(key_of(config))
        score = -abs(config.width - wanted) + 0.01 * config.depths[0]
        history.append(Tried(choice, key_of(config), float(score), float(sum(config.depths))))
    return history


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_study_proposes_the_same_networks(strategy):
    assert study(strategy, 18) == study(strategy, 18)
    assert study(strategy, 18) != study(strategy, 18, seed="another")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_proposal_depends_on_earlier_generations_alone(strategy):
    history = study(strategy, 12)
    known = {item.key for item in history}
    changed = [*history[:6], *(Tried(item.choice, item.key, 99.0, 0.0) for item in history[6:])]
    arguments = strategy, SPACE, "s", 11, 6
    assert propose(*arguments, history, known, lambda c: []) == propose(*arguments, changed, known, lambda c: [])


def test_the_generator_and_nsga2_find_better_networks_than_chance():
    late = {name: np.mean([item.score for item in study(name, 48)[24:]]) for name in STRATEGIES}
    assert late["generator"] > late["random"] + 5
    assert late["nsga2"] > late["random"] + 5


def test_limits_are_kept_and_impossible_ones_are_named(monkeypatch):
    monkeypatch.setattr(strategies, "MOST_DRAWS", 1000)
    _, config = propose("random", SPACE, "s", 0, 6, [], set(), lambda config: ["width"] * (config.width > 16))
    assert config.width == 16
    # of three widths, two are above 16, and each network has more than half a layer
    limits = Limits(parameters=16, macs=0.5)
    with pytest.raises(EdgekitError, match=r"none of 1,000 networks drawn for trial 0 can be tried") as raised:
        propose("random", SPACE, "s", 0, 6, [], set(), lambda c: limits.broken({"parameters": c.width, "macs": 1}))
    counts = {
        text: int(n.replace(",", "")) for n, text in re.findall(r"([\d,]+) break (\w+ = [\d.]+)", str(raised.value))
    }
    assert counts["macs = 0.5"] > 800
    assert counts["parameters = 16"] == pytest.approx(2 / 3 * counts["macs = 0.5"], rel=0.1)
    assert "do not fit together" not in str(raised.value) or "such as: hiera" in str(raised.value)


def test_what_was_tried_before_is_counted(monkeypatch):
    monkeypatch.setattr(strategies, "MOST_DRAWS", 50)
    space = open_space({**PLAIN, "width": [16]})
    known = {key_of(space.config((0,) * len(space.factors)))}
    with pytest.raises(EdgekitError, match=r": 50 were tried before; allow more in \[limits\] or \[space\]"):
        propose("random", space, "s", 0, 6, [], known, lambda config: [])


def test_some_are_different_and_keep_the_limits():
    found = some(SPACE, draw("s"), 20, 500, lambda config: ["width"] * (config.width > 16))
    assert len({key_of(config) for config in found}) == 20
    assert {config.width for config in found} == {16}
    assert len(some(open_space({**PLAIN, "width": [16]}), draw("s"), 20, 50, lambda config: [])) == 1
    with pytest.raises(EdgekitError, match=r"none of 50 networks keeps \[limits\]: 50 break width; allow more"):
        some(open_space({**PLAIN, "width": [16]}), draw("s"), 20, 50, lambda config: ["width"])


def test_random_numbers_differ_between_decisions():
    assert draw("a", 1).random() == draw("a", 1).random()
    assert len({draw(*parts).random() for parts in (("a", 1), ("a", 2), ("b", 1), ("a", "1", 1))}) == 4


def dominates(first: Tried, second: Tried) -> bool:
    """Return whether the first is as good in both and better in one."""
    as_good = first.score >= second.score and first.cost <= second.cost
    return as_good and (first.score > second.score or first.cost < second.cost)


def test_fronts_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    items = [Tried((), str(n), float(rng.integers(6)), float(rng.integers(6))) for n in range(40)]
    left = set(range(40))
    for front in fronts(items):
        expected = {a for a in left if not any(dominates(items[b], items[a]) for b in left)}
        assert set(front) == expected
        left -= expected
    assert not left


def test_the_ends_of_a_front_are_kept_first():
    front = [Tried((), str(n), float(n), float(n)) for n in (0, 1, 2, 10)]
    distance = crowding(front)
    assert np.isinf(distance[[0, 3]]).all()
    np.testing.assert_allclose(distance[1:3], [0.4, 1.8])
    assert [item.key for item in survivors(front, 2)] == ["0", "10"]


def test_weights_move_to_the_best_and_forget_nothing():
    history = study("random", 24)
    weights = factor_weights(SPACE, history)
    best = max(range(3), key=lambda index: weights["width"][index])
    assert SPACE.width[best] == 64
    for values in weights.values():
        assert min(values) > 0
        assert sum(values) == pytest.approx(1)


def test_effects_name_the_strongest_factor_first():
    factor, means = effects(SPACE, study("random", 40))[0]
    assert factor == "width"
    assert max(means, key=means.__getitem__) == "64"


def test_dominating_is_an_order():
    items = [Tried((), "", *pair) for pair in itertools.product((0.0, 1.0), repeat=2)]
    assert not any(dominates(item, item) for item in items)
    assert not any(dominates(a, b) and dominates(b, a) for a, b in itertools.permutations(items, 2))
