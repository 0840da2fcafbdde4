"""edgekit models"""

import json
from dataclasses import replace

import pytest

from edgekit.bundle import zoo
from edgekit.bundle.format import WEIGHTS
from edgekit.bundle.store import write_bundle


@pytest.fixture
def models(tiny_bundle, tmp_path, monkeypatch):
    metrics = {"log_loss": {"value": 0.8125}}
    write_bundle(
        replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, data="toys", metrics=metrics)), tmp_path / "a"
    )
    write_bundle(tiny_bundle, tmp_path / "b")
    monkeypatch.setattr(zoo, "folders", lambda: {"a": tmp_path / "a", "b": tmp_path / "b"})
    return tmp_path


def test_table(models, edgekit, tiny_bundle):
    done = edgekit("models")
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[1].split() == [
        "a",
        "t2",
        f"{sum(v.size for v in tiny_bundle.weights().values()):,}",
        "3",
        "toys",
        "0.812",
    ]


def test_json(models, edgekit):
    found = json.loads(edgekit("models", "--json").out)
    assert [item["name"] for item in found] == ["a", "b"]
    assert found[0]["inputs"] == {"light_curve": "(batch, 12, 2)"}
    assert found[0]["log_loss"] == 0.8125
    assert found[1]["log_loss"] is None
    assert found[1]["path"] == str(models / "b")


def test_a_damaged_model_is_named(models, edgekit):
    (models / "a" / WEIGHTS).unlink()
    assert edgekit("models").failed_with(1, str(models / "a" / WEIGHTS), "missing")


def test_the_models_of_the_checkout_are_listed(edgekit):
    found = json.loads(edgekit("models", "--json").out)
    assert {item["name"] for item in found} == set(zoo.folders())
