"""edgekit data"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.console import note, output, print_json, print_table
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.data.provider import PreparedDataset

EXAMPLES = """\b
Examples:
  edgekit data
  edgekit data NAME
  edgekit data NAME --from FOLDER
Files go to $EDGEKIT_DATA, or to edgekit's folder in the user's data directory.
"""


@click.command(epilog=EXAMPLES)
@click.argument("name", required=False)
@click.option("--from", "source", type=Path, help="Raw data on disk, which edgekit reads instead of a download.")
@click.option("--force", is_flag=True, help="Prepare it again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def data(name: str | None, source: Path | None, force: bool, as_json: bool) -> None:
    """Prepare NAME, the data set on which a model is measured and trained; without NAME, list the data sets.

    edgekit downloads the raw data, or reads it from --from; the list says for each data set where it comes from and
    what --from accepts. The rows become the inputs of the model by the model's own preprocessing.
    """
    from edgekit.data import provider

    if name is None:
        _print_available(as_json)
        return
    dataset, its_provider = provider.find(name)
    state = dataset.state()
    if state == "prepared" and not force:
        note(f"{dataset.path} is prepared already; --force prepares it again")
    else:
        if state == "outdated" and not force:
            raise EdgekitError(
                f"{dataset.path} was prepared with another preprocessing than {dataset.model} has now; pass --force "
                "to prepare it again"
            )
        its_provider.prepare(dataset, source, note)
    _print_prepared(dataset, as_json)


def _print_available(as_json: bool) -> None:
    from edgekit.data import provider

    known = provider.available()
    if not known:
        raise provider.nothing_to_prepare()
    found = [
        {"name": item.name, "model": item.model, "state": item.state(), "path": str(item.path)}
        for item, _ in known.values()
    ]
    if as_json:
        print_json(found)
        return
    headers = {"name": "data set", "model": "made for", "state": "state"}
    print_table([*headers.values()], [[row[key] for key in headers] for row in found])
    for its_provider in provider.providers().values():
        output.print(f"\n{its_provider.description} --from accepts {its_provider.accepts}.")
    output.print(f"\nFolder: {Path(found[0]['path']).parent}. Prepare one with: edgekit data NAME")


def _print_prepared(dataset: PreparedDataset, as_json: bool) -> None:
    from edgekit.bundle.tensors import read_arrays
    from edgekit.data.provider import PREPROCESSING

    arrays = read_arrays(dataset.path)
    shapes = {key: list(value.shape) for key, value in arrays.items() if key != PREPROCESSING}
    test = int(arrays["split"].sum())
    train = len(arrays["split"]) - test
    if as_json:
        path = str(dataset.path)
        print_json({"name": dataset.name, "path": path, "train": train, "test": test, "arrays": shapes})
        return
    text = ", ".join(f"{key} {tuple(shape)}" for key, shape in shapes.items())
    output.print(f"{dataset.path}: {train:,} training and {test:,} test rows ({text})")
