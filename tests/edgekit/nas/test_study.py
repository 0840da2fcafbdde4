"""A study from its spec to its bundles: the same bytes for any number of processes and after any interruption, limits
kept, noise told."""

import json
import math
import random
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekit.bundle.store import open_bundle
from edgekit.cost.roofline import estimate
from edgekit.errors import EdgekitError
from edgekit.nas.clock import Device
from edgekit.nas.explain import explained
from edgekit.nas.finish import finish
from edgekit.nas.latency import Correction
from edgekit.nas.outline import outline
from edgekit.nas.ranks import spearman
from edgekit.nas.report import front_figure
from edgekit.nas.result import Finalist, front, noise_of, ranked, verdict
from edgekit.nas.spec import read_spec, spec_of
from edgekit.nas.strategies import Tried
from edgekit.nas.study import JOURNAL, Study
from edgekit.nn.hiera_config import HieraConfig
from edgekit.session import open_session
from edgekit.targets.profile import find
from tests.edgekit.nas import toy_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def spec(folder):
    return read_spec(toy_study.write(folder))


@pytest.fixture(scope="module")
def done(folder, spec):
    """The study, run by two processes, and what its end wrote."""
    with closing(Study(spec, folder / "done")) as study:
        study.run(2)
        values = finish(study)
        yield study, values


def test_every_arm_tries_its_candidates_within_the_limits(done, spec):
    study, _ = done
    for arm in ("generator", "random"):
        trials = study.trials(arm)
        assert [item["number"] for item in trials] == list(range(6))
        assert len({item["key"] for item in trials}) == 6
        for item in trials:
            assert outline(HieraConfig(**item["arguments"])).macs == item["macs"] <= spec.limits.macs
        assert len(study.rung(1, arm)) == 4  # two networks, two seeds


def test_one_process_writes_the_same_journal_and_leaves_torch_as_it_was(done, folder, spec):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with closing(Study(spec, folder / "alone")) as study:
        study.run(1)
        assert study.journal.digest == done[0].journal.digest
    assert (folder / "alone" / JOURNAL).read_bytes() == (folder / "done" / JOURNAL).read_bytes()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kept", [0.3, 0.8])
def test_a_study_that_was_cut_continues_to_the_same_journal(done, folder, spec, kept):
    whole = (folder / "done" / JOURNAL).read_bytes()
    again = folder / f"cut {kept}"
    again.mkdir()
    (again / JOURNAL).write_bytes(whole[: int(kept * len(whole))])
    with closing(Study(spec, again)) as study:
        study.run(1)
    assert (again / JOURNAL).read_bytes() == whole


@pytest.mark.faults
def test_kills_at_twenty_random_moments_change_nothing(done, folder, spec):
    whole = (folder / "done" / JOURNAL).read_bytes()
    program = [sys.executable, "-c", "from edgekit.cli import main; main()", "search"]
    rng, kills, cut, number = random.Random(0), 0, 0, 0
    while kills < 20:
        again = folder / f"killed {number}"
        begun = (again / "study.toml").exists()
        arguments = ["resume", str(again)] if begun else ["run", str(folder / "spec.toml"), "-o", str(again)]
        process = subprocess.Popen([*program, *arguments], stdout=subprocess.DEVNULL)
        try:
            assert process.wait(rng.uniform(2, 12)) == 0
            assert (again / JOURNAL).read_bytes() == whole
            number += 1  # it was finished: the next kills hit another one
        except subprocess.TimeoutExpired:
            process.kill()  # and not its children, which must end by themselves
            assert process.wait() == -signal.SIGKILL
            kills += 1
            if (again / JOURNAL).exists():
                written = (again / JOURNAL).read_bytes()
                cut += 0 < len(written) < len(whole)
                assert whole.startswith(written[: written.rfind(b"\n") + 1])
            elif again.exists() and not (again / "study.toml").exists():
                again.rmdir()
    assert cut >= 5
    with closing(Study(spec, again)) as study:
        study.run(2)
    assert (again / JOURNAL).read_bytes() == whole


