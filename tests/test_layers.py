"""The layout is the import tree: packages import only those before them, nothing imports in circles, few rooms.

An import counts wherever it stands: at the top of a module, in a function, or for type checkers only. A plug-in that
code loads by a literal name counts as an import of the module behind that entry point. Run as a script,
`python tests/test_layers.py [ROOT]` prints the counts of a tree.
"""

import ast
import functools
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("edgekit", "exporters", "runtimes", "alert_broker")  # each may import only those before it
MOST_ROOMS = 21  # folders and files at the top of edgekit/
# the argument by which a function names a plug-in, and the group that it is looked up in; None: the first argument
LOADERS = {"load": (1, None), "open_session": (1, "edgekit.sessions")}

Graph = dict[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> Iterator[Path]:
    for package in ORDER:
        yield from sorted((root / package).rglob("*.py"))


def entry_points(root: Path) -> dict[tuple[str, str], str]:
    """(group, name) to the module that the entry point names."""
    project = root / "pyproject.toml"
    groups = tomllib.loads(project.read_text())["project"].get("entry-points", {}) if project.is_file() else {}
    return {(group, name): value.split(":")[0] for group, names in groups.items() for name, value in names.items()}


@functools.cache
def _written(text: str, module: str, is_package: bool) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """Return the full names of what a module imports, and the (group, name) of the plug-ins that it loads."""
    names, loaded = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = node.level - is_package
            parts = module.split(".")
            base = ".".join(parts[: len(parts) - above]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and (name := _called(node)) in LOADERS:
            position, group = LOADERS[name]
            texts = [item.value if isinstance(item, ast.Constant) else None for item in node.args]
            loaded.add((group or (texts[0] if texts else None), texts[position] if len(texts) > position else None))
    return frozenset(names), frozenset(loaded)


def imports(path: Path, root: Path, points: dict[tuple[str, str], str]) -> tuple[set[str], set[str]]:
    """Return the full names of the modules that this file imports, and of those that it loads by a plug-in's name."""
    names, loaded = _written(path.read_text(), module_name(path, root), path.stem == "__init__")
    return set(names), {points[key] for key in loaded if key in points}


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def module_graph(root: Path) -> Graph:
    """Return for each of our modules those that it imports."""
    points = entry_points(root)
    modules = {module_name(path, root): path for path in sources(root)}
    graph: Graph = {}
    for name, path in modules.items():
        graph[name] = set.union(*imports(path, root, points)) & set(modules) - {name}
        if path.stem != "__init__":  # `from package import module` names the package too, which imports nothing by it
            graph[name] -= {other for other in graph[name] if name.startswith(f"{other}.")}
    return graph


def upward(root: Path) -> list[str]:
    """Return the imports of a package by an earlier one, as 'module -> module'."""
    found = []
    points = entry_points(root)
    for path in sources(root):
        name = module_name(path, root)
        later = ORDER[ORDER.index(name.split(".")[0]) + 1 :]
        imported, loaded = imports(path, root, points)
        # a session that runs graphs is part of the core's contract: it is asked for by name, through `open_session`
        names = imported | {other for other in loaded if "sessions" not in other}
        found += [f"{name} -> {other}" for other in names if other.split(".")[0] in later]
    return sorted(set(found))


def cycles(graph: Graph) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


def rooms(root: Path) -> list[str]:
    """Return the folders of code at the top of edgekit/, and the files beside these folders."""
    top = root / "edgekit"
    folders = {path.relative_to(top).parts[0] for path in top.rglob("*.py") if len(path.relative_to(top).parts) > 1}
    return sorted(folders | {path.stem for path in top.glob("*.py")} - {"__init__"})


def room_graph(graph: Graph) -> Graph:
    """Return for each room of edgekit/ the rooms that it imports."""
    between: Graph = defaultdict(set)
    for name, others in graph.items():
        for other in others:
            here, there = (item.split(".")[1:2] for item in (name, other))
            if name.startswith("edgekit.") and other.startswith("edgekit.") and here != there:
                between[here[0]].add(there[0])
    return dict(between)


def counts(root: Path) -> dict[str, int]:
    graph = module_graph(root)
    between = room_graph(graph)
    return {
        "rooms of edgekit/": len(rooms(root)),
        "arrows between rooms": sum(len(others) for others in between.values()),
        "rooms in cycles": sum(len(component) for component in cycles(between)),
        "modules": len(graph),
        "arrows between modules": sum(len(others) for others in graph.values()),
        "modules in cycles": sum(len(component) for component in cycles(graph)),
        "upward imports": len(upward(root)),
    }


def test_no_package_imports_one_after_it():
    assert upward(ROOT) == []


def test_no_module_imports_itself_through_others():
    assert cycles(module_graph(ROOT)) == []


def test_no_room_imports_itself_through_others():
    """Without cycles, a reader can read the rooms one after the other, from the bundle up to the commands."""
    assert cycles(room_graph(module_graph(ROOT))) == []


def test_edgekit_has_few_rooms():
    assert len(rooms(ROOT)) <= MOST_ROOMS, rooms(ROOT)


@pytest.fixture
def tree(tmp_path):
    """Return tree(path, text), which makes a small tree of the four packages with one more file."""
    for package in ORDER:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "pyproject.toml").write_text(
        '[project.entry-points."edgekit.exporters"]\nonnx = "exporters.onnx:Exporter"\n'
        '[project.entry-points."edgekit.passes"]\nb = "edgekit.b:B"\n'
        '[project.entry-points."edgekit.sessions"]\nort = "runtimes.sessions.ort:Session"\n'
    )

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
        ("edgekit/cli/x.py", "def command():\n    from alert_broker.classify import run"),
        ("edgekit/x.py", "if TYPE_CHECKING:\n    import exporters.onnx"),
        ("edgekit/x.py", "plugins.load('edgekit.exporters', 'onnx')().graph(bundle)"),
    ],
)
def test_a_planted_upward_import_is_caught(path, text, tree):
    (found,) = {line.split(" -> ")[0] for line in upward(tree(path, text))}
    assert found == path.removesuffix(".py").replace("/", ".")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("alert_broker/x.py", "import edgekit.bundle, exporters, runtimes"),
        ("edgekit/x.py", "import exporters_of_something_else"),
        ("edgekit/x.py", "load('edgekit.exporters', name)"),
        ("edgekit/x.py", "open_session(bundle, 'ort')"),
        ("exporters/x.py", "from . import base"),
    ],
)
def test_what_is_allowed_is_not_caught(path, text, tree):
    assert upward(tree(path, text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import edgekit.a",
        "def f():\n    import edgekit.a",
        "if TYPE_CHECKING:\n    from edgekit.a import A",
        "from edgekit import a",
        "from . import a",
        "from .a import A",
    ],
)
def test_a_planted_cycle_is_caught(text, tree):
    tree("edgekit/a.py", "from edgekit import b")
    assert cycles(module_graph(tree("edgekit/b.py", text))) == [["edgekit.a", "edgekit.b"]]


