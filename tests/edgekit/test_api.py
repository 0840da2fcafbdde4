"""The Python API: what `import edgekit` offers, that it is cheap to import, and that its examples are true."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import edgekit as api

SOURCE = Path(api.__file__)


def test_importing_edgekit_imports_neither_torch_nor_numpy():
    probe = "import sys, edgekit; dir(edgekit); print(sorted({'torch', 'numpy', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    planted = probe.replace("dir(edgekit)", "edgekit.Bundle")
    assert "numpy" in subprocess.run([sys.executable, "-c", planted], capture_output=True, text=True, check=True).stdout


def test_every_name_is_found_and_listed():
    for name in api.__all__:
        assert getattr(api, name) is not None
        assert name in dir(api)
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        api.compres  # noqa: B018


def test_what_type_checkers_see_is_what_python_finds():
    (block,) = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If)]
    seen = {}
    for statement in block.body:
        for alias in statement.names:
            seen[alias.asname or alias.name] = getattr(importlib.import_module(statement.module), alias.name)
    assert set(seen) | {"__version__"} == set(api.__all__)
    for name, thing in seen.items():
        assert getattr(api, name) is thing, name


@pytest.mark.parametrize("module", sorted(api._MODULES))
def test_the_examples_of_the_docstrings_are_true(module, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_every_verb_has_an_example_or_says_what_its_sibling_shows():
    for name in (
        "open",
        "compress",
        "export",
        "bench",
        "bench_target",
        "list_targets",
        "import_module",
        "Session",
        "search_network",
    ):
        assert ">>>" in getattr(api, name).__doc__, name


def test_a_planted_wrong_example_fails():
    parsed = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "planted", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(parsed, out=lambda text: None).failed == 1
