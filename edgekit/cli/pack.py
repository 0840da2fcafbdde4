"""edgekit pack"""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.console import output, print_json


@click.command(epilog="Example: edgekit pack t2.edge -o t2.edgepack")
@click.argument("bundle")
@click.option("-o", "--output", "path", type=Path, required=True, help="File to write, such as t2.edgepack.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pack(bundle: str, path: Path, force: bool, as_json: bool) -> None:
    """Write BUNDLE (a directory or a model's name) as one entropy-coded file.

    The file is also a bundle: every command that takes a bundle takes it. It holds the weights, the preprocessing and
    two golden rows, bit for bit, but not the history.
    """
    from edgekit.bundle.store import write_packed
    from edgekit.importers.api import open_model

    source = open_model(bundle)
    size, weights = write_packed(source, path, force=force), source.parameters
    if as_json:
        print_json({"file": str(path), "bytes": size, "parameters": weights, "float32_bytes": 4 * weights})
        return
    ratio = 4 * weights / size
    output.print(f"{path}: {size:,} bytes, {ratio:.1f} times smaller than the {weights:,} weights as float32")
