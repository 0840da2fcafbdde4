"""edgekit search"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import click

from edgekit.cli import console
from edgekit.cli.supervise import Terminated

EXAMPLE = """\b
Examples:
  edgekit search run study.toml -o study
  edgekit search run --preset turbovit-envelope -o envelope
  edgekit search run study.toml --then-compress recipe.toml -o study
  edgekit search resume study
  edgekit search report study --json
  edgekit search explain study 1f0c9e0b2d3a4c5e
A study is TOML: [space] name = "hybrid2d", [limits] macs = 2e8, [search] candidates = 48, [score] data = "images.npz"
"""


@click.group(epilog=EXAMPLE)
def search() -> None:
    """Search for network architectures that keep limits of size, operations or time, and know the noise of the search.

    For recipes that make a given model smaller, see `edgekit compress --auto`.
    """


THEN_COMPRESS = click.option(
    "--then-compress",
    metavar="RECIPE|auto",
    help="Compress the finalists with a recipe, or search for one (auto): the [compress] table of the spec.",
)


@search.command(epilog=EXAMPLE)
@click.argument("spec", type=Path, required=False)
@click.option(
    "--preset", help="A packaged spec instead of a file: turbovit-envelope, turbovit-this-cpu or turbovit-TARGET."
)
@click.option("-o", "--output", "folder", type=Path, required=True, help="Folder of the study; it must not exist.")
@THEN_COMPRESS
@click.option("--processes", type=click.IntRange(1, 256), help="Networks judged at a time.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run(
    spec: Path | None,
    preset: str | None,
    folder: Path,
    then_compress: str | None,
    processes: int | None,
    as_json: bool,
) -> None:
    """Run a study. Ctrl-C and SIGTERM lose the networks that are being judged and nothing else; `resume` goes on."""
    if (given := preset or spec) is None or (spec and preset):
        raise click.UsageError("give a spec in TOML, or --preset")
    _run(folder, given, then_compress, processes, as_json)


@search.command(epilog=EXAMPLE)
@click.argument("folder", type=Path)
@THEN_COMPRESS
@click.option("--processes", type=click.IntRange(1, 256), help="Networks judged at a time.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def resume(folder: Path, then_compress: str | None, processes: int | None, as_json: bool) -> None:
    """Continue a study; the result is that of an undisturbed run, to the bit."""
    _run(folder, None, then_compress, processes, as_json)


@search.command(epilog=EXAMPLE)
@click.argument("folder", type=Path)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(folder: Path, as_json: bool) -> None:
    """Show what a study has found so far."""
    from edgekit.nas.api import report_of

    _show(report_of(folder), folder, as_json)


@search.command(epilog=EXAMPLE)
@click.argument("folder", type=Path)
@click.argument("key")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(folder: Path, key: str, as_json: bool) -> None:
    """Show a network of a study: its parts, stage by stage, and where its operations and time go."""
    from edgekit.nas.api import spec_in
    from edgekit.nas.explain import explained
    from edgekit.nas.study import Study

    with closing(Study(spec_in(folder), folder)) as study:
        values = explained(study, key)
    if as_json:
        console.print_json(values)
        return
    console.output.print(f"{values['key']}: {values['text']}")
    rows = []
    for row in values["parts"]:
        time = f"{row['milliseconds']:.3f}" if "milliseconds" in row else ""
        rows.append([row["part"], f"{row['parameters']:,}", f"{row['macs']:,}", time])
    console.print_table(["operator", "parameters", "MACs", "predicted ms"], rows)
    choices = [
        [row["factor"], row["value"], f"{row['mean']:.4g}", row["best"], f"{row['best_mean']:.4g}"]
        for row in values["choices"]
    ]
    console.print_table(["factor", "here", "mean score", "best tried", "mean score"], choices)


def _run(
    folder: Path, spec: str | Path | None, then_compress: str | None, processes: int | None, as_json: bool
) -> None:
    from edgekit.nas.api import search_network
    from edgekit.nas.study import SPEC

    with console.steps() as show:
        try:
            values = search_network(spec, folder, then_compress=then_compress, processes=processes, progress=show)
        except (KeyboardInterrupt, Terminated):
            if (folder / SPEC).is_file():
                console.note(f"nothing is lost; continue with: edgekit search resume {folder}")
            raise
    _show(values, folder, as_json)


def _show(values: dict[str, Any], folder: Path, as_json: bool) -> None:
    from edgekit.nas.finish import NETWORKS
    from edgekit.nas.report import NAME

    if as_json:
        console.print_json(values)
        return
    console.output.print(f"study {values['study']}; the score is {values['score']}")
    measured = values.get("measured", {})
    rows = []
    for row in values["finalists"]:
        taken = measured.get(row["key"])
        rows.append(
            [
                row["key"][:8], row["arm"], f"{row['mean']:.4g}", f"{row['parameters']:,.0f}", f"{row['macs']:,.0f}",
                f"{taken['milliseconds']:.3g}" if taken else "", row["against_best"],
            ]
        )  # fmt: skip
    headers = ["network", "found by", "score", "parameters", "MACs", "ms", "against the first"]
    console.print_table(headers, rows)
    if (noise := values["noise"]) is not None:
        console.output.print(
            f"seeds change a score by {noise['spread']:.3g}; differences below {noise['distinguishable']:.3g} are not "
            "told apart"
        )
    if values["against_random"]:
        console.output.print(f"the best network against the best of the random control: {values['against_random']}")
    if values["supernet"]:
        console.output.print(values["supernet"]["text"])
    for key, taken in measured.items():
        for text in taken["breaks"]:
            console.output.print(f"{key} breaks a limit: {text}")
    if compressed := values.get("compressed"):
        _show_compressed(compressed)
    if measured:
        console.output.print(f"networks are in {folder / NETWORKS}, the report is {folder / NAME}")


def _show_compressed(compressed: dict[str, Any]) -> None:
    rows = []
    for key, row in compressed.items():
        pairs = [row["bytes"], row["milliseconds"], row["accuracy"]]
        texts = [
            f"{before:{form}} to {after:{form}}"
            for (before, after), form in zip(pairs, (",", ".3g", ".4g"), strict=True)
        ]
        kept = ", ".join(item["pass"] for item in row["passes"] if item["kept"]) or "none"
        rows.append([key[:8], *texts, kept])
    console.print_table(["compressed", "packed bytes", "ms", "accuracy", "passes kept"], rows)
