"""edgekit alerts classify"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alert_broker.commands.common import MEGABYTE, alert_packages, stopping
from edgekit.cli.console import note, output, print_json, print_table, printable, progress
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from alert_broker.results import Account

CLASSIFY_EXAMPLES = """\b
Examples:
  edgekit alerts classify night/ -o night.parquet
  edgekit alerts classify a.avro b.parquet -o out.parquet --model t2-gr --json
  edgekit alerts classify night/ -o night.parquet --cutouts braai.edge
Read the result with: pandas.read_parquet("night.parquet")
"""


@click.command(epilog=CLASSIFY_EXAMPLES)
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "-o", "--output", "target", type=Path, required=True, help="Parquet file to write, with one row for every alert."
)
@click.option(
    "--model", help="Bundle, or name of a model [default: t2-gr for ZTF and DECam, t2-ugrizy for LSST and ELAsTiCC]"
)
@click.option(
    "--runtime",
    default="auto",
    show_default=True,
    help="c, onnxruntime or torch; auto selects c if this machine can compile it.",
)
@click.option(
    "--prior",
    default="uniform",
    show_default=True,
    help="Class shares that the probabilities are for: uniform, lsst, or a TOML file of CLASS = SHARE.",
)
@click.option("--cutouts", help="Bundle of a network that scores the images, such as braai.edge; adds the column drb.")
@click.option(
    "--cutouts-runtime",
    default="auto",
    show_default=True,
    help="Runtime of that network: onnxruntime, openvino or torch.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1024, show_default=True, help="Number of alerts in a batch."
)
@click.option(
    "--errors", type=Path, help="Parquet file for packets without a light curve [default: OUTPUT.errors.parquet]"
)
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def classify(
    context: click.Context,
    paths: tuple[str, ...],
    target: Path,
    model: str | None,
    runtime: str,
    prior: str,
    cutouts: str | None,
    cutouts_runtime: str,
    batch: int,
    errors: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Classify the alerts in files and folders: Avro containers, Confluent messages, and Parquet of ZTF, LSST, ELAsTiCC
    or DECam.

    Every packet is accounted for: it is classified, skipped with a reason, or corrupt and listed in the errors file.
    After Ctrl-C the files hold the finished results (exit status 130); a second Ctrl-C discards them.
    """
    with alert_packages():
        from alert_broker.classify import classify_files
        from alert_broker.priors import Prior
    from edgekit.importers.api import open_to_run

    bundle, images = (open_to_run(name) if name is not None else None for name in (model, cutouts))
    errors = errors or target.with_suffix(".errors.parquet")
    with progress() as bar, stopping() as stop:
        task = bar.add_task("MB of packets", total=None)

        def show(done: int, total: int, packets: int) -> None:
            text = f"{packets:,} packets, MB"
            bar.update(task, description=text, completed=done // MEGABYTE, total=max(total // MEGABYTE, 1))

        account = classify_files(
            paths,
            target,
            bundle=bundle,
            runtime=runtime,
            batch=batch,
            errors=errors,
            prior=Prior.named(prior),
            cutouts=images,
            cutouts_runtime=cutouts_runtime,
            force=force,
            progress=show,
            notify=note,
            stop=stop,
        )
    if as_json:
        print_json({"output": str(target), "errors": str(errors), **account.to_json()})
    else:
        _print_account(account, target, errors)
    if account.stopped:
        note("edgekit: stopped; the files hold the results up to this point")
        context.exit(130)
    if not account.surveys:
        raise EdgekitError(f"no alert could be read from {account.files} files; {errors} says why for each")


def _print_account(account: Account, target: Path, errors: Path) -> None:
    columns = ["in", "classified", "skipped", "corrupt"]
    summary = account.to_json()
    print_table(columns, [[f"{summary[name]:,}" for name in columns]])
    tables = [("skipped because", account.skipped), ("most probable class", account.classes)]
    if account.cutouts is not None:
        tables.append(("no drb because", account.cutouts.unscored))
    for title, counts in tables:
        if counts:
            output.print()
            print_table([title, "alerts"], [[name, f"{number:,}"] for name, number in counts.most_common()])
    output.print()
    models = ", ".join(f"{name} ({digest[:12]})" for name, digest in account.models.items())
    lines = [f"{target}: {account.surveys.total():,} rows{f', {models} on {account.runtime}' if models else ''}"]
    if account.packets != account.surveys.total():
        lines.append(f"{errors}: packets without a light curve, each with its reason")
    if (scores := account.cutouts) is not None:
        lines.append(f"{scores.scored:,} with a drb, {scores.model} ({scores.digest[:12]}) on {scores.runtime}")
    busy = {stage: value for stage, value in account.seconds.items() if stage != "start"}
    if total := sum(busy.values()):
        shares = ", ".join(f"{stage} {value / total:.0%}" for stage, value in busy.items())
        lines.append(f"{account.packets / total:,.0f} packets/s ({shares})")
    for line in lines:
        output.print(printable(line))
