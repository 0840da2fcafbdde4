"""edgekit search"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import console
from edgekit.cli.supervise import Terminated
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.nas.spec import Spec

EXAMPLE = """\b
Examples:
  edgekit search run study.toml -o study
  edgekit search run --preset turbovit-envelope -o envelope
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


@search.command(epilog=EXAMPLE)
@click.argument("spec", type=Path, required=False)
@click.option(
    "--preset", help="A packaged spec instead of a file: turbovit-envelope, turbovit-this-cpu or turbovit-TARGET."
)
@click.option("-o", "--output", "folder", type=Path, required=True, help="Folder of the study; it must not exist.")
@click.option("--processes", type=click.IntRange(1, 256), help="Networks judged at a time.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run(spec: Path | None, preset: str | None, folder: Path, processes: int | None, as_json: bool) -> None:
    """Run a study. Ctrl-C and SIGTERM lose the networks that are being judged and nothing else; `resume` goes on."""
    from edgekit.bundle.files import write_file
    from edgekit.nas.spec import preset_text, read_spec
    from edgekit.nas.study import SPEC

    if (spec is None) == (preset is None):
        raise click.UsageError("give a spec in TOML, or --preset")
    if folder.exists():
        raise EdgekitError(f"{folder} exists; continue it with: edgekit search resume {folder}, or name another folder")
    if spec is not None:
        read_spec(spec)  # raises before anything is written
        text = spec.read_bytes()
    else:
        assert preset is not None
        text = preset_text(preset).encode()
    write_file(folder / SPEC, text)
    _run(read_spec(folder / SPEC), folder, processes, as_json)


@search.command(epilog=EXAMPLE)
@click.argument("folder", type=Path)
@click.option("--processes", type=click.IntRange(1, 256), help="Networks judged at a time.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def resume(folder: Path, processes: int | None, as_json: bool) -> None:
    """Continue a study; the result is that of an undisturbed run, to the bit."""
    _run(_spec(folder), folder, processes, as_json)


@search.command(epilog=EXAMPLE)
@click.argument("folder", type=Path)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(folder: Path, as_json: bool) -> None:
    """Show what a study has found so far."""
    from edgekit.nas.result import summary
    from edgekit.nas.study import Study

    with closing(Study(_spec(folder), folder, _silent)) as study:
        _show(summary(study), folder, as_json)


@search.command(epilog=EXAMPLE)
@click.argument("folder", type=Path)
@click.argument("key")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(folder: Path, key: str, as_json: bool) -> None:
    """Show a network of a study: its parts, stage by stage, and where its operations and time go."""
    from edgekit.nas.explain import explained
    from edgekit.nas.study import Study

    with closing(Study(_spec(folder), folder, _silent)) as study:
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


def _silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


def _spec(folder: Path) -> Spec:
    from edgekit.nas.spec import read_spec
    from edgekit.nas.study import SPEC

    if not (folder / SPEC).is_file():
        raise EdgekitError(
            f"{folder} holds no study (no {SPEC}); begin one with: edgekit search run SPEC.toml -o {folder}"
        )
    return read_spec(folder / SPEC)


def _run(spec: Spec, folder: Path, processes: int | None, as_json: bool) -> None:
    from edgekit.nas.finish import finish
    from edgekit.nas.study import Study

    with console.steps() as show:
        try:
            with closing(Study(spec, folder, show)) as study:
                study.run(processes or len(os.sched_getaffinity(0)))
                values = finish(study, show)
        except (KeyboardInterrupt, Terminated):
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
    for key, taken in measured.items():
        for text in taken["breaks"]:
            console.output.print(f"{key} breaks a limit: {text}")
    if measured:
        console.output.print(f"networks are in {folder / NETWORKS}, the report is {folder / NAME}")
