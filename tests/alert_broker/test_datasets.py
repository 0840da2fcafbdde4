"""The provider of PLAsTiCC: the data sets that it offers. The tests of `edgekit data` check the files that it
writes."""

from dataclasses import replace

import pytest

from alert_broker.datasets import PLASTICC
from edgekit.bundle.store import write_bundle
from edgekit.data import provider
from tests.alert_broker.small import small_bundle


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Return a function that fills a zoo with one model for each given data set."""

    def install(*names):
        folders = {f"model-{number}": tmp_path / f"model-{number}" for number in range(len(names))}
        for name, (model, folder) in zip(names, folders.items(), strict=True):
            write_bundle(small_bundle(name=model, data=name), folder)
        monkeypatch.setattr("edgekit.bundle.zoo.folders", lambda: folders)

    return install


def test_it_offers_the_data_sets_of_its_own_that_models_name(zoo):
    zoo("plasticc-gr", "somebody-elses", "plasticc-ugrizy")
    offered = {item.name: item.model for item in PLASTICC.datasets()}
    assert offered == {"plasticc-gr": "model-0", "plasticc-ugrizy": "model-2"}
    assert {item.name for item in provider.of_the_zoo()} - set(offered) == {"somebody-elses"}


def test_it_is_installed_and_complete():
    assert provider.providers()["plasticc"] is PLASTICC
    assert PLASTICC.description.endswith(".")
    assert "snmachine" in PLASTICC.accepts


def test_a_model_with_other_preprocessing_is_refused_before_anything_is_read(zoo, tmp_path):
    zoo("plasticc-gr")
    (dataset,) = PLASTICC.datasets()
    other = replace(dataset, preprocessing={"id": "image/1"})
    said = []
    with pytest.raises(Exception, match="model-0: the preprocessing is 'image/1'"):
        PLASTICC.prepare(other, tmp_path / "nowhere", said.append)
    assert said == []
