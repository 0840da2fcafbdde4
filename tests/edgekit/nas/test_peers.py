"""What the benchmarks beside published networks compute, on numbers that are known."""

import json
import sys

import pytest

from edgekit.nas.result import noise_of
from edgekit.nn.hiera_config import HieraConfig, arguments
from tests.conftest import ROOT

TIMES = {"found": 10.0, "FasterViT-0": 21.0, "MobileViTv2-2.0": 31.0, "LeViT-384": 11.0, "random control's best": 9.0}
NETWORK = HieraConfig((1,), ("rep",), (1,), (), 8, 1, 1, image=32)


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_the_bars_are_those_of_batch_one(tools):
    from bench_turbovit import bars

    assert bars(TIMES) == {
        "fastest peer": "LeViT-384", "times the fastest peer": 1.1, "times FasterViT-0": 2.1,
        "times MobileViTv2-2.0": 3.1, "faster than all": True, "2x FasterViT-0": True, "3x MobileViTv2-2.0": True,
    }  # fmt: skip
    slow = bars({**TIMES, "found": 11.0})
    assert [slow[name] for name in ("faster than all", "2x FasterViT-0", "3x MobileViTv2-2.0")] == [False] * 3


def test_a_finalist_that_breaks_a_limit_is_not_the_found_network(tools, tmp_path):
    from bench_turbovit import found_networks

    rows = [{"arm": arm, "key": key, "arguments": arguments(NETWORK)} for arm, key in (("nsga2", "a"), ("random", "b"))]
    values = dict.fromkeys(("study", "score", "limits", "trials", "clock"), "")
    measured = {"a": {"breaks": []}, "b": {"breaks": ["20 ms, and 16 are allowed"]}}
    (tmp_path / "report.json").write_text(json.dumps({**values, "finalists": rows, "measured": measured}))
    assert found_networks(tmp_path)[0] == {"found": NETWORK}
    measured["a"], measured["b"] = measured["b"], measured["a"]
    (tmp_path / "report.json").write_text(json.dumps({**values, "finalists": rows, "measured": measured}))
    with pytest.raises(SystemExit, match="no finalist of the search keeps its limits"):
        found_networks(tmp_path)


def test_a_peer_is_below_or_above_beyond_the_noise_alone(tools):
    from bench_animals import Trained, compared

    found = Trained("found", (0.90, 0.91, 0.92))
    peers = [Trained(name, scores) for name, scores in (
        ("best", (0.94, 0.95, 0.96)), ("equal", (0.91, 0.92, 0.93)), ("worst", (0.8, 0.81, 0.82)),
    )]  # fmt: skip
    noise = noise_of([found, *peers])
    assert noise.distinguishable == pytest.approx(2 * 2**0.5 * 0.01 / 3**0.5)
    assert [row["verdict"] for row in compared([found], peers, noise)] == [
        "below", "not below beyond the noise", "above, beyond the noise",
    ]  # fmt: skip


def test_absent_peers_are_named_with_how_to_get_them(tools, tmp_path, monkeypatch):
    from peer_networks import use

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r"pip install --no-deps --target .* timm==.* fastervit=="):
        use(tmp_path)
    assert "torchvision" not in sys.modules  # no stand-in stays behind
