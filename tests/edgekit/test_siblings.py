"""A foreign package named `exporters`, `runtimes` or `alert_broker` is refused, with its path."""

import sys
from types import ModuleType

import pytest

from edgekit.errors import EdgekitError
from edgekit.plugins import SIBLINGS, refuse_strangers


def test_our_own_are_accepted():
    refuse_strangers()


@pytest.mark.parametrize("name", SIBLINGS)
@pytest.mark.parametrize("marker", [None, "0.0.1"])
def test_a_stranger_is_refused(name, marker, monkeypatch):
    stranger = ModuleType(name)
    stranger.__path__ = ["/somewhere/else"]
    if marker:
        stranger.__edgekit__ = marker
    monkeypatch.setitem(sys.modules, name, stranger)
    with pytest.raises(EdgekitError, match=f"'{name}' found at /somewhere/else.*new virtual environment"):
        refuse_strangers()


def test_a_folder_in_the_way_is_refused(tmp_path, monkeypatch):
    """`python -m` and notebooks may find a package of that name in the current directory."""
    (tmp_path / "exporters").mkdir()
    (tmp_path / "exporters" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name == "exporters" or name.startswith("exporters.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(EdgekitError, match=str(tmp_path / "exporters")):
        refuse_strangers()


def test_a_missing_one_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "runtimes", None)
    with pytest.raises(EdgekitError, match=r"'runtimes' is missing.*reinstall"):
        refuse_strangers()
