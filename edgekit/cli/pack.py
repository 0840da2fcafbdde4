"""edgekit pack"""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.console import output, print_json


@click.command(epilog="Example: edgekit pack t2.edge -o t2.edgepack")
@click.argument("bundle")
@click.option("-o", "--output", "target", type=Path, required=True, help="File to write, such as t2.edgepack.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pack(bundle: str, target: Path, force: bool, as_json: bool) -> None:
    """Write BUNDLE (a directory or a model's name) as one entropy-coded file.

    The file is a bundle too: every command that takes a bundle takes it. History stays behind; weights, preprocessing
    and two golden rows travel, bit for bit.
    """
    from edgekit.bundle.files import refuse_to_overwrite, write_file
    from edgekit.bundle.pack import pack as packed
    from edgekit.bundle.pack import unpack
    from edgekit.importers.files import resolve

    refuse_to_overwrite(target, force)
    source = resolve(bundle)
    content = packed(source)
    unpack(content, str(target))  # what is written can be read
    write_file(target, content)
    weights = source.parameters
    if as_json:
        print_json({"file": str(target), "bytes": len(content), "parameters": weights, "float32_bytes": 4 * weights})
    else:
        ratio = 4 * weights / len(content)
        output.print(
            f"{target}: {len(content):,} bytes, {ratio:.1f} times smaller than the {weights:,} weights as float32"
        )
