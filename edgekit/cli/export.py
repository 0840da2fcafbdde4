"""edgekit export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.cli.console import note, output, print_json, print_table

EXAMPLE = """\b
Examples:
  edgekit export t2-gr --to onnx -o t2-onnx
  edgekit export t2-gr --to onnx --target tesla-p40 -o t2-p40
  edgekit export t2-gr --to tensorrt --target jetson-nano --axis batch=1:16:64 -o t2-nano
  edgekit export ocr.edge --to tensorrt --target jetson-nano -o ocr-nano \\
      --shapes x=1x3x32x320:8x3x48x320:32x3x48x640
  edgekit export t2-gr --to tensorrt --target rtx-3060-12gb --stack "TensorRT 11" -o t2-11
  edgekit export t2-gr --to tensorrt-rtx --target rtx-3060-12gb -o t2-rtx
  edgekit export t2.edge --to c --weights encoded -o t2-c
  edgekit export t2-gr --to openvino -o t2-openvino
  python t2-onnx/verify.py        # on the device; needs numpy and onnxruntime only
  sh t2-nano/build.sh && python3 t2-nano/verify.py
  python t2-c/verify.py           # likewise; needs a C compiler only
"""


@click.command(epilog=EXAMPLE)
@click.argument("bundle")
@click.option("--to", "form", default="", help="Format to write: onnx, openvino, tensorrt, tensorrt-rtx or c.")
@click.option("-o", "--output", "directory", type=Path, help="Directory to write.")
@click.option("--target", help="Device: its opset, operators and precision (see: edgekit targets).")
@click.option("--stack", help="One of the target's stacks, by name.  [default: the first that suits]")
@click.option("--precision", help="float32, float16 or int8.  [default: the first of the target's plan]")
@click.option("--opset", type=int, help="ONNX opset, 13 to 20.  [default: 17, or the newest that the target supports]")
@click.option(
    "--shapes", multiple=True, help="INPUT=MIN:OPT:MAX of an engine, such as x=1x3x32x32:1x3x320x320:8x3x960x960."
)
@click.option("--data", help="An .npz with real inputs: their lengths are an engine's, their rows its golden rows.")
@click.option("--axis", "axes", multiple=True, help="NAME=LEAST:BEST:LARGEST, lengths of a free axis in an engine.")
@click.option("--workspace", type=int, help="MiB that building an engine may use.  [default: 1/8 of its memory]")
@click.option("--level", type=int, help="How long TensorRT searches for kernels, 0 to 5.  [default: 3]")
@click.option(
    "--weights",
    help="float32, or encoded: as codes, onnx in a second file.  [default: encoded for onnx, float32 for c]",
)
@click.option("--force", is_flag=True, help="Replace an existing export.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(bundle: str, form: str, directory: Path | None, force: bool, as_json: bool, **given: Any) -> None:
    """Write BUNDLE (a bundle or a model's name) for a runtime or a device, and prove that it still works.

    edgekit runs the exported model at batch 1, 16 and 1000 and compares it with the network itself. If they differ by
    more than the tolerance, it writes nothing and exits with status 1. The directory also holds reference outputs and a
    script that repeats the check on the device.

    The opset is 17, and 13 for TensorRT 8.2 (Jetson Nano, TX2), unless --opset gives another one that the target
    supports.
    """
    from edgekit.exporter import export as run_export
    from edgekit.exporter import load_exporter, option_names

    if not form:
        from edgekit.plugins import names

        raise click.UsageError(
            f"--to is missing: name the format to write, one of {', '.join(names('edgekit.exporters'))}"
        )
    if directory is None:
        raise click.UsageError(f"-o/--output is missing: name the directory to write, such as -o {form}")
    options = {name: value for name, value in given.items() if value not in (None, ())}
    exporter = load_exporter(form)
    if strange := set(options) - option_names(exporter):
        flag = {"axes": "axis"}.get(min(strange), min(strange))
        raise click.UsageError(f"--{flag} means nothing to the format {form}; leave it out")
    exporter(**options)  # a wrong value must fail before the command announces the work
    if not as_json:
        note(f"Exporting {bundle} to {form} and verifying it ...")
    result = run_export(bundle, directory, to=form, options=options, force=force)
    if as_json:
        print_json({"directory": str(result.directory), "bytes": result.files, "manifest": result.manifest})
        return
    rows = [
        [
            check["file"],
            f"{check['bytes']:,}",
            check["batch"],
            check["rows"],
            f"{check['difference']:.1e}",
            f"{check['allowed']:.1e}",
            check["changed"],
        ]
        for check in result.checks
    ]
    print_table(["file", "bytes", "batch", "rows", "max |dp|", "allowed", "classes changed"], rows)
    if "target" in result.manifest:
        manifest = result.manifest
        output.print(f"\n{manifest['target']}: {manifest['stack']['name']}, {manifest['precision']}")
        if engine := manifest.get("engine"):
            built = f"{engine['file']}: " + ("built" if engine["built"] else "not built")
            output.print(f"{built}; {engine['reason']}" if "reason" in engine else built)
        for line in manifest.get("notes", ()):
            output.print(f"note: {line}")
    output.print(f"\n{result.directory}: {', '.join(result.files)}")
    build = f"sh {result.directory / 'build.sh'} && " if "build.sh" in result.files else ""
    python = "python3" if "target" in result.manifest else "python"  # JetPack 4's python is 2.7
    output.print(f"on the device: {build}{python} {result.directory / 'verify.py'}")
