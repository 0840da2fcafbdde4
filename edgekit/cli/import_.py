"""edgekit import"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.cli.console import output, print_json

EXAMPLE = """\b
Examples:
  edgekit import model.onnx -o model.edge
  edgekit import program.pt2 -o program.edge --data samples.npz
  edgekit import deit-tiny/ -o deit.edge        # a folder of transformers
  edgekit import deit-tiny/ --via optimum -o deit.edge        # where transformers' own network cannot be traced
  edgekit import my_models.vit:build --weights vit.safetensors \\
      --arguments '{"depth": 6}' --input image:float32:batch,3,224,224 -o vit.edge
An axis is a length, a name for any length, or a multiple such as 9*faces.
"""


@click.command("import", epilog=EXAMPLE)
@click.argument("source")
@click.option("-o", "--output", "target", type=Path, required=True, help="Bundle to write, such as model.edge.")
@click.option("--via", help="optimum: a Hugging Face folder becomes a graph by optimum's ONNX exporter.")
@click.option("--weights", type=Path, help="safetensors for a Python function's network.")
@click.option("--arguments", default="{}", help="JSON: keyword arguments of that function.")
@click.option("--input", "inputs", multiple=True, help="NAME:DTYPE:AXES of an input of that network; repeat for more.")
@click.option("--outputs", default="", help="Names of its outputs; one named probabilities is softmaxed.")
@click.option("--classes", default="", help="Names of the classes, separated by commas.")
@click.option("--preprocessing", default="", help='JSON, such as {"id": "image/1", "mean": [0.5], "std": [0.5]}.')
@click.option("--state", multiple=True, help="INPUT=OUTPUT that a caller hands back in the next call; repeat for more.")
@click.option("--data", "data_file", type=Path, help=".npz whose first rows become the golden inputs.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def import_(
    source: str,
    target: Path,
    via: str | None,
    weights: Path | None,
    arguments: str,
    inputs: tuple[str, ...],
    outputs: str,
    classes: str,
    preprocessing: str,
    state: tuple[str, ...],
    data_file: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make a bundle from SOURCE: an .onnx or .pt2 file, a Hugging Face folder, or a Python function
    package.module:function that builds a torch network. Naming the function allows it to be run."""
    from dataclasses import replace

    from edgekit.bundle.store import default_name, write_bundle
    from edgekit.bundle.tensors import arrays_from_bytes, parse_spec
    from edgekit.compression.job import versions
    from edgekit.errors import EdgekitError
    from edgekit.importers.factory import from_factory
    from edgekit.importers.files import from_file
    from edgekit.importers.hugging_face import from_hugging_face

    if target.exists() and not force:
        raise EdgekitError(f"{target} already exists; choose another name or pass --force to replace it")
    if via is not None and (via != "optimum" or not Path(source).is_dir()):
        raise click.UsageError(
            f"--via {via}: expected optimum, and a Hugging Face folder; {source} is "
            f"{'a' if Path(source).is_dir() else 'no'} folder"
        )
    golden = arrays_from_bytes(data_file.read_bytes(), str(data_file)) if data_file else None
    if via is not None:
        from edgekit.importers.optimum import from_optimum

        bundle = from_optimum(Path(source), golden=golden)
    elif ":" in source and not Path(source).exists():
        bundle = from_factory(
            source,
            arguments=_json(arguments, "--arguments"),
            weights=weights,
            inputs=[parse_spec(t) for t in inputs],
            outputs=[name for name in outputs.split(",") if name],
            golden=golden,
        )
    else:
        path = Path(source)
        specs = [parse_spec(text) for text in inputs]
        bundle = (
            from_hugging_face(path, inputs=specs, golden=golden) if path.is_dir() else from_file(path, golden=golden)
        )
    manifest = replace(
        bundle.manifest,
        state=_state(state, bundle.manifest),
        name=default_name(target),
        classes=tuple(name.strip() for name in classes.split(",") if name.strip()) or bundle.manifest.classes,
        preprocessing=_json(preprocessing, "--preprocessing") if preprocessing else bundle.manifest.preprocessing,
        versions=versions(),
    )
    written = write_bundle(replace(bundle, manifest=manifest), target, force=force)
    if as_json:
        print_json({"bundle": str(target), "digest": written.digest, "parameters": written.parameters})
        return
    described = ", ".join(f"{spec.name} {spec.shape_text}" for spec in (*manifest.inputs, *manifest.outputs))
    output.print(f"{target}: {manifest.family}, {written.parameters:,} parameters; {described}")


def _state(pairs: tuple[str, ...], manifest: Any) -> dict[str, str]:
    """Which output feeds which input; their shapes must be the same."""
    inputs, outputs = ({spec.name: spec for spec in specs} for specs in (manifest.inputs, manifest.outputs))
    found = {}
    for pair in pairs:
        name, _, source = pair.partition("=")
        if name not in inputs or source not in outputs:
            raise click.UsageError(
                f"--state {pair!r}: expected INPUT=OUTPUT, of {', '.join(inputs)} and {', '.join(outputs)}"
            )
        if inputs[name].shape != outputs[source].shape or inputs[name].dtype != outputs[source].dtype:
            raise click.UsageError(
                f"--state {pair!r}: {inputs[name].shape_text} {inputs[name].dtype} cannot be fed with "
                f"{outputs[source].shape_text} {outputs[source].dtype}"
            )
        found[name] = source
    return found


def _json(text: str, option: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{option} {text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"{option} {text!r}: expected a JSON object")
    return value
