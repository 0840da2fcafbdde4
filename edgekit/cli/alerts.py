"""edgekit alerts: classify packets from files, simulate packets"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.console import note, output, print_json, print_table, progress
from edgekit.errors import EdgekitError, missing_extra

if TYPE_CHECKING:
    from alert_broker.results import Account

CLASSIFY_EXAMPLES = """\b
Examples:
  edgekit alerts classify night/ -o night.parquet
  edgekit alerts classify a.avro b.parquet -o out.parquet --model t2-gr --json
Read the result with: pandas.read_parquet("night.parquet")
"""
MEGABYTE = 1_000_000


@click.group()
def alerts() -> None:
    """Classify or simulate astronomical alerts."""


@alerts.command(epilog=CLASSIFY_EXAMPLES)
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "-o", "--output", "target", type=Path, required=True, help="Parquet file to write: a row for every alert."
)
@click.option("--model", help="Bundle or model's name [default: t2-gr for ZTF, t2-ugrizy for LSST and ELAsTiCC]")
@click.option(
    "--runtime", default="auto", show_default=True, help="c, onnxruntime, torch; auto: c if it can be compiled here."
)
@click.option("--batch", type=click.IntRange(min=1), default=1024, show_default=True, help="Alerts at a time.")
@click.option("--errors", type=Path, help="Parquet file for what gave no light curve [default: OUTPUT.errors.parquet]")
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def classify(
    context: click.Context, paths: tuple[str, ...], target: Path, model: str | None, runtime: str, batch: int,
    errors: Path | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Classify the alerts in files and folders: Avro containers, Confluent messages, Parquet of ZTF, LSST or ELAsTiCC.

    Every packet is accounted for: classified, skipped with a reason, or corrupt and listed in the errors file. Ctrl-C
    keeps what is done (exit status 130); a second Ctrl-C abandons it.
    """
    with _alert_packages():
        from alert_broker.classify import classify_files
    from edgekit.zoo import resolve

    bundle = resolve(model) if model is not None else None
    errors = errors or target.with_suffix(".errors.parquet")
    with progress() as bar, stopping() as stop:
        task = bar.add_task("MB of packets", total=None)

        def show(done: int, total: int, packets: int) -> None:
            text = f"{packets:,} packets, MB"
            bar.update(task, description=text, completed=done // MEGABYTE, total=max(total // MEGABYTE, 1))

        account = classify_files(
            paths, target, bundle=bundle, runtime=runtime, batch=batch, errors=errors, force=force,
            progress=show, notify=note, stop=stop,
        )  # fmt: skip
    if as_json:
        print_json({"output": str(target), "errors": str(errors), **account.to_json()})
    else:
        _print_account(account, target, errors)
    if account.stopped:
        note("edgekit: stopped; the files hold what was done")
        context.exit(130)
    if not account.surveys:
        raise EdgekitError(f"no alert could be read from {account.files} files; {errors} says why for each")


@alerts.command(epilog="Example: edgekit alerts simulate -o alerts/ --survey ztf --count 1000")
@click.option("-o", "--output", "target", type=Path, required=True, help="Folder to write.")
@click.option("--survey", required=True, help="ztf or lsst: whose cadence, depth and packets.")
@click.option("--count", type=int, required=True, help="How many alerts, each of another object.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option(
    "--per-file", type=int, default=100, show_default=True, help="Packets to a file; 1 as a survey sends them."
)
@click.option("--no-cutouts", is_flag=True, help="Leave out the image stamps, most of a packet's bytes.")
@click.option("--force", is_flag=True, help="Replace a folder of simulated alerts.")
def simulate(target: Path, survey: str, count: int, seed: int, per_file: int, no_cutouts: bool, force: bool) -> None:
    """Write simulated alerts as valid packets of a survey, with their true classes in truth.parquet.

    For demonstrations and load tests. The light curves are sketches: do not train or score a classifier with them.
    """
    with _alert_packages():
        from alert_broker import simulate as simulation

    source = simulation.simulate(survey, count, seed, cutouts=not no_cutouts)
    _check_folder(target, force)
    fresh, stale = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    try:
        with progress() as bar:
            files = simulation.write(fresh, bar.track(source, count, description=f"{survey} alerts"), per_file)
        size = sum(file.stat().st_size for file in files)
        if target.exists():
            target.rename(stale)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
    output.print(
        f"{target}: {count:,} simulated {survey} alerts in {len(files):,} files, {size / MEGABYTE:,.1f} MB; "
        "true classes in truth.parquet"
    )


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Gives a question that Ctrl-C or SIGTERM turns true, for a loop to ask; a second one is a KeyboardInterrupt."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _alert_packages() -> Iterator[None]:
    """Names the extra to install where an import fails for want of a package."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), "alerts", "working with alerts") from None


def _check_folder(target: Path, force: bool) -> None:
    """Raise unless the folder is new or empty, or, with `force`, one of simulated alerts and nothing else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise EdgekitError(f"{target} already exists; choose another name or pass --force to replace it")
    names = [item.name for item in target.iterdir()] if target.is_dir() else []
    if "truth.parquet" not in names or any(not name.endswith((".avro", ".bin", ".parquet")) for name in names):
        raise EdgekitError(f"{target} is not a folder of simulated alerts, so --force will not replace it")


def _print_account(account: Account, target: Path, errors: Path) -> None:
    columns = ["in", "classified", "skipped", "corrupt"]
    summary = account.to_json()
    print_table(columns, [[f"{summary[name]:,}" for name in columns]])
    for title, counts in (("skipped because", account.skipped), ("most probable class", account.classes)):
        if counts:
            output.print()
            print_table([title, "alerts"], [[name, f"{number:,}"] for name, number in counts.most_common()])
    output.print()
    models = ", ".join(f"{name} ({digest[:12]})" for name, digest in account.models.items())
    lines = [f"{target}: {account.surveys.total():,} rows{f', {models} on {account.runtime}' if models else ''}"]
    if account.packets != account.surveys.total():
        lines.append(f"{errors}: what gave no light curve, and why")
    busy = {stage: value for stage, value in account.seconds.items() if stage != "start"}
    if total := sum(busy.values()):
        shares = ", ".join(f"{stage} {value / total:.0%}" for stage, value in busy.items())
        lines.append(f"{account.packets / total:,.0f} packets/s ({shares})")
    for line in lines:
        output.print(line)
