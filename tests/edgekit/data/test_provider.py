"""Providers of data sets: which data sets there are, in which state, and what a provider must offer."""

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from edgekit import plugins
from edgekit.bundle.store import write_bundle
from edgekit.data import provider
from edgekit.data.dataset import load
from edgekit.data.provider import PREPROCESSING, PreparedDataset
from edgekit.errors import EdgekitError

SETTINGS = {"id": "toy/1", "scale": 2.0}


class Toys:
    """A provider whose data sets are those that the models of the zoo name."""

    description = "Toy light curves, made here."
    accepts = "nothing"

    def datasets(self):
        return provider.of_the_zoo()

    def prepare(self, dataset: PreparedDataset, source: Path | None, notify):
        notify(f"making {dataset.name}")
        rows = np.arange(12)
        inputs = {"light_curve": np.ones((12, 12, 2), np.float32)}
        dataset.write(inputs, rows % 3, (rows % 4 == 0).astype(np.int8))


@pytest.fixture
def toys(tiny_bundle, tmp_path, monkeypatch):
    """Make the tiny model the whole zoo, measured on the data set `toys`, and return its bundle."""
    bundle = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, data="toys", preprocessing=SETTINGS))
    write_bundle(bundle, tmp_path / "zoo" / "tiny")
    monkeypatch.setattr("edgekit.bundle.zoo.folders", lambda: {"tiny": tmp_path / "zoo" / "tiny"})
    monkeypatch.setenv("EDGEKIT_DATA", str(tmp_path / "prepared"))
    return bundle


@pytest.fixture
def install(monkeypatch, install_points):
    """Return install(provider), which makes this provider the only one."""

    def only(thing):
        module = type(sys)("toy_provider")
        module.thing = thing
        monkeypatch.setitem(sys.modules, "toy_provider", module)
        install_points(EntryPoint("toys", "toy_provider:thing", provider.GROUP))

    return only


@pytest.fixture
def install_points(monkeypatch):
    """Return install_points(...), which makes these the only entry points of providers."""
    real = plugins._points

    def only(*points):
        found = {point.name: point for point in points}
        monkeypatch.setattr(plugins, "_points", lambda group: found if group == provider.GROUP else real(group))

    return only


def test_a_provider_of_another_package_prepares_what_its_model_is_measured_on(edgekit, toys, install, tmp_path):
    install(Toys())
    done = edgekit("data", "toys")
    assert done.status == 0, done.err
    assert "making toys" in done.err
    train, test = load(tmp_path / "prepared" / "toys.npz", toys.manifest)
    assert (len(train), len(test)) == (9, 3)
    listed = edgekit("data").out
    assert "Toy light curves, made here. --from accepts nothing." in listed
    assert listed.splitlines()[1].split() == ["toys", "tiny", "prepared"]


def test_the_state_follows_the_file_and_the_preprocessing(toys):
    (dataset,) = provider.of_the_zoo()
    assert (dataset.name, dataset.model, dataset.state()) == ("toys", "tiny", "not prepared")
    Toys().prepare(dataset, None, lambda message: None)
    assert dataset.state() == "prepared"
    assert replace(dataset, preprocessing={**SETTINGS, "scale": 3.0}).state() == "outdated"


def test_a_file_without_preprocessing_is_outdated(toys):
    (dataset,) = provider.of_the_zoo()
    dataset.path.parent.mkdir()
    np.savez(dataset.path, labels=np.zeros(1))
    assert dataset.state() == "outdated"
    np.savez(dataset.path, **{PREPROCESSING: np.array([dataset._text])})
    assert dataset.state() == "prepared"


def test_an_unknown_name_is_answered_with_the_known_ones(toys, install):
    install(Toys())
    assert provider.find("toys")[0].name == "toys"
    with pytest.raises(EdgekitError, match="unknown data set 'toy'; expected one of: toys; did you mean 'toys'"):
        provider.find("toy")


@pytest.mark.parametrize("missing", ["description", "accepts", "datasets", "prepare"])
def test_a_provider_that_lacks_something_is_refused_by_its_name(missing, install, toys):
    parts = {name: value for name, value in vars(Toys).items() if name not in (missing, "__dict__", "__weakref__")}
    install(type("Part", (), parts)())
    with pytest.raises(EdgekitError, match=f"'toys' cannot be used: it has no '{missing}'; edgekit.data.provider"):
        provider.providers()


def test_a_provider_that_cannot_be_imported_is_refused_with_the_reason(install_points):
    install_points(EntryPoint("toys", "there_is_no_such_package:x", provider.GROUP))
    with pytest.raises(EdgekitError, match=r"provider of data sets 'toys' needs the package 'there_is_no_such_pack"):
        provider.providers()


def test_where_nothing_is_installed_the_next_step_is_named(install_points):
    install_points()
    with pytest.raises(EdgekitError, match=r"no installed model names a data set.*pip install"):
        provider.find("toys")
