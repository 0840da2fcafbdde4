"""Generate pages of the site: the command line from `--help`, the targets from their profiles, the Python API from the
names that `edgekit` offers, and the notebooks by running them. Then check that the finished site needs no network.

mkdocs loads this file as a hook. Nothing that it writes is stored in git.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
CONTRACTS = (
    "edgekit.passes.base.Pass",
    "edgekit.passes.base.Candidate",
    "edgekit.passes.base.GraphCandidate",
    "edgekit.passes.base.Context",
    "edgekit.exporter.Exporter",
    "edgekit.session.Session",
)
LANGUAGE_MODELS = {
    "edgekit.llm.load": "runtimes.llm.model.load",
    "edgekit.llm.compress": "runtimes.llm.compression.job.compress",
    "runtimes.llm.compression.plan.Settings": "runtimes.llm.compression.plan.Settings",
    "runtimes.llm.compression.guard.Budget": "runtimes.llm.compression.guard.Budget",
    "LanguageModel": "runtimes.llm.model.LanguageModel",
    "runtimes.llm.sampling.Sampling": "runtimes.llm.sampling.Sampling",
}  # each heading, and the object below it
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")  # they change the colours of a terminal and move its cursor
WIDTH = 80  # characters of a line of help
# The attribute of each tag whose address a browser fetches for a page. A link that a person may click is not in it.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {
        "reference/cli.md": cli_page(),
        "reference/targets.md": targets_page(),
        "reference/api.md": api_page(),
        "benchmarks.md": repository_page("benchmarks/README.md"),
        "security.md": repository_page("SECURITY.md"),
    }
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = notebook_page(path)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_post_build(config: Any) -> None:
    """Fail if a built page fetches anything from another host."""
    if found := list(foreign(Path(config.site_dir))):
        raise SystemExit("the site must work without a network:\n" + "\n".join(found))


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Yield this command and every command below it, each with its words as a user types them."""
    context = click.Context(command, info_name=path, max_content_width=WIDTH, terminal_width=WIDTH)
    yield path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if (child := command.get_command(context, name)) is not None:
                yield from commands(child, f"{path} {name}")


