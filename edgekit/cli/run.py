"""edgekit run"""

from __future__ import annotations

import time
from pathlib import Path

import click

from edgekit.cli.console import output, print_json, progress

EXAMPLE = """\b
Examples:
  edgekit run t2-gr --inputs curves.npz --outputs classes.npz
  edgekit run t2.edge --inputs curves.npz --outputs classes.npz --runtime torch --batch 256
"""


@click.command(epilog=EXAMPLE)
@click.argument("bundle")
@click.option("--inputs", "source", type=Path, required=True, help=".npz with the model's inputs, by name.")
@click.option("--outputs", "target", type=Path, required=True, help=".npz to write the model's outputs to, by name.")
@click.option(
    "--runtime", default="auto", show_default=True, help="c, onnxruntime, torch; auto: c if it can be compiled here."
)
@click.option("--batch", type=click.IntRange(min=1), default=1000, show_default=True, help="Rows at a time.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run(bundle: str, source: Path, target: Path, runtime: str, batch: int, force: bool, as_json: bool) -> None:
    """Run BUNDLE (a bundle or a model's name) on named arrays; outputs come in the order of the inputs' rows."""
    import numpy as np

    from edgekit.bundle.files import refuse_to_overwrite, write_file
    from edgekit.bundle.tensors import arrays_from_bytes, arrays_to_bytes
    from edgekit.errors import EdgekitError
    from edgekit.importers.files import resolve
    from edgekit.session import check_inputs, open_session

    refuse_to_overwrite(target, force)
    if not source.is_file():
        raise EdgekitError(f"{source}: no such file; expected an .npz that holds the model's inputs by name")
    model = resolve(bundle)
    arrays = arrays_from_bytes(source.read_bytes(), str(source))
    rows = check_inputs(model.manifest.inputs, arrays)
    session = open_session(model, runtime)
    started = time.perf_counter()
    parts = []
    with progress() as bar:
        task = bar.add_task(f"{model.manifest.name} on {session.provider}", total=rows)
        for start in range(0, max(rows, 1), batch):  # once even for no rows, which gives empty outputs
            parts.append(session.run({name: array[start : start + batch] for name, array in arrays.items()}))
            bar.update(task, completed=min(start + batch, rows))
    seconds = time.perf_counter() - started
    outputs = {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in session.outputs}
    write_file(target, arrays_to_bytes(outputs))
    if as_json:
        shapes = {name: array.shape for name, array in outputs.items()}
        print_json(
            {
                "outputs": str(target),
                "rows": rows,
                "shapes": shapes,
                "provider": session.provider,
                "device": session.device,
                "seconds": seconds,
            }
        )
        return
    described = ", ".join(f"{name} {array.shape}" for name, array in outputs.items())
    output.print(f"{target}: {described}; {rows:,} rows in {seconds:.2f} s on {session.provider}, {session.device}")
