"""How a consumer opens its models."""

import pytest

from alert_broker import gaussian_process
from alert_broker.stream import classifiers
from alert_broker.stream.config import Config, Model


@pytest.mark.parametrize(("cores", "threads", "expected"), [(1, 0, 1), (2, 0, 1), (8, 0, 7), (8, 8, 8), (2, 3, 3)])
def test_the_gaussian_process_leaves_a_core_to_the_other_stages(cores, threads, expected, monkeypatch):
    given = {}
    monkeypatch.setattr(gaussian_process, "cores", lambda: cores)
    monkeypatch.setattr(classifiers, "Classifiers", lambda *arguments, **options: given.update(options))
    classifiers.open_classifiers(Config(model=Model(threads=threads, reuse="off")), None)
    assert given["threads"] == expected
