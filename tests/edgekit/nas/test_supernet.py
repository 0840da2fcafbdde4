"""Shared weights against networks that have them by themselves, and the gate: an undertrained supernet is refused."""

import math
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.nas import evaluate, study
from edgekit.nas.evaluate import Judged
from edgekit.nas.space import open_space
from edgekit.nas.spec import read_spec, spec_of
from edgekit.nas.strategies import draw, some
from edgekit.nas.study import JOURNAL, SUPERNET, Study
from edgekit.nas.supernet import Supernet, gate, inherit, inherited_score
from edgekit.nn.hiera import Hiera
from edgekit.nn.training import accuracy
from tests.edgekit.nas import toy_study

SPACE = open_space(
    {
        "image": 32, "channels": 1, "classes": 3, "stem": ["conv3x2", "patch4"], "width": [8, 16], "head_dim": [4, 8],
        "mask_unit": [2, 4], "depths": [[1, 2], [1, 2]], "ratios": [[1, 2], [1, 2]],
        "kinds": [["rep", "inverted", "separable", "window"], ["inverted", "window", "global", "levit"]],
        "pools": [[True]],
    }
)  # fmt: skip
NETWORKS = some(SPACE, draw("supernet"), 60, 2000, lambda config: [])


@pytest.fixture(scope="module")
def shared():
    return {name: value.detach() for name, value in Supernet(SPACE, NETWORKS, 0).shared.items()}


def cut(whole, shape):
    """The first numbers along each axis, one at a time."""
    found = np.empty(shape, np.float32)
    for index in np.ndindex(*shape):
        found[index] = whole[index]
    return found


