"""Packages import only those before them; nothing imports in circles; models/ and tools/ are no packages."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("edgekit", "exporters", "runtimes", "alert_broker")  # each may import only those before it
EXCEPTION = ROOT / "edgekit" / "cli"  # looks down, but only inside its commands


def imports(tree: ast.AST, module: str, *, deferred: bool = True):
    """Full names of the modules that are imported; `deferred` counts those inside functions and TYPE_CHECKING too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif not deferred and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(node)):
            continue
        else:
            yield from imports(node, module, deferred=deferred)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path):
    for package in ORDER:
        yield from sorted((root / package).rglob("*.py"))


def upward(root: Path) -> list[str]:
    """Imports that go up, as 'file: module'."""
    found = []
    for path in sources(root):
        package = path.relative_to(root).parts[0]
        later = ORDER[ORDER.index(package) + 1 :]
        deferred = not path.is_relative_to(root / "edgekit" / "cli")
        names = imports(
            ast.parse(path.read_text()),
            module_name(path, root) + ("." if path.stem == "__init__" else ""),
            deferred=deferred,
        )
        found += [f"{path.relative_to(root)}: {name}" for name in names if name.split(".")[0] in later]
    return found


def circles(root: Path) -> list[str]:
    """Modules that import themselves through others when they are loaded."""
    modules = {module_name(path, root): path for path in sources(root)}
    graph = {
        name: {other for other in imports(ast.parse(path.read_text()), name, deferred=False) if other in modules}
        - {name}
        for name, path in modules.items()
    }
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    return sorted(name for name in graph if any(name in needs for needs in graph.values()))


def test_no_package_imports_one_above_it():
    assert upward(ROOT) == []


def test_no_circles():
    assert circles(ROOT) == []


@pytest.fixture
def tree(tmp_path):
    """tree(path, text): a small tree of the four packages with one file more."""
    for package in ORDER:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")

    def plant(path, text):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
        return tmp_path

    return plant


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("edgekit/x.py", "import exporters"),
        ("edgekit/x.py", "def f():\n    from runtimes.sessions import torch_session"),
        ("exporters/x.py", "if True:\n    import runtimes.sessions as s"),
        ("runtimes/x.py", "class A:\n    import alert_broker"),
        ("edgekit/cli/x.py", "from alert_broker.classify import run"),
    ],
)
def test_a_planted_upward_import_is_caught(path, text, tree):
    (found,) = {line.split(": ")[0] for line in upward(tree(path, text))}
    assert found == path


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("edgekit/cli/x.py", "def command():\n    from alert_broker.classify import run"),
        ("alert_broker/x.py", "import edgekit.bundle, exporters, runtimes"),
        ("edgekit/x.py", "import exporters_of_something_else"),
        ("exporters/x.py", "from . import base"),
    ],
)
def test_what_is_allowed_is_not_caught(path, text, tree):
    assert upward(tree(path, text)) == []


def test_a_planted_circle_is_caught(tree):
    tree("edgekit/a.py", "from edgekit import b")
    root = tree("edgekit/b.py", "import edgekit.a")
    assert circles(root) == ["edgekit.a", "edgekit.b"]
    tree("edgekit/b.py", "def f():\n    import edgekit.a")
    assert circles(root) == []


def test_models_and_tools_are_no_packages():
    for folder in ("models", "tools", "tests"):
        assert not list((ROOT / folder).rglob("__init__.py")), folder


def test_every_folder_with_code_is_a_package():
    for path in sources(ROOT):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} would not be in the wheel"


def test_siblings_carry_the_mark_that_the_guard_looks_for():
    import importlib

    from edgekit import __version__
    from edgekit._siblings import SIBLINGS

    assert ORDER[1:] == SIBLINGS
    for name in SIBLINGS:
        assert importlib.import_module(name).__edgekit__ == __version__