def cli_page() -> str:
    """Return the page with the help of every command, as the command prints it."""
    from edgekit.cli import edgekit

    parts = ["# Command line", "", "This page is what `--help` prints for each command.", ""]
    for path, command, context in commands(edgekit, "edgekit"):
        level = "##" if path.count(" ") < 2 else "###"
        parts += [f"{level} {path}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    return "\n".join(parts)


def targets_page() -> str:
    """Return the page with one row for each profile, and the sources of its figures below."""
    from edgekit.targets.profile import find, names

    targets = [find(name) for name in names()]
    head = ("target", "memory", "bandwidth", "float32", "float16", "int8", "try first")
    parts = [
        "# Targets",
        "",
        f"edgekit knows {len(targets)} devices. Memory is in GB and bandwidth in GB/s. Rates are in 10^12 dense",
        "operations per second; the rate of a CPU is that of one core. `-` means that the device has no unit for that",
        "precision.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for item in targets:
        rates = [f"{item.rates[name].dense.value / 1e12:.4g}" if name in item.rates else "-" for name in head[3:6]]
        row = [
            f"[{item.name}](#{item.name})",
            f"{item.memory.value / 1e9:g}",
            f"{item.bandwidth.value / 1e9:g}",
            *rates,
            item.plan.order[0],
        ]
        parts.append("| " + " | ".join(row) + " |")
    for item in targets:
        precisions = f"Use {', '.join(item.plan.order)}." + f" Never use {', '.join(item.plan.never)}." * bool(
            item.plan.never
        )
        parts += ["", f"## {item.name}", "", f"{item.title}. {precisions} {item.plan.reason}", ""]
        parts += ["| figure | value | source |", "|---|---|---|"]
        parts.append(f"| memory | {item.memory.value / 1e9:g} GB | {item.memory.source} |")
        parts.append(f"| bandwidth | {item.bandwidth.value / 1e9:g} GB/s | {item.bandwidth.source} |")
        for name, rate in item.rates.items():
            parts.append(f"| {name} | {rate.dense.value / 1e12:.4g} x 10^12/s | {rate.dense.source} |")
        parts += ["", "Software, the recommended stack first: " + "; ".join(stack.name for stack in item.stacks) + "."]
        if item.never:
            parts += ["", "Software that does not work there, or works badly:", ""]
            parts += [f"- {rule.what}: {rule.why}" for rule in item.never]
    return "\n".join(parts) + "\n"


def api_page() -> str:
    """Return the page with the docstring of every name in `edgekit.__all__`, functions first, of the names for language
    models, and the contracts that a plug-in keeps."""
    import edgekit

    public = {name: getattr(edgekit, name) for name in edgekit.__all__ if not name.startswith("__")}
    order = sorted(public, key=lambda name: (isinstance(public[name], type), name))
    parts = [
        "# Python API",
        "",
        "`import edgekit` is quick: a name below loads torch or ONNX when it is first used.",
        "",
    ]
    for name in order:
        parts += _entry(f"{public[name].__module__}.{public[name].__qualname__}", f"edgekit.{name}")
    parts += ["", "## Language models", "", "These names need the extra `llm`.", ""]
    for heading, path in LANGUAGE_MODELS.items():
        parts += _entry(path, heading)
    parts += ["", "## Contracts for plug-ins", "", "The following types are what a plug-in provides or receives.", ""]
    for path in CONTRACTS:
        parts += _entry(path, path)
    return "\n".join(parts)


def _entry(path: str, heading: str) -> list[str]:
    """Return the lines that make mkdocstrings write one object."""
    label = heading.rpartition(".")[2]
    return [f"::: {path}", f"    options: {{heading_level: 3, heading: {heading}, toc_label: {label}}}", ""]


def repository_page(name: str) -> str:
    """Return a document that is outside docs/, with its links to other files of the repository as plain text."""
    text = (ROOT / name).read_text()
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"`\1`", text)


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown. This build runs it for its outputs, unless EDGEKIT_DOCS_EXECUTE is 0."""
    import nbformat

    if os.environ.get("EDGEKIT_DOCS_EXECUTE") == "0":
        notebook = nbformat.read(path, as_version=4)
    else:
        notebook = run_notebook(path)
    parts: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts += [cell.source, ""]
        elif cell.cell_type == "code":
            parts += ["```python", cell.source, "```", ""]
            for output in _joined(cell.outputs):
                parts += [*_rendered(output), ""]
    return "\n".join(parts)


def run_notebook(path: Path) -> Any:
    """Run the notebook in an empty folder and return it with its outputs. An error in a cell is raised."""
    import tempfile

    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=ERROR"],
        )
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cells run `edgekit`
        return client.execute(env={**os.environ, "PATH": path})


def _joined(outputs: list[Any]) -> Iterator[Any]:
    """Yield the outputs of a cell, and join the pieces of one stream."""
    for name, pieces in itertools.groupby(outputs, lambda item: item.get("name")):
        first, *others = pieces
        if name is None:
            yield from (first, *others)
        else:
            first.text += "".join(item.text for item in others)
            yield first


def _rendered(output: Any) -> list[str]:
    """Return an output of a cell as Markdown: a picture, or text."""
    if output.output_type == "stream":
        text = ESCAPES.sub("", output.text).rstrip()
        return [] if output.name == "stderr" else ["```text", text, "```"]
    if "image/png" in output.get("data", {}):
        picture = base64.b64encode(base64.b64decode(output.data["image/png"])).decode()
        return [f"![output of the cell above](data:image/png;base64,{picture})"]
    return ["```text", output.data["text/plain"].rstrip(), "```"]


class _Fetches(HTMLParser):
    """Collects what a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return  # these name pages, and the browser fetches none of them
        value = values.get(FETCHED.get(tag, ""))
        if value and re.match(r"(https?:)?//", value):
            self.found.append(value)


def foreign(site: Path) -> Iterator[str]:
    """Yield the addresses on other hosts that the pages and style sheets of a site fetch."""
    for path in sorted(site.rglob("*.html")):
        parser = _Fetches()
        parser.feed(path.read_text())
        yield from (f"{path.relative_to(site)}: {address}" for address in parser.found)
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", path.read_text()):
            yield f"{path.relative_to(site)}: {address}"
