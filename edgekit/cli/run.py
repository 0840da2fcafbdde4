"""edgekit run"""

from __future__ import annotations

import time
from pathlib import Path

import click

from edgekit.cli.console import output, print_json, steps

EXAMPLE = """\b
Examples:
  edgekit run t2-gr --inputs curves.npz --outputs classes.npz
  edgekit run silero16k.edge --inputs speech.npz --outputs voice.npz --stream --overlap 64
  edgekit run t2.edge --inputs curves.npz --outputs classes.npz --runtime torch --batch 256
"""


@click.command(epilog=EXAMPLE)
@click.argument("bundle")
@click.option("--inputs", type=Path, required=True, help=".npz with the model's inputs, by name.")
@click.option("--outputs", type=Path, required=True, help=".npz to write the model's outputs to, by name.")
@click.option(
    "--runtime",
    default="auto",
    show_default=True,
    help="c, onnxruntime, openvino, torch; auto: c if this machine can compile it.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1000, show_default=True, help="Rows of a batch.")
@click.option("--stream", is_flag=True, help="Feed sequences in chunks to a model with a state, which is carried on.")
@click.option("--chunk", type=click.IntRange(min=1), help="With --stream: length of a chunk, if the model takes any.")
@click.option("--overlap", type=click.IntRange(min=0), default=0, help="With --stream: steps that a chunk repeats.")
@click.option("--own", is_flag=True, help="The arrays are one call in the model's own axes, and so are the outputs.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run(
    bundle: str,
    inputs: Path,
    outputs: Path,
    runtime: str,
    batch: int,
    stream: bool,
    chunk: int | None,
    overlap: int,
    own: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Run BUNDLE (a bundle or a model's name) on named arrays. The outputs have the order of the inputs' rows.

    The first axis of every array is the row, wherever the model has its batch; `edgekit inspect` shows both. With
    --stream, the arrays are whole sequences, (rows, ..., length, ...).
    """
    if own and stream:
        raise click.UsageError("--own and --stream exclude each other: a stream is fed with rows")
    if (chunk or overlap) and not stream:
        raise click.UsageError("--chunk and --overlap go with --stream")
    from edgekit.bundle.files import refuse_to_overwrite, write_file
    from edgekit.bundle.tensors import arrays_to_bytes, read_arrays
    from edgekit.data.stream import run_stream
    from edgekit.importers.api import Session
    from edgekit.session import run_in_batches

    refuse_to_overwrite(outputs, force)
    arrays = read_arrays(inputs)
    session = Session(bundle, runtime)
    started = time.perf_counter()
    with steps() as show:
        if stream:
            found = run_stream(
                session,
                session.state,
                arrays,
                chunk=chunk,
                overlap=overlap,
                progress=lambda done, total: show("chunks", done, total),
            )
        elif own:
            found = session.call(arrays)
        else:
            found = run_in_batches(session, arrays, batch, lambda done, rows: show(f"{bundle}: rows", done, rows))
    seconds = time.perf_counter() - started
    rows = 1 if own else len(next(iter(arrays.values())))
    write_file(outputs, arrays_to_bytes(found))
    if as_json:
        shapes = {name: array.shape for name, array in found.items()}
        print_json(
            {
                "outputs": str(outputs),
                "rows": rows,
                "shapes": shapes,
                "provider": session.provider,
                "device": session.device,
                "seconds": seconds,
            }
        )
        return
    described = ", ".join(f"{name} {array.shape}" for name, array in found.items())
    ran = f"{rows:,} row{'s' * (rows != 1)} in {seconds:.2f} s on {session.provider}, {session.device}"
    output.print(f"{outputs}: {described}; {ran}")