def test_other_rows_are_another_study(done, folder, spec):
    rows = dict(np.load(folder / "rows.npz"))
    rows["image"][0] += 1
    np.savez(folder / "others.npz", **rows)
    other = replace(spec, score=replace(spec.score, data=str(folder / "others.npz")))
    with pytest.raises(EdgekitError, match=r"holds study .* use another folder"):
        Study(other, folder / "cut 0.3")


def test_the_same_rows_under_another_name_are_the_same_study(done, folder, spec):
    (folder / "renamed.npz").write_bytes((folder / "rows.npz").read_bytes())
    other = replace(spec, score=replace(spec.score, data=str(folder / "renamed.npz")))
    with closing(Study(other, folder / "renamed")) as study:
        assert study.id == done[0].id


def test_finalists_are_bundles_that_give_their_score(done):
    study, values = done
    test = study.rows.test
    for row in values["finalists"]:
        bundle = open_bundle(study.folder / "networks" / f"{row['key']}.edge")
        assert bundle.manifest.family == "hiera"
        found = open_session(bundle, "onnxruntime", threads=1).run(dict(test.inputs))["probabilities"]
        right = float((found.argmax(axis=1) == test.labels).mean())
        assert right == pytest.approx(row["scores"][0], abs=1 / len(test))
        measured = values["measured"][row["key"]]
        assert measured["milliseconds"] > 0
        assert measured["breaks"] == []


def test_the_report_shows_every_finalist_and_the_noise(done):
    study, values = done
    page = (study.folder / "report.html").read_text()
    assert all(row["key"] in page for row in values["finalists"])
    assert "<svg" in page
    assert "are not told apart" in page
    assert json.loads((study.folder / "report.json").read_text())["journal"] == study.journal.digest
    assert values["against_random"] in ("better", "worse", "not distinguishable")
    assert set(values["proxies"]) == {"parameters", "macs", "capacity", "jacobian", "synflow"}


def test_a_finalist_that_breaks_a_limit_when_measured_is_marked(done):
    study, _ = done
    study.spec = replace(study.spec, limits=replace(study.spec.limits, milliseconds=1e-9))
    try:
        values = finish(study)
    finally:
        study.spec = replace(study.spec, limits=replace(study.spec.limits, milliseconds=None))
    assert all("are allowed" in item["breaks"][0] for item in values["measured"].values())
    assert "are allowed" in (study.folder / "report.html").read_text()


def test_without_data_a_proxy_is_the_score_and_said_to_be(spec, tmp_path):
    search = replace(spec.search, candidates=3, control=False)
    proxy = replace(spec, search=search, score=replace(spec.score, data="", proxy="synflow"))
    with closing(Study(proxy, tmp_path)) as study:
        study.run(1)
        values = finish(study)
    assert values["score"] == "the proxy synflow, which is no accuracy"
    assert len(values["finalists"]) == 2
    assert values["noise"] is None


LIMIT = 0.6  # ms on that table; some networks of the space take longer


@pytest.fixture
def clock(monkeypatch, fixed_table):
    """Replace the measurements of this machine by fixed ones: a table on which every operator takes 10 us."""
    monkeypatch.setattr("edgekit.nas.clock.table", lambda progress: fixed_table)
    monkeypatch.setattr("edgekit.nas.clock.calibrate", lambda *arguments: Correction((2.0, 1.0, 1.0, 1.0), 0.03, 0.1))
    return fixed_table


def test_predicted_time_is_a_limit_and_part_of_the_studys_identity(clock, spec, tmp_path, monkeypatch):
    score = replace(spec.score, data="", proxy="macs")
    timed = replace(
        spec,
        score=score,
        limits=replace(spec.limits, milliseconds=LIMIT),
        search=replace(spec.search, cost="milliseconds"),
    )
    with closing(Study(timed, tmp_path)) as study:
        study.run(1)
        for item in study.trials("generator"):
            operators = [o for o in outline(HieraConfig(**item["arguments"])).work.operators if not o.view]
            convolutions = sum(o.op_type == "Conv" and o.matrices == 1 for o in operators)
            views = len(outline(HieraConfig(**item["arguments"])).work.operators) - len(operators)
            assert item["milliseconds"] == pytest.approx(1e-2 * (len(operators) + convolutions + views))
            assert item["milliseconds"] * 1.1 <= LIMIT  # the worst error that was seen is 0.1
        identity = study.id
    monkeypatch.setattr("edgekit.nas.clock.table", lambda progress: pytest.fail("the study has its own table"))
    with closing(Study(timed, tmp_path)) as study:
        assert study.id == identity
    (tmp_path / "latency.json").write_text("{}")
    with pytest.raises(EdgekitError, match=r"latency.json: damaged"):
        Study(timed, tmp_path)


