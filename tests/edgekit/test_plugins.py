"""Plug-ins: found by name, and a missing package is named."""

import importlib
from importlib.metadata import EntryPoint

import pytest

from edgekit import plugins
from edgekit.errors import EdgekitError


@pytest.mark.parametrize("group", plugins.KINDS)
def test_every_registered_name_of_ours_loads(group):
    assert plugins.names(group) == sorted(plugins.names(group))
    assert plugins.names(group)
    for name, point in plugins._points(group).items():
        module, _, attribute = point.value.partition(":")
        if module.split(".")[0] in ("edgekit", "exporters", "runtimes"):
            assert plugins.load(group, name) is getattr(importlib.import_module(module), attribute)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(EdgekitError, match=r"unknown pass 'clustr'.*quantize.*did you mean 'cluster'"):
        plugins.load("edgekit.passes", "clustr")


@pytest.mark.parametrize(("code", "words"), [("def (", "SyntaxError"), ("1 / 0", "ZeroDivisionError")])
def test_code_of_the_users_that_cannot_be_imported_is_one_line(code, words, tmp_path, monkeypatch):
    (tmp_path / "my_broken_code.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EdgekitError, match=rf"metric 'my_broken_code:f': my_broken_code cannot be imported: {words}"):
        plugins.imported("my_broken_code:f", "metric")


def test_a_missing_package_is_named_and_a_checkout_that_is_not_installed_too(monkeypatch):
    point = EntryPoint("x", "no_such_package.module:Thing", "edgekit.sessions")
    monkeypatch.setattr(plugins, "_points", lambda group: {"x": point})
    with pytest.raises(EdgekitError, match=r"'no_such_package'.*pip install"):
        plugins.load("edgekit.sessions", "x")
    monkeypatch.setattr(plugins, "_points", lambda group: {})
    with pytest.raises(EdgekitError, match=r"not installed.*pip install"):
        plugins.load("edgekit.sessions", "x")
