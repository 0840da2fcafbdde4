"""edgekit import-t2"""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.console import output


@click.command("import-t2", epilog="Example: edgekit import-t2 weights_t2_GR_noZ.npz -o t2-published.edge")
@click.argument("weights", type=Path)
@click.option("-o", "--output", "target", type=Path, required=True, help="Bundle to write, such as t2-published.edge.")
@click.option(
    "--redshift/--no-redshift",
    default=None,
    help="Whether the model takes redshift [default: it does if the file's name contains 'wZ']",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def import_t2(weights: Path, target: Path, redshift: bool | None, force: bool) -> None:
    """Make a bundle from published t2 weights: an .npz file of named arrays in Keras layout.

    The published scaling constants were never stored, so the bundle names no preprocessing and cannot classify alerts;
    `edgekit run` gives it arrays.
    """
    from dataclasses import asdict

    import numpy as np

    from alert_broker.plasticc import CLASSES
    from edgekit.bundle.format import Manifest, assemble
    from edgekit.bundle.store import default_name, write_bundle
    from edgekit.bundle.tensors import TensorSpec, golden_inputs, read_arrays
    from edgekit.compression.job import versions
    from edgekit.data.dataset import Dataset
    from edgekit.errors import EdgekitError
    from edgekit.nn.t2_weights import from_published
    from edgekit.nn.training import probabilities

    if not weights.is_file():
        raise EdgekitError(f"{weights} does not exist; expected an .npz file of published t2 weights")
    if target.exists() and not force:
        raise EdgekitError(f"{target} already exists; choose another name or pass --force to replace it")
    if redshift is None:
        redshift = "wZ" in weights.stem
    model = from_published(read_arrays(weights), context=2 * redshift, source=str(weights))
    config = model.config
    if config.classes != len(CLASSES):
        raise EdgekitError(
            f"{weights} has {config.classes} classes; the published models have PLAsTiCC's {len(CLASSES)} classes"
        )
    specs = [TensorSpec("light_curve", ("batch", config.sequence, config.bands), unit="scaled flux")]
    if redshift:
        specs.append(TensorSpec("context", ("batch", 2), unit="scaled redshift, scaled redshift error"))
    inputs = golden_inputs(tuple(specs), 8)
    outputs = {"probabilities": probabilities(model, Dataset(inputs, np.zeros(8, np.int64)))}
    manifest = Manifest(
        name=default_name(target),
        family="t2",
        arguments=asdict(config),
        inputs=tuple(specs),
        outputs=(TensorSpec("probabilities", ("batch", config.classes)),),
        classes=tuple(CLASSES.values()),
        class_ids=tuple(CLASSES),
        versions=versions(),
    )
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    bundle = write_bundle(assemble(manifest, state, {}, (inputs, outputs)), target, force=force)
    parameters = sum(value.size for value in state.values())
    output.print(f"{target}: t2 for {config.bands} bands, {parameters:,} parameters, {bundle.size:,} bytes")