FLAT = HieraConfig((1,), ("rep",), (1,), (), 8, 1, 1, image=32)


def finalist(*scores, arm="generator"):
    return Finalist(arm, "k", FLAT, scores, {})


def test_noise_is_the_spread_between_seeds():
    items = [finalist(0.5, 0.6, 0.7), finalist(0.2, 0.2, 0.2)]
    noise = noise_of(items)
    assert noise.spread == pytest.approx(math.sqrt(0.01 / 2))
    assert noise.distinguishable == pytest.approx(2 * math.sqrt(2) * noise.spread / math.sqrt(3))
    assert math.isnan(noise.ceiling)
    assert noise_of([finalist(0.5)]) is None
    assert verdict(finalist(0.9, 0.9), finalist(0.7, 0.7), noise) == "better"
    assert verdict(finalist(0.7, 0.7), finalist(0.9, 0.9), noise) == "worse"
    assert verdict(finalist(0.7, 0.7), finalist(0.75, 0.75), noise) == "not distinguishable"


def test_finalists_are_ranked_by_what_was_measured():
    def item(key, score, macs):
        return Finalist("generator", key, FLAT, (score,), {"macs": macs, "milliseconds": 1.0})

    items = [item("slow", 0.9, 1.0), item("broken", 0.95, 1.0), item("fast", 0.9, 2.0), item("bad", 0.1, 0.5)]
    measured = {key: {"milliseconds": ms, "breaks": []} for key, ms in (("slow", 3.0), ("fast", 1.0), ("bad", 0.1))}
    measured["broken"] = {"milliseconds": 0.5, "breaks": ["0.5 ms, and 0.4 are allowed"]}
    assert [i.key for i in ranked(items, measured, "milliseconds")] == ["fast", "slow", "bad", "broken"]
    assert [i.key for i in ranked(items, measured, "macs")] == ["slow", "fast", "bad", "broken"]


def test_the_picture_shows_where_measured_times_lie():
    points = {"generator": [["a", 1.0, 0.5], ["b", 2.0, 0.6]]}
    values = {"cost": "milliseconds", "points": points, "front": points, "trained": True}
    measured = {"b": {"milliseconds": 2.5, "breaks": []}}
    (axes,) = front_figure({**values, "measured": measured, "limits": {"target": ""}}).axes
    assert [2.0, 2.5] in [list(line.get_xdata()) for line in axes.lines]
    (axes,) = front_figure({**values, "measured": measured, "limits": {"target": "jetson-nano"}}).axes
    assert [2.0, 2.5] not in [list(line.get_xdata()) for line in axes.lines]  # the measured times are of this machine


CANDIDATES = {  # made on a machine with AVX-512, and without its vector instructions
    "generator": (
        "5587aea51cc59158",
        "64e686bf fd74c31d ee97d57a 26f07329 7df20dbc b756a5db 03edf94d a0d4c19e 9951eebd",
        "8b800463 e8384775 64e686bf 2e739a32 80e939a7 82e3284d 48489fb3 a0d4c19e fd74c31d",
    ),
    "nsga2": (
        "ff6bdccc025ecdc8",
        "f3d09a14 00090266 0d8e4ec0 9951eebd 917cef9e 64e686bf 319c1d6c dd401b60 86582b8e",
        "4ffe7f9d 00090266 6a6f1d20 5e2e48ac c8ea66a1 ce42d3db 233c91e2 8ca74c13 cf7d00f2",
    ),
}


