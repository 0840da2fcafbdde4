"""Spaces as data: what is valid, what is the same network, and what is refused."""

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.nas.space import NAMES, key_of, open_space, plain
from edgekit.nn.hiera_config import HieraConfig


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_space_has_valid_networks(name):
    space, rng = open_space({"name": name}), np.random.default_rng(0)
    valid = 0
    for _ in range(300):
        try:
            config = space.config(space.sample(rng))
        except EdgekitError:
            continue
        valid += 1
        assert not config.problem()
    assert valid > 50
    assert space.size > 1e6


def test_what_a_network_does_not_use_does_not_make_it_another_one():
    convolutions = {"depths": (1, 1), "kinds": ("rep", "inverted"), "pools": (True,), "width": 8, "image": 32}
    a = plain(HieraConfig(**convolutions, ratios=(1, 2), head_dim=4, mask_unit=8))
    b = plain(HieraConfig(**convolutions, ratios=(3, 2), head_dim=8, mask_unit=2))
    c = plain(HieraConfig(**convolutions, ratios=(3, 3), head_dim=8, mask_unit=2))
    assert key_of(a) == key_of(b) != key_of(c)
    attention = {"depths": (1, 1), "ratios": (1, 2), "pools": (True,), "width": 8, "head_dim": 4, "image": 32}
    whole = [plain(HieraConfig(**attention, kinds=("global", "global"), mask_unit=n)) for n in (2, 4, 8)]
    units = [plain(HieraConfig(**attention, kinds=("window", "global"), mask_unit=n)) for n in (2, 4, 8)]
    levit = [plain(HieraConfig(**attention, kinds=("levit", "global"), mask_unit=n)) for n in (2, 4, 8)]
    assert len({key_of(config) for config in whole}) == len({key_of(config) for config in levit}) == 1
    assert len({key_of(config) for config in units}) == 3


@pytest.mark.parametrize("kinds", [("global", "global"), ("levit", "levit"), ("levit", "global")])
def test_global_attention_does_not_depend_on_the_unit(kinds):
    import torch

    from edgekit.nn.hiera import Hiera

    outputs = []
    for unit in (2, 4, 8):
        torch.manual_seed(0)
        config = HieraConfig((1, 1), kinds, (1, 2), (True,), 8, 4, unit, image=32, classes=3)
        model = Hiera(config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            outputs.append(model(torch.randn(2, 3, 32, 32)))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


def test_own_lists_replace_those_of_a_packaged_space():
    space = open_space({"name": "hiera2d", "width": [32], "image": 64, "classes": 3})
    assert (space.width, space.image, space.classes) == ((32,), 64, 3)
    assert space.factors["kinds3"] == ("window", "global")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "resnet"}, "resnet"),
        ({"name": "hiera2d", "width": []}, "width = \\[\\]; expected 1 to 64 different values"),
        ({"name": "hiera2d", "width": [32, 32]}, "different values"),
        ({"name": "hiera2d", "pools": [[True]]}, "1 pools; expected a list for each stage"),
        ({"name": "hiera2d", "depth": [1]}, "depth"),
        ({"width": [8]}, "key 'stem' is missing"),
    ],
)
def test_a_bad_space_is_refused(table, message):
    with pytest.raises(EdgekitError, match=message):
        open_space(table)
