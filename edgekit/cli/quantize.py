"""edgekit quantize"""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.console import note, output, print_json

SLOWER = 1.05  # times the original's time, from which on the command warns
EXAMPLE = """\b
Examples:
  edgekit quantize minilm.edge --to int8 -o minilm-int8.edge
  edgekit quantize detector.edge --to int8 --data pictures.npz -o detector-int8.edge
  edgekit quantize model.onnx --to fp16 -o model-fp16.edge
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.option("--to", "form", required=True, help="int8, int4 or fp16.")
@click.option("-o", "--output", "path", type=Path, required=True, help="Bundle to write, such as model-int8.edge.")
@click.option("--data", type=Path, help="An .npz with real inputs: int8 is calibrated on them, and outputs compared.")
@click.option(
    "--least-cosine", type=float, default=0.98, show_default=True, help="Least cosine of outputs with the original's."
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def quantize(
    model: str, form: str, path: Path, data: Path | None, least_cosine: float, force: bool, as_json: bool
) -> None:
    """Store MODEL in fewer bits in one step, and compare outputs, size and time with the original's.

    It takes seconds and measures little; `edgekit compress` guards quality on a test set.
    """
    from edgekit.bundle.store import refuse_to_replace, write_bundle
    from edgekit.bundle.tensors import read_arrays
    from edgekit.compression.quick import quantize as run
    from edgekit.importers.api import open_to_run

    refuse_to_replace(path, force)
    result = run(open_to_run(model), form, read_arrays(data) if data else None, least_cosine=least_cosine)
    write_bundle(result.bundle, path, force=force)
    before, after = result.bytes
    if as_json:
        print_json(
            {
                "bundle": str(path),
                "pass": result.passed,
                "cosine": result.cosine,
                "difference": result.difference,
                "bytes": [before, after],
                "milliseconds": list(result.milliseconds),
                "seconds": result.seconds,
            }
        )
        return
    old, new = result.milliseconds
    output.print(
        f"{path}: {result.passed}; {before:,} to {after:,} bytes ({before / after:.2f} times smaller); one row on one "
        f"thread: {old:.2f} to {new:.2f} ms; least cosine {result.cosine:.4f}, largest difference "
        f"{result.difference:.1e}; done in {result.seconds:.1f} s"
    )
    if new > SLOWER * old:
        note(
            f"Warning: it is {new / old:.1f} times slower than the original on this machine. edgekit compress refuses "
            "such a result and looks for another"
        )
