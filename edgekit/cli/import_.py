"""edgekit import"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.console import output, print_json

if TYPE_CHECKING:
    from edgekit.bundle.format import Bundle

EXAMPLE = """\b
Examples:
  edgekit import model.onnx -o model.edge
  edgekit import program.pt2 -o program.edge --data samples.npz
  edgekit import deit-tiny/ -o deit.edge        # a folder of transformers
  edgekit import deit-tiny/ --via optimum -o deit.edge        # if transformers' own network cannot be traced
  edgekit import my_models.vit:build --weights vit.safetensors \\
      --arguments '{"depth": 6}' --input image:float32:batch,3,224,224 -o vit.edge
An axis is a length, a name for any length, or a multiple such as 9*faces.
"""


@click.command("import", epilog=EXAMPLE)
@click.argument("source")
@click.option("-o", "--output", "path", type=Path, required=True, help="Bundle to write, such as model.edge.")
@click.option("--via", help="optimum: make a graph of a Hugging Face folder with optimum's ONNX exporter.")
@click.option("--weights", type=Path, help="safetensors for a Python function's network.")
@click.option("--arguments", default="{}", help="JSON: keyword arguments of that function.")
@click.option("--input", "inputs", multiple=True, help="NAME:DTYPE:AXES of an input of that network; repeat for more.")
@click.option("--outputs", default="", help="Names of its outputs; edgekit applies softmax to one named probabilities.")
@click.option("--classes", default="", help="Names of the classes, separated by commas.")
@click.option("--preprocessing", default="", help='JSON, such as {"id": "image/1", "mean": [0.5], "std": [0.5]}.')
@click.option("--state", multiple=True, help="INPUT=OUTPUT that a caller hands back in the next call; repeat for more.")
@click.option("--data", type=Path, help=".npz whose first rows become the golden inputs.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def import_(
    source: str,
    path: Path,
    via: str | None,
    weights: Path | None,
    arguments: str,
    inputs: tuple[str, ...],
    outputs: str,
    classes: str,
    preprocessing: str,
    state: tuple[str, ...],
    data: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make a bundle from SOURCE: an .onnx or .pt2 file, a Hugging Face folder, or a Python function
    package.module:function that builds a torch network. Naming the function allows it to be run."""
    from edgekit.bundle.store import default_name, refuse_to_replace, write_bundle
    from edgekit.bundle.tensors import read_arrays
    from edgekit.compression.job import versions
    from edgekit.importers import api

    refuse_to_replace(path, force)
    if via is not None and (via != "optimum" or not Path(source).is_dir()):
        raise click.UsageError(
            f"--via {via}: expected optimum, and a Hugging Face folder; {source} is "
            f"{'a' if Path(source).is_dir() else 'no'} folder"
        )
    bundle = api.import_any(
        source,
        via=via,
        inputs=inputs,
        outputs=[name.strip() for name in outputs.split(",") if name.strip()] or ["output"],
        arguments=_json(arguments, "--arguments"),
        weights=weights,
        golden=read_arrays(data) if data else None,
    )
    bundle = api.described(
        bundle,
        name=default_name(path),
        classes=[name.strip() for name in classes.split(",") if name.strip()],
        preprocessing=_json(preprocessing, "--preprocessing") if preprocessing else None,
        state=_state(state, bundle),
        versions=versions(),
    )
    written = write_bundle(bundle, path, force=force)
    if as_json:
        print_json({"bundle": str(path), "digest": written.digest, "parameters": written.parameters})
        return
    manifest = written.manifest
    shapes = ", ".join(f"{spec.name} {spec.shape_text}" for spec in (*manifest.inputs, *manifest.outputs))
    output.print(f"{path}: {manifest.family}, {written.parameters:,} parameters; {shapes}")


def _state(pairs: tuple[str, ...], bundle: Bundle) -> dict[str, str]:
    """Return the pairs INPUT=OUTPUT by input."""
    split = {name: source for name, _, source in (pair.partition("=") for pair in pairs)}
    from edgekit.errors import EdgekitError
    from edgekit.importers.api import check_state

    try:
        check_state(bundle.manifest, split)
    except EdgekitError as error:
        raise click.UsageError(f"--state: {error}") from None
    return split


def _json(text: str, option: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{option} {text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"{option} {text!r}: expected a JSON object")
    return value
