"""The zoo: models by name, from a checkout or from a wheel."""

from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.bundle import zoo
from edgekit.bundle.store import write_bundle
from edgekit.errors import EdgekitError
from edgekit.importers.files import resolve


@pytest.fixture
def models(tiny_bundle, tmp_path, monkeypatch):
    """Two models in the zoo and an empty working directory."""
    for name in ("t2-one", "t2-two"):
        write_bundle(replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, name=name)), tmp_path / "zoo" / name)
    found = {name: tmp_path / "zoo" / name for name in ("t2-one", "t2-two")}
    monkeypatch.setattr(zoo, "folders", lambda: found)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found


def test_a_name_and_a_path(models, tiny_bundle):
    assert resolve("t2-one").manifest.name == "t2-one"
    write_bundle(tiny_bundle, "mine.edge")
    assert resolve("mine.edge").manifest.name == "tiny"
    write_bundle(tiny_bundle, "t2-two")
    assert resolve("t2-two").manifest.name == "tiny", "what is here comes before the zoo"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("t2-on", "unknown model 't2-on'.*did you mean 't2-one'"),
        ("no.edge", "no.edge: no such bundle"),
        ("a/b", "a/b: no such bundle"),
        ("no.edgepack", "no.edgepack: no such bundle"),
    ],
)
def test_what_is_neither(text, words, models):
    with pytest.raises(EdgekitError, match=words):
        resolve(text)


def test_an_empty_zoo_says_so(models, monkeypatch):
    monkeypatch.setattr(zoo, "folders", dict)
    with pytest.raises(EdgekitError, match="no models are installed"):
        resolve("t2-one")


def test_every_model_of_the_checkout_is_found_and_opens():
    root = Path(__file__).resolve().parents[3] / "models"
    expected = {path.parent.name for path in root.glob("*/edgekit.json")}
    assert set(zoo.folders()) == expected
    for name in expected:
        assert resolve(name).manifest.name == name


def test_models_of_a_wheel_are_found_under_its_prefix(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "lib" / "edgekit" / "bundle" / "zoo.py"))
    monkeypatch.setattr(zoo.sys, "prefix", str(tmp_path))
    write_bundle(tiny_bundle, tmp_path / "share" / "edgekit" / "models" / "tiny")
    assert zoo.folders.__wrapped__() == {"tiny": tmp_path / "share" / "edgekit" / "models" / "tiny"}
