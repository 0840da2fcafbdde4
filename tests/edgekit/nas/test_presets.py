"""The packaged specs: what they limit, and the times of devices that are not here."""

import itertools
import math

import pytest

from edgekit.cost.roofline import estimate
from edgekit.errors import EdgekitError
from edgekit.nas.clock import ThisMachine
from edgekit.nas.latency import WORST, Correction, Measured
from edgekit.nas.outline import outline
from edgekit.nas.proxies import sizes
from edgekit.nas.spec import PRESETS, preset_text, spec_of
from edgekit.nas.strategies import draw
from edgekit.nn.hiera_config import CONVOLUTIONS, HieraConfig, published
from edgekit.settings import read_toml
from edgekit.targets.profile import find

FLAT = HieraConfig((1,), ("rep",), (1,), (), 8, 1, 1, image=32)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Return a function that reads a preset on a machine where an image takes 10 ns for each parameter."""
    monkeypatch.setattr("edgekit.nas.spec.exported", lambda config: config)
    monkeypatch.setattr(
        "edgekit.nas.spec.measure", lambda configs: [Measured(1e-8 * outline(item).parameters, 1.0) for item in configs]
    )

    def read(name):
        path = tmp_path / "spec.toml"
        path.write_text(preset_text(name))
        return spec_of(read_toml(path), name)

    return read


@pytest.mark.parametrize("name", [*PRESETS, "turbovit-jetson-nano"])
def test_a_preset_keeps_the_published_limits(name, opened):
    spec = opened(name)
    assert (spec.limits.parameters, spec.limits.macs) == (12.71e6, 2.2e9)
    assert spec.timed
    drawn = 0
    for number in itertools.count():
        try:
            config = spec.space.config(spec.space.sample(draw(name, number)))
        except EdgekitError:
            continue
        assert config.pools == (True, True, True)  # a quarter of the tokens at three places
        assert config.kinds[2] == "window" or name == "turbovit-envelope"
        assert config.kinds[0] in (("window",) if name == "turbovit-envelope" else CONVOLUTIONS)
        drawn += 1
        if drawn == 20:
            return


def test_the_limit_of_time_is_half_of_a_hieras_time_there(opened):
    limits = opened("turbovit-jetson-nano").limits
    hiera = outline(published((1, 2, 7, 2), width=64, heads=1))
    assert hiera.parameters == pytest.approx(12.66e6, rel=1e-3)
    assert hiera.macs == pytest.approx(2.25e9, rel=5e-3)
    seconds = estimate(hiera.work, find("jetson-nano"), 1).seconds
    assert limits.target == "jetson-nano"
    assert limits.milliseconds == pytest.approx(1e3 * WORST * seconds / 2, rel=5e-3)  # as a limit counts estimates
    faster = opened("turbovit-jetson-orin-nano-8gb").limits
    assert faster.milliseconds < limits.milliseconds
    here = opened("turbovit-this-cpu").limits
    assert here.target == ""
    assert here.milliseconds == pytest.approx(1e-5 * hiera.parameters / 2, rel=5e-3)
    assert opened("turbovit-envelope").limits.milliseconds is None


def test_an_unknown_device_of_a_preset_is_refused_with_those_that_are_known():
    with pytest.raises(EdgekitError, match=r"turbovit-jetson-nona.*turbovit-jetson-nano"):
        preset_text("turbovit-jetson-nona")
    with pytest.raises(EdgekitError, match="jetson-nano"):
        preset_text("jetson-nano")  # it needs the word before it


def test_capacity_grows_with_both_sizes():
    assert sizes(4, 9) == {"parameters": 4.0, "macs": 9.0, "capacity": 6.0}
    assert sizes(4, 10)["capacity"] > 6 < sizes(5, 9)["capacity"]


@pytest.mark.parametrize(("worst", "kept"), [(0.05, True), (0.2, False)])
def test_a_limit_of_time_holds_in_the_worst_error_that_was_seen(worst, kept, fixed_table):
    clock = ThisMachine(fixed_table, Correction((1.0,) * 4, 0.01, worst), 1)
    found = outline(FLAT)
    assert clock.fits(found)  # nothing is limited
    limited = ThisMachine(clock.table, clock.correction, 1, 1.1 * clock.milliseconds(found))
    assert limited.fits(found) is kept
    assert math.isclose(limited.milliseconds(found), clock.milliseconds(found))