def test_a_planted_cycle_through_a_plugins_name_is_caught(tree):
    tree("edgekit/a.py", "load('edgekit.passes', 'b')")
    assert cycles(module_graph(tree("edgekit/b.py", "import edgekit.a"))) == [["edgekit.a", "edgekit.b"]]
    assert cycles(module_graph(tree("edgekit/a.py", "load('edgekit.passes', name)"))) == []


def test_a_planted_cycle_of_rooms_without_one_of_modules_is_caught(tree):
    tree("edgekit/one/a.py", "")
    tree("edgekit/one/b.py", "import edgekit.two.c")
    root = tree("edgekit/two/c.py", "def f():\n    import edgekit.one.a")
    assert cycles(module_graph(root)) == []
    assert cycles(room_graph(module_graph(root))) == [["one", "two"]]


def test_a_planted_room_too_many_is_caught(tree):
    for number in range(MOST_ROOMS):
        root = tree(f"edgekit/room{number}.py", "")
    assert len(rooms(root)) == MOST_ROOMS
    assert len(rooms(tree("edgekit/folder/x.py", ""))) == MOST_ROOMS + 1


def test_models_and_tools_are_no_packages():
    for folder in ("models", "tools", "tests"):
        found = [path for path in (ROOT / folder).rglob("__init__.py") if "plugin" not in path.parts]
        assert found == [], folder


def test_every_folder_with_code_is_a_package():
    for path in sources(ROOT):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} would not be in the wheel"


def test_siblings_carry_the_mark_that_the_guard_looks_for():
    import importlib

    from edgekit import __version__
    from edgekit.plugins import SIBLINGS

    assert ORDER[1:] == SIBLINGS
    for name in SIBLINGS:
        assert importlib.import_module(name).__edgekit__ == __version__


def test_no_name_is_private_and_read_elsewhere():
    """`from module import _name` across modules makes a private name part of an undocumented contract."""
    found = []
    for path in sources(ROOT):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ORDER:
                found += [f"{path.relative_to(ROOT)}: {a.name}" for a in node.names if re.match(r"_[a-z]", a.name)]
    assert found == []


if __name__ == "__main__":
    for what, number in counts(Path(sys.argv[1]) if sys.argv[1:] else ROOT).items():
        print(f"{number:6,}  {what}")