@pytest.mark.parametrize("strategy", CANDIDATES)
def test_a_studys_id_stands_for_the_same_candidates_on_every_machine(strategy, spec, tmp_path):
    """Three generations of each arm, stored: their score is exact."""
    identity, own, control = CANDIDATES[strategy]
    search = replace(spec.search, strategy=strategy, candidates=9)
    with closing(
        Study(replace(spec, search=search, score=replace(spec.score, data="", proxy="macs")), tmp_path)
    ) as study:
        study.run(1)
        assert study.id == identity
        for arm, keys in ((strategy, own), ("random", control)):
            assert [item["key"][:8] for item in study.trials(arm)] == keys.split()


def test_ranks_are_compared_as_spearman_does():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, 40).tolist(), rng.integers(0, 5, 40).tolist()
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert math.isnan(spearman([1.0, 1.0], [1.0, 2.0]))


def test_the_front_is_in_the_order_of_cost():
    items = [Tried((), "a", 0.5, 3.0), Tried((), "b", 0.4, 1.0), Tried((), "c", 0.3, 2.0)]
    assert [item.key for item in front(items)] == ["b", "a"]
    assert front([]) == []


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, r"the table \[space\] is missing"),
        ({"space": {"name": "hiera2d"}, "limit": {}}, "limit"),
        ({"space": {"name": "hiera2d"}, "limits": {"macs": -1}}, "macs = -1.*above 0"),
        ({"space": {"name": "hiera2d"}, "search": {"strategy": "grid"}}, "grid"),
        ({"space": {"name": "hiera2d"}, "search": {"candidates": 1}}, "candidates = 1"),
        ({"space": {"name": "hiera2d"}, "score": {"epochs": [5]}}, "two rungs"),
        ({"space": {"name": "hiera2d"}, "score": {"proxy": "naswot"}}, "naswot"),
        ({"space": "hiera2d"}, "expected a table"),
    ],
)
def test_a_bad_spec_is_refused(tables, message):
    with pytest.raises(EdgekitError, match=message):
        spec_of(tables, "spec.toml")


def test_labels_beyond_the_classes_are_refused(folder, spec, tmp_path):
    rows = dict(np.load(folder / "rows.npz"))
    rows["labels"] = rows["labels"] + 1
    np.savez(tmp_path / "rows.npz", **rows)
    with pytest.raises(EdgekitError, match="labels must be whole numbers from 0 to 3"):
        Study(replace(spec, score=replace(spec.score, data=str(tmp_path / "rows.npz"))), tmp_path / "study")


def test_a_devices_time_and_memory_are_limits(spec, tmp_path):
    proxy = replace(spec, score=replace(spec.score, data="", proxy="macs"), search=replace(spec.search, control=False))
    limited = replace(proxy, limits=replace(spec.limits, target="jetson-nano", milliseconds=4.2 * 0.4))
    with closing(Study(limited, tmp_path / "nano")) as study:
        study.run(1)
        values = finish(study)
        for item in study.trials("generator"):
            work = outline(HieraConfig(**item["arguments"])).work
            assert item["milliseconds"] == 1e3 * estimate(work, find("jetson-nano"), 1).seconds <= 0.4
        config = HieraConfig(**item["arguments"])
        assert study.broken(config) == []
        study.clock = replace(study.clock, most=4.19 * item["milliseconds"])
        assert study.broken(config) == ["memory of the device, or time at the largest known error of a prediction"]
        found = explained(study, values["finalists"][0]["key"])
    assert sum(row["milliseconds"] for row in found["parts"] if "milliseconds" in row) == pytest.approx(
        values["finalists"][0]["milliseconds"]
    )
    assert values["clock"]["target"] == "jetson-nano"
    assert "0.9 to 1.2 times on jetson-agx-orin-64gb" in values["clock"]["text"]
    assert all(item["breaks"] == [] for item in values["measured"].values())  # they are of this machine
    nano = find("jetson-nano")
    small = replace(nano, memory=replace(nano.memory, value=1.0))
    assert Device(nano, 1).fits(outline(FLAT))
    assert not Device(small, 1).fits(outline(FLAT))
    assert Device(nano, 1).digest != Device(small, 1).digest


def test_an_unknown_device_is_named(spec, tmp_path):
    with pytest.raises(EdgekitError, match="jetson-nanoo"):
        Study(replace(spec, limits=replace(spec.limits, target="jetson-nanoo")), tmp_path)
