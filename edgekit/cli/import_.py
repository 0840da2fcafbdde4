"""edgekit import"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.console import output, print_json

if TYPE_CHECKING:
    from edgekit.bundle.format import Bundle
    from edgekit.bundle.tensors import TensorSpec

EXAMPLE = """\b
Examples:
  edgekit import model.onnx -o model.edge
  edgekit import silero_vad.onnx --state state=stateN -o silero.edge
  edgekit import silero_vad.onnx --fix sr=16000 --fix 'input[1]=576' --state state=stateN -o silero16k.edge
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
@click.option(
    "--fix", multiple=True, help="NAME=NUMBER of an input or axis of an ONNX file that is constant; repeat for more."
)
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
    fix: tuple[str, ...],
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
    pairs = {name: given for name, _, given in (pair.partition("=") for pair in state)}
    bundle = api.import_any(
        source,
        via=via,
        inputs=inputs,
        outputs=[name.strip() for name in outputs.split(",") if name.strip()] or ["output"],
        arguments=_json(arguments, "--arguments"),
        weights=weights,
        golden=read_arrays(data) if data else None,
        state=pairs,
        fix=_fixed(fix),
    )
    bundle = api.described(
        bundle,
        name=default_name(path),
        classes=[name.strip() for name in classes.split(",") if name.strip()],
        preprocessing=_json(preprocessing, "--preprocessing") if preprocessing else None,
        state=_checked(pairs, bundle),
        versions=versions(),
    )
    written = write_bundle(bundle, path, force=force)
    if as_json:
        print_json({"bundle": str(path), "digest": written.digest, "parameters": written.parameters})
        return
    manifest = written.manifest
    shapes = ", ".join(_shape(spec) for spec in (*manifest.inputs, *manifest.outputs))
    calls = (
        f"; {manifest.rows_per_call} row{'s' * (manifest.rows_per_call > 1)} a call" if manifest.rows_per_call else ""
    )
    output.print(f"{path}: {manifest.family}, {written.parameters:,} parameters; {shapes}{calls}")


def _shape(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.shape_text}" + (f", of its own {spec.axes_text}" if spec.axes is not None else "")


def _fixed(texts: tuple[str, ...]) -> dict[str, float]:
    if not texts:
        return {}
    from edgekit.graph.fix import parse

    return parse(texts)


def _checked(state: dict[str, str], bundle: Bundle) -> dict[str, str]:
    from edgekit.errors import EdgekitError
    from edgekit.importers.api import check_state

    try:
        check_state(bundle.manifest, state)
    except EdgekitError as error:
        raise click.UsageError(f"--state: {error}") from None
    return state


def _json(text: str, option: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{option} {text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"{option} {text!r}: expected a JSON object")
    return value
