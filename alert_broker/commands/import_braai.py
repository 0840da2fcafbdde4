"""edgekit import-braai"""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.console import output

EXAMPLES = """\b
Examples:
  edgekit import-braai braai_d6_m7.npz -o braai.edge
  edgekit import-braai mine.npz --norm image -o mine.edge
"""
NORM_OF = {"d6_m7": "rows", "d6_m9": "image"}  # by the name of the published weights


@click.command("import-braai", epilog=EXAMPLES)
@click.argument("weights", type=Path)
@click.option("-o", "--output", "target", type=Path, required=True, help="Bundle to write, such as braai.edge.")
@click.option(
    "--norm",
    type=click.Choice(["rows", "image"]),
    help="What the L2 norm is taken of: each row of an image (d6_m7), or the whole image (d6_m9) [default: by the "
    "file's name, if that contains d6_m7 or d6_m9]",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def import_braai(weights: Path, target: Path, norm: str | None, force: bool) -> None:
    """Make a bundle from published weights of braai: an .npz file of named arrays in Keras layout.

    braai is ZTF's real/bogus network. `edgekit alerts classify --cutouts` runs the bundle on the images of alerts.
    """
    from alert_broker.cutouts.braai import from_published
    from alert_broker.cutouts.bundle import braai_bundle
    from edgekit.bundle.store import default_name, write_bundle
    from edgekit.bundle.tensors import read_arrays
    from edgekit.errors import EdgekitError

    if not weights.is_file():
        raise EdgekitError(f"{weights} does not exist; expected an .npz file of published braai weights")
    if target.exists() and not force:
        raise EdgekitError(f"{target} already exists; choose another name or pass --force to replace it")
    norm = norm or next((norm for name, norm in NORM_OF.items() if name in weights.stem), None)
    if norm is None:
        raise EdgekitError(
            f"{weights}: its name contains neither {' nor '.join(NORM_OF)}, so edgekit does not know the network's "
            "preprocessing; pass --norm rows or --norm image"
        )
    model = from_published(read_arrays(weights), str(weights))
    bundle = write_bundle(braai_bundle(model, default_name(target), norm), target, force=force)
    output.print(f"{target}: braai, norm of {norm}, {bundle.parameters:,} parameters, {bundle.size:,} bytes")