def test_a_network_inherits_the_first_rows_and_columns_of_its_blocks(shared):
    kinds = set()
    for config in NETWORKS:
        found, model = inherit(shared, config), Hiera(config)
        assert {name: value.shape for name, value in found.items()} == {
            name: value.shape for name, value in model.named_parameters()
        }
        first = config.first_attention
        for stage, kind in enumerate(config.kinds):
            for block in range(config.depths[stage]):
                kinds.add(kind)
                changes = block == 0 and stage > 0 and stage != first
                place = f"{stage} {block} {kind}{' wider' if changes else ''}"
                before = config.depths[:stage] if stage < first else config.depths[first:stage]
                prefix = f"{'convolutions' if stage < first else 'blocks'}.{sum(before) + block}."
                own = {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}
                assert own
                for name, value in own.items():
                    whole = shared["/".join([place, *name.split(".")])].numpy()
                    if "qkv" in name:  # queries, keys and values are cut one by one
                        parts = [cut(part, (len(value) // 3, *value.shape[1:])) for part in whole]
                        np.testing.assert_array_equal(value.numpy(), np.concatenate(parts))
                    else:
                        np.testing.assert_array_equal(value.numpy(), cut(whole, value.shape))
    assert kinds == {"rep", "inverted", "separable", "window", "global", "levit"}


def test_a_step_trains_the_network_that_was_drawn_and_nothing_else():
    model = Supernet(SPACE, NETWORKS[:1], 0).train()
    config, image = NETWORKS[0], torch.randn(4, 1, 32, 32)
    alone = Hiera(config).train()
    alone.load_state_dict(inherit(dict(model.shared.items()), config), strict=False)
    expected = alone(image)
    torch.testing.assert_close(model(image), expected)
    model(image).square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: value.grad for name, value in model.shared.items() if value.grad is not None}
    found = inherit({**{name: torch.zeros_like(v) for name, v in model.shared.items()}, **gradients}, config)
    for name, value in alone.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-5)
    inside = sum(int((value.grad != 0).sum()) for value in alone.parameters())
    assert sum(int((value != 0).sum()) for value in gradients.values()) == inside


def test_statistics_are_those_of_the_network(shared):
    """A network with inherited weights is judged as one that has seen the training rows, whatever was shared."""
    rng = np.random.default_rng(0)
    data = Dataset({"image": rng.normal(2, 3, (48, 1, 32, 32)).astype(np.float32)}, rng.integers(0, 3, 48))
    config = next(item for item in NETWORKS if item.kinds[0] == "rep")
    model = Hiera(config)
    model.load_state_dict(inherit(shared, config), strict=False)
    images = torch.from_numpy(data.inputs["image"])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the last batch, which is all rows
    with torch.no_grad():
        untouched = model.eval()(images)
        model.train()(images)
        settled = model.eval()(images)
    assert inherited_score(shared, config, data, data) == accuracy(model.eval(), data)
    assert not torch.allclose(untouched, settled, rtol=0.1)  # planted: without statistics, it is another network


def test_the_gate_needs_agreement_over_six_networks():
    alone = [0.5, 0.6, 0.7, 0.8, 0.82, 0.9]
    assert gate(alone, [0.2, 0.3, 0.25, 0.4, 0.5, 0.6]).accepted
    assert not gate(alone[:5], [0.2, 0.3, 0.4, 0.5, 0.6]).accepted
    inverted = gate(alone, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert not inverted.accepted
    assert inverted.correlation == pytest.approx(-1)
    assert "correlate by -1.00 (Spearman), and 0.5 is the least: the supernet was refused" in str(inverted)
    constant = gate(alone, [0.3] * 6)
    assert not constant.accepted
    assert math.isnan(constant.correlation)
    assert "have no order" in str(constant)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("supernet")


@pytest.fixture(scope="module")
def spec(folder):
    found = read_spec(toy_study.write(folder))
    return replace(
        found,
        search=replace(found.search, control=False),
        score=replace(found.score, epochs=(1, 2), seeds=1, supernet=2, check=12),
    )


@pytest.fixture(scope="module")
def undertrained(folder, spec):
    with closing(Study(spec, folder / "undertrained")) as found:
        found.run(1)
        yield found


def test_an_undertrained_supernet_is_refused(undertrained, spec):
    """Its scores, which are near chance, do not agree with those of twelve trainings."""
    checks = [item for item in undertrained.journal.events if item["event"] == "check"]
    assert len(checks) == 12
    found = undertrained.gate
    assert not found.accepted
    assert found.correlation == gate([e["score"] for e in checks], [e["inherited"] for e in checks]).correlation < 0.5
    from edgekit.nas.result import summary

    told = summary(undertrained)["supernet"]
    assert told["correlation"] == found.correlation
    assert "refused" in told["text"]
    # every network of the first rung was trained alone
    item = undertrained.trials("generator")[0]
    with evaluate.prepared(undertrained.rows, spec.score):
        job = evaluate.Job(item["arguments"], undertrained._seed(item["key"], 0), spec.score.epochs[0])
        assert evaluate.judge(job).score == item["score"]


def test_a_killed_study_continues_to_the_same_bytes_in_any_number_of_processes(undertrained, spec, folder):
    whole = (undertrained.folder / JOURNAL).read_bytes()
    weights = (undertrained.folder / SUPERNET).read_bytes()

    def stop(what, done, total):
        if (what, done) == ("training the supernet", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), closing(Study(spec, folder / "killed", stop)) as found:
        found.run(1)
    assert (folder / "killed" / f"{SUPERNET}.checkpoint").is_file()
    assert (folder / "killed" / JOURNAL).read_bytes().count(b"\n") == 1
    with closing(Study(spec, folder / "killed")) as found:
        found.run(1)
    assert (folder / "killed" / SUPERNET).read_bytes() == weights
    assert (folder / "killed" / JOURNAL).read_bytes() == whole
    assert not (folder / "killed" / f"{SUPERNET}.checkpoint").exists()
    lines = whole.splitlines(keepends=True)
    (folder / "killed" / JOURNAL).write_bytes(b"".join(lines[:6]) + lines[6][:9])  # within the checks
    (folder / "killed" / SUPERNET).unlink()
    with closing(Study(spec, folder / "killed")) as found:
        found.run(2)
    assert (folder / "killed" / JOURNAL).read_bytes() == whole


def test_other_weights_than_those_of_the_journal_are_refused(undertrained, spec, folder, monkeypatch):
    (folder / "other").mkdir()
    (folder / "other" / JOURNAL).write_bytes((undertrained.folder / JOURNAL).read_bytes())
    real = study.trained
    monkeypatch.setattr(
        study, "trained", lambda *arguments: {name: value + 1 for name, value in real(*arguments).items()}
    )
    with closing(Study(spec, folder / "other")) as found, pytest.raises(EdgekitError, match="other weights than"):
        found.run(1)


def test_a_supernet_that_agrees_judges_the_first_rung(spec, folder, monkeypatch):
    """Planted scores: what a network inherits is in the order of what it learns alone."""
    learned = []

    def planted(job):
        value = float(draw("planted", sorted(job.arguments.items())).random())
        if job.supernet:
            return Judged(0.3 + value / 2, {"jacobian": 0.0, "synflow": 0.0} if job.proxies else {})
        learned.append(job)
        weights = {"w": np.zeros(1, np.float32)} if job.last else None
        return Judged(0.5 + value / 2, {}, weights)

    monkeypatch.setattr(evaluate, "judge", planted)
    with closing(Study(spec, folder / "planted")) as found:
        found.run(1)
        assert found.gate.accepted
        assert found.gate.correlation == pytest.approx(1)
        assert all(0.3 <= item["score"] < 0.8 for item in found.trials("generator"))
        assert len(learned) == 12 + len(found.rung(1, "generator"))
        assert [job.epochs for job in learned] == [1] * 12 + [2] * len(found.rung(1, "generator"))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"supernet": 5}, "supernet = 5 needs data"),
        ({"supernet": -1, "data": "x"}, "supernet = -1"),
        ({"supernet": 5, "data": "x", "check": 5}, "check = 5; expected epochs, and 6 or more"),
    ],
)
def test_a_bad_spec_is_refused(score, message):
    with pytest.raises(EdgekitError, match=message):
        spec_of({"space": {"name": "hiera2d"}, "score": score}, "spec.toml")


def test_studies_without_a_supernet_keep_their_id():
    tables = {"space": {"name": "hiera2d"}, "score": {"data": "x"}}
    plain = spec_of(tables, "spec.toml")
    assert plain.study("", "") == replace(plain, score=replace(plain.score, check=9)).study("", "")
    assert plain.study("", "") != replace(plain, score=replace(plain.score, supernet=1)).study("", "")
