"""The documentation: generated pages are whole, paths that documents name exist, examples work, notebooks run."""

import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
import yaml

from tests.conftest import ROOT

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/*.md")]
)
# a module of ours, or a name in one
NAME = re.compile(r"(?:edgekit|exporters|runtimes|alert_broker)(?:\.\w+){2,}")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
CODE = re.compile(r"`([^`\n]+)`")
# a path of the repository: it begins with one of our folders
PATH = re.compile(
    r"(?:edgekit|exporters|runtimes|alert_broker|models|tests|tools|docs|deploy|benchmarks)/[\w./*-]*"
    r"|(?:edgekit|alert_broker|exporters|runtimes)/"
)


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing_paths(text: str) -> list[str]:
    """Paths between backticks that do not exist. A word in capitals stands for any name."""
    found = []
    for code in CODE.findall(text):
        if PATH.fullmatch(code):
            pattern = re.sub(r"\b[A-Z]{3,}\b(?!\.)", "*", code).rstrip("/")
            if not list(ROOT.glob(pattern)):
                found.append(code)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_document_names_exists(path):
    assert missing_paths(path.read_text()) == []


def test_a_path_that_does_not_exist_is_found():
    assert missing_paths("see `edgekit/passes/no_such.py` and `tools/bench_*.py`") == ["edgekit/passes/no_such.py"]


def missing_names(text: str) -> list[str]:
    """Return the dotted names between backticks that cannot be imported."""
    found = []
    for code in CODE.findall(text):
        if NAME.fullmatch(code):
            try:
                pkgutil.resolve_name(code)
            except (ImportError, AttributeError):
                found.append(code)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_python_name_in_a_document_exists(path):
    assert missing_names(path.read_text()) == []


def test_a_python_name_that_does_not_exist_is_found():
    assert missing_names("`edgekit.bundle.family.tied`, `edgekit.bundle.family.no`") == ["edgekit.bundle.family.no"]


def dead_links(path: Path) -> list[str]:
    """Relative links of a document that lead nowhere; pages of the site that are generated count as there."""
    generated = ("reference/", "notebooks/", "benchmarks.md", "security.md")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text())]
    local = [link for link in links if link and not re.match(r"[a-z]+:", link)]
    dead = [link for link in local if not (path.parent / link).exists()]
    return [link for link in dead if "docs" not in path.parts or not link.removeprefix("../").startswith(generated)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_documents_lead_somewhere(path):
    assert dead_links(path) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.md").write_text("[here](b.md), [there](a.md), [web](https://example.org)")
    assert dead_links(tmp_path / "a.md") == ["b.md"]


def every_command():
    from edgekit.cli import edgekit

    def walk(command, path):
        yield path, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                yield from walk(command.get_command(context, name), f"{path} {name}")

    return list(walk(edgekit, "edgekit"))


def test_every_command_and_option_is_on_the_page_of_the_command_line(build):
    page = build.cli_page()
    headings = re.findall(r"^#+ (edgekit.*)$", page, re.M)
    assert headings == [path for path, _ in every_command()]
    sections = dict(zip(headings, re.split(r"^#+ edgekit.*$", page, flags=re.M)[1:], strict=True))
    for path, command in every_command():
        options = [name for item in command.params if isinstance(item, click.Option) for name in item.opts]
        assert options or isinstance(command, click.Group), path
        assert [name for name in options if name not in sections[path]] == []
        assert command.help.split("\n")[0][:40] in re.sub(r"\s+", " ", sections[path])


def test_every_target_is_in_the_table_with_its_figures(build):
    from edgekit.targets.profile import find, names

    rows = {row.split("|")[1].strip(): row for row in build.targets_page().splitlines() if row.startswith("| [")}
    assert list(rows) == [f"[{name}](#{name})" for name in names()]
    for name in names():
        target = find(name)
        assert f"| {target.memory.value / 1e9:g} |" in rows[f"[{name}](#{name})"]
        assert f"| {target.plan.order[0]} |" in rows[f"[{name}](#{name})"]


def test_navigation_names_pages_that_exist_or_are_generated(build):
    class Loader(yaml.SafeLoader):
        pass

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for item in (entry.values() if isinstance(entry, dict) else entry) for page in pages(item)]

    generated = {"reference/cli.md", "reference/targets.md", "reference/api.md", "benchmarks.md", "security.md"}
    generated |= {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
    named = set(pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert named == written | generated


def test_a_page_that_fetches_from_another_host_is_found(build, tmp_path):
    page = tmp_path / "a.html"
    page.write_text('<a href="https://example.org">a link is fine</a><script src="local.js"></script>')
    (tmp_path / "a.css").write_text("a { background: url(picture.png) }")
    assert list(build.foreign(tmp_path)) == []
    page.write_text('<script src="https://example.org/x.js"></script><img src="//example.org/x.png">')
    (tmp_path / "a.css").write_text("@import 'https://example.org/x.css'; a { background: url(http://example.org/p) }")
    assert len(list(build.foreign(tmp_path))) == 4


def code_block(path: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.S)[1]


def test_the_pass_of_the_documentation_works(tiny_bundle, tiny_data):
    from edgekit.passes.base import Candidate, Context

    space: dict = {"__name__": "example"}
    sys.modules["example"] = type(sys)("example")  # dataclasses look their module up
    try:
        exec(compile(code_block("docs/extend/pass.md", "python"), "pass.md", "exec"), space)
    finally:
        del sys.modules["example"]
    compression = space["RoundWeights"](step=0.25)
    candidate = Candidate("t2", tiny_bundle.manifest.arguments, tiny_bundle.model())
    before = {name: value.copy() for name, value in candidate.weights().items()}
    changed = {change.tensor for change in compression.plan(candidate)}
    after = compression.apply(candidate, Context(tiny_data[0], None, 0)).weights()
    assert changed
    for name, value in after.items():
        assert np.array_equal(candidate.weights()[name], before[name])
        assert np.allclose(value % 0.25, 0) if name in changed else np.array_equal(value, before[name])


def written_twice(text: str) -> list[str]:
    """Return the outputs that more than one example of a document writes: a reader who follows it would have to add
    --force."""
    names = re.findall(r"(?:-o |save\(\"|export\(bundle, \")([\w.-]+)", text)
    return sorted({name for name in names if names.count(name) > 1})


def test_no_two_examples_of_the_readme_write_the_same_output():
    assert written_twice((ROOT / "README.md").read_text()) == []


def test_an_output_that_is_written_twice_is_found():
    text = 'edgekit compress a -o small.edge\nedgekit pack a -o a.pack\nresult.save("small.edge")'
    assert written_twice(text) == ["small.edge"]


@pytest.mark.examples
def test_the_python_example_of_the_readme(tmp_path):
    text = (ROOT / "README.md").read_text().partition("## From Python\n")[2].partition("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = re.match(r"(\d+) bytes before, (\d+) after", done.stdout).groups()
    assert int(after) < 0.5 * int(before)
    assert (tmp_path / "linear-onnx" / "model.onnx").is_file()


def test_examples_of_docstrings_are_shown_as_code():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docs_doctests", ROOT / "docs" / "doctests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fenced("Text.\n\n>>> 1 + 1\n2\n\nMore.") == "Text.\n\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore."
    assert module.fenced("Text.\n    >>> 1").endswith("```pycon\n    >>> 1\n```")
    assert module.fenced("No example.\n\nMore.") == "No example.\n\nMore."


def test_the_page_of_the_api_has_every_public_name(build):
    import edgekit

    headings = re.findall(r"heading: edgekit\.([a-zA-Z_]+),", build.api_page())
    assert sorted(headings) == sorted(set(edgekit.__all__) - {"__version__"})


def test_the_page_of_the_api_has_the_language_models(build):
    import edgekit

    listed = dict(re.findall(r"::: (\S+)\n    options: \{heading_level: 3, heading: (\S+),", build.api_page()))
    assert listed["runtimes.llm.model.load"] == "edgekit.llm.load"
    assert pkgutil.resolve_name("runtimes.llm.model.load") is edgekit.llm.load
    assert {path.rpartition(".")[2] for path in listed} >= {"LanguageModel", "Sampling"}


def test_the_target_of_the_documentation_is_valid(tmp_path):
    from edgekit.errors import EdgekitError
    from edgekit.targets.profile import read

    text = code_block("docs/extend/target.md", "toml")
    (tmp_path / "my-card.toml").write_text(text)
    assert read(tmp_path / "my-card.toml").compute_capability == "8.6"
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "my-card.toml").write_text(text.replace("bandwidth", "bandwith"))
    with pytest.raises(EdgekitError, match="bandwith"):
        read(tmp_path / "wrong" / "my-card.toml")


@pytest.mark.examples
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_stored_without_outputs(build, path):
    pytest.importorskip("nbclient")
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs"), "store notebooks without outputs"
        assert cell.get("execution_count") is None
    cells = [cell for cell in build.run_notebook(path).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert pictures or "plt." not in path.read_text()


def test_a_notebook_with_an_error_fails(build, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        build.run_notebook(tmp_path / "bad.ipynb")


def test_minimum_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = [sys.executable, str(ROOT / "tools" / "minimum_versions.py"), "compress"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    wanted = [*project["dependencies"], *project["optional-dependencies"]["compress"]]
    assert lines == sorted(item.replace(">=", "==") for item in wanted)


def test_the_citation_names_the_version():
    import edgekit

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == edgekit.__version__
    released = re.search(rf"## \[{re.escape(edgekit.__version__)}\] - (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert citation["date-released"] == released[1]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_files_for_the_forge_are_yaml(path):
    content = yaml.safe_load(path.read_text())
    assert {"name", "body", "description"} <= content.keys() or {"name", "jobs"} <= content.keys()
