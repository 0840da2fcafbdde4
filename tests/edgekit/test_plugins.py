"""Plug-ins are found by name, and the error for a missing package names it."""

import json
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace

import pytest

from edgekit import plugins
from edgekit.errors import EdgekitError


def test_a_plugin_that_breaks_its_contract_is_refused_in_one_line(monkeypatch):
    """The line names the plug-in, the distribution that it comes from, and what is missing."""
    point = EntryPoint("x", "json:loads", "edgekit.sessions")
    vars(point).update(dist=SimpleNamespace(name="their-package", version="1.2"))
    monkeypatch.setattr(plugins, "_points", lambda group: {"x": point})
    with pytest.raises(EdgekitError) as refused:
        plugins.load("edgekit.sessions", "x", lambda found, name: "it has no method 'run'")
    assert str(refused.value) == (
        "the runtime 'x' of their-package 1.2 cannot be used: it has no method 'run'; correct or uninstall that package"
    )
    assert plugins.load("edgekit.sessions", "x") is json.loads, "the twin: without the check it would be taken"


def test_a_plugin_that_is_not_there_is_named(monkeypatch):
    point = EntryPoint("x", "json:nothing", "edgekit.sessions")
    monkeypatch.setattr(plugins, "_points", lambda group: {"x": point})
    with pytest.raises(EdgekitError, match=r"'x' cannot be used: json:nothing cannot be loaded: AttributeError"):
        plugins.load("edgekit.sessions", "x")


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(EdgekitError, match=r"unknown pass 'clustr'.*quantize.*did you mean 'cluster'"):
        plugins.load("edgekit.passes", "clustr")


BROKEN_CODE = [("def (", "SyntaxError"), ("1 / 0", "ZeroDivisionError")]
NAMES_NOTHING = [("import json\njson.nothing", "AttributeError"), ("from json import nothing", "ImportError")]


@pytest.mark.parametrize(("code", "words"), [*BROKEN_CODE, *NAMES_NOTHING])
def test_a_plugin_whose_module_raises_is_refused_in_one_line(code, words, tmp_path, monkeypatch):
    (tmp_path / "their_broken_code.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("x", "their_broken_code:Thing", "edgekit.passes")
    monkeypatch.setattr(plugins, "_points", lambda group: {"x": point})
    with pytest.raises(EdgekitError) as refused:
        plugins.load("edgekit.passes", "x")
    start = f"the pass 'x' cannot be used: their_broken_code:Thing cannot be loaded: {words}: "
    assert str(refused.value).startswith(start)
    assert "\n" not in str(refused.value)


def test_an_error_of_edgekits_own_in_a_plugin_is_not_wrapped(tmp_path, monkeypatch):
    """A module may say at import which extra it needs."""
    code = "from edgekit.errors import missing_extra\nraise missing_extra('optuna', 'search', 'a search')"
    (tmp_path / "their_extra.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_points", lambda group: {"x": EntryPoint("x", "their_extra:Thing", group)})
    with pytest.raises(EdgekitError, match=r"^a search needs optuna, .*edgekit\[search\]'$"):
        plugins.load("edgekit.passes", "x")


@pytest.mark.parametrize(("code", "words"), BROKEN_CODE)
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
    vars(point).update(dist=SimpleNamespace(name="their-package", version="1.2"))
    with pytest.raises(EdgekitError, match=r"'no_such_package'.*run: pip install --force-reinstall their-package$"):
        plugins.load("edgekit.sessions", "x")
    monkeypatch.setattr(plugins, "_points", lambda group: {})
    with pytest.raises(EdgekitError, match=r"not installed.*pip install"):
        plugins.load("edgekit.sessions", "x")


def test_a_distribution_that_is_installed_later_is_found(tmp_path, monkeypatch):
    """Entry points are read once, until a folder of the path changes."""
    read = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: read.append(group) or entry_points(group=group))
    monkeypatch.syspath_prepend(tmp_path)
    assert "later" not in plugins.names("edgekit.sessions")
    assert len(read) == 1
    plugins.names("edgekit.sessions")
    assert len(read) == 1, "nothing has changed"
    installed = tmp_path / "later-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: later\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[edgekit.sessions]\nlater = json:loads\n")
    assert "later" in plugins.names("edgekit.sessions")
    monkeypatch.undo()
    assert "later" not in plugins.names("edgekit.sessions")
