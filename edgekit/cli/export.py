"""edgekit export"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import click

from edgekit.cli.console import note, output, print_json, print_table

EXAMPLE = """\b
Examples:
  edgekit export t2-gr --to onnx -o t2-onnx
  edgekit export t2.edge --to onnx --opset 16 -o t2-onnx --json
  edgekit export t2.edge --to c --weights encoded -o t2-c
  python t2-onnx/verify.py        # on the device; needs numpy and onnxruntime only
  python t2-c/verify.py           # likewise; needs a C compiler only
"""


@click.command(epilog=EXAMPLE)
@click.argument("bundle")
@click.option("--to", "form", required=True, help="Format to write: onnx or c.")
@click.option("-o", "--output", "directory", type=Path, required=True, help="Directory to write.")
@click.option("--opset", type=int, help="ONNX opset, 13 to 20.  [default: 17]")
@click.option(
    "--weights",
    help="float32, or encoded: as codes, onnx in a second file.  [default: encoded for onnx, float32 for c]",
)
@click.option("--force", is_flag=True, help="Replace an existing export.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(
    bundle: str, form: str, directory: Path, opset: int | None, weights: str | None, force: bool, as_json: bool
) -> None:
    """Write BUNDLE (a bundle or a model's name) for a runtime, and prove that it still works.

    The exported model is run at batch 1, 16 and 1000 and held against the network itself. Beyond tolerance nothing is
    written and the exit status is 1. The proof travels: the directory holds golden data and a script that checks it.
    """
    from edgekit.plugins import load
    from edgekit.zoo import resolve

    exporter_class = load("edgekit.exporters", form)
    options = {name: value for name, value in (("opset", opset), ("weights", weights)) if value is not None}
    if strange := set(options) - {field.name for field in fields(exporter_class)}:
        raise click.UsageError(f"--{min(strange)} means nothing to the format {form}; leave it out")
    exporter = exporter_class(**options)
    source = resolve(bundle)
    if not as_json:
        note(f"Exporting {source.manifest.name} to {form} and verifying it ...")
    result = exporter.export(source, directory, force=force)
    if as_json:
        print_json({"directory": str(result.directory), "bytes": result.files, "manifest": result.manifest})
        return
    rows = [
        [check["file"], f"{check['bytes']:,}", check["batch"], check["rows"], f"{check['difference']:.1e}",
         f"{check['allowed']:.1e}", check["changed"]]
        for check in result.checks
    ]  # fmt: skip
    print_table(["file", "bytes", "batch", "rows", "max |dp|", "allowed", "classes changed"], rows)
    output.print(f"\n{result.directory}: {', '.join(result.files)}")
    output.print(f"on the device: python {result.directory / 'verify.py'}")
