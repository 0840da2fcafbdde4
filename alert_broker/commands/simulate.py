"""edgekit alerts simulate"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from alert_broker.commands.common import MEGABYTE, alert_packages, key_values, stopping
from alert_broker.commands.replay import report
from edgekit.cli.console import output, progress
from edgekit.errors import EdgekitError

EXAMPLES = """\b
Examples:
  edgekit alerts simulate -o alerts/ --survey ztf --count 1000
  edgekit alerts simulate --to-topic ztf --kafka bootstrap.servers=localhost:9092 --survey ztf --count 1000 --rate 100
"""


@click.command(epilog=EXAMPLES)
@click.option("-o", "--output", "target", type=Path, help="Folder to write.")
@click.option("--to-topic", help="Topic to send the packets to, instead of a folder.")
@click.option("--kafka", multiple=True, metavar="NAME=VALUE", help="A setting of librdkafka; env:NAME for a secret.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Packets per second; 0 sends them as fast as they are made.",
)
@click.option(
    "--survey", required=True, help="ztf or lsst: the survey whose cadence, depth and packet format are simulated."
)
@click.option("--count", type=int, required=True, help="Number of alerts, each of a different object.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option(
    "--per-file",
    type=int,
    default=100,
    show_default=True,
    help="Packets per file; with 1, files are as a survey sends them.",
)
@click.option("--no-cutouts", is_flag=True, help="Leave out the image stamps, which are most of a packet's bytes.")
@click.option("--force", is_flag=True, help="Replace a folder of simulated alerts.")
def simulate(
    target: Path | None,
    to_topic: str | None,
    kafka: tuple[str, ...],
    rate: float,
    survey: str,
    count: int,
    seed: int,
    per_file: int,
    no_cutouts: bool,
    force: bool,
) -> None:
    """Write simulated alerts as valid packets of a survey, with their true classes in truth.parquet.

    Use them for demonstrations and load tests. The light curves are sketches: do not train or score a classifier with
    them.
    """
    with alert_packages():
        from alert_broker import simulate as simulation

    if (target is None) == (to_topic is None):
        raise click.UsageError("give either --output FOLDER or --to-topic TOPIC")
    source = simulation.simulate(survey, count, seed, cutouts=not no_cutouts)
    if target is None:
        assert to_topic is not None
        with alert_packages():
            from alert_broker.stream import logs
            from alert_broker.stream import replay as stream
            from alert_broker.stream.clients import client_errors
            from alert_broker.stream.config import secrets_from_environment
        settings = secrets_from_environment(key_values(kafka, "--kafka"))
        logs.configure(config=settings)
        with progress() as bar, stopping() as stop, client_errors():
            tracked = bar.track(source, count, description=f"{survey} alerts")
            sent = stream.send(stream.simulated(tracked), to_topic, settings, rate=rate, stop=stop)
        report(to_topic, sent.messages, sent.bytes, sent.seconds, sent.late, as_json=False)
        return
    _check_folder(target, force)
    partial, stale = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    try:
        with progress() as bar:
            files = simulation.write(partial, bar.track(source, count, description=f"{survey} alerts"), per_file)
        size = sum(file.stat().st_size for file in files)
        if target.exists():
            target.rename(stale)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
    output.print(
        f"{target}: {count:,} simulated {survey} alerts in {len(files):,} {'file' if len(files) == 1 else 'files'}, "
        f"{size / MEGABYTE:,.1f} MB; true classes in truth.parquet"
    )


def _check_folder(target: Path, force: bool) -> None:
    """Raise unless the folder is new or empty, or, with `force`, holds simulated alerts and nothing else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise EdgekitError(f"{target} already exists; choose another name or pass --force to replace it")
    names = [item.name for item in target.iterdir()] if target.is_dir() else []
    if "truth.parquet" not in names or any(not name.endswith((".avro", ".bin", ".parquet")) for name in names):
        raise EdgekitError(
            f"{target} holds other files than simulated alerts, so --force does not replace it; choose another folder"
        )
