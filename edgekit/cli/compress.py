"""edgekit compress"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from edgekit.cli import console
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.bundle.format import Bundle
    from edgekit.compression.recipe import Step
    from edgekit.compression.result import Result
    from edgekit.compression.trials import SearchRecord
    from edgekit.passes.change import Change

EXAMPLE = """\b
Examples:
  edgekit compress t2-gr -o t2.edge
  edgekit compress t2-gr --max-size 12000 --max-loss 0.01 -o t2.edge
  edgekit compress t2-gr --auto --max-loss 0.02 --trials 30 -o t2.edge
  edgekit compress t2-gr --agree openvino --batch 1,64,256 -o t2.edge
  edgekit compress t2-gr --recipe recipe.toml --dry-run
  edgekit compress t2-gr --auto --target jetson-nano --max-loss 0.02 -o t2.nano.edge
A recipe is TOML, one [[pass]] table per pass: name = "cluster", bits = 4
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.option("-o", "--output", type=Path, help="Bundle to write, such as t2.edge.")
@click.option("--recipe", type=Path, help="Passes to apply; default: the recipe of the zoo's model.")
@click.option(
    "--max-loss", type=float, default=0.01, show_default=True, help="Quality that may be lost, in the metric's unit."
)
@click.option(
    "--max-size", type=int, help="Bytes that the packed file may take; edgekit clusters to fewer bits until it fits."
)
@click.option("--auto", is_flag=True, help="Search for the recipe; needs no --recipe.")
@click.option("--trials", type=click.IntRange(min=1), default=40, show_default=True, help="Recipes that --auto tries.")
@click.option(
    "--max-latency",
    type=float,
    help="CPU milliseconds of a call at the first batch size, for --auto; estimated if --target is another device.",
)
@click.option("--target", help="The device (see edgekit targets); it decides which passes may run.")
@click.option(
    "--data",
    help="Inputs, labels and split: an .npz, a Parquet table, a folder of images, or package.module:iterable "
    "(default: the model's own data set).",
)
@click.option(
    "--metric",
    help="log-loss, error-rate, mean-absolute-error; changed or relative-error, which need no labels; or a function "
    "package.module:name of (outputs, labels), less is better.  "
    "[default: log-loss for probabilities, else relative-error]",
)
@click.option("--objective", default="any", show_default=True, help="What a pass must gain: size, latency, or any.")
@click.option("--batch", "batches", default="1,16,256", show_default=True, help="Batch sizes to measure.")
@click.option("--runtime", default="onnxruntime", show_default=True, help="Runtime on which latency is measured.")
@click.option(
    "--agree",
    default="",
    help="Other runtimes, such as openvino,c, on which the result must be as good at every batch size.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--replay", help="A bundle: run its kept passes again, and compare the bytes.")
@click.option("--dry-run", is_flag=True, help="Print what each pass would do, and do nothing.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compress(
    model: str,
    output: Path | None,
    recipe: Path | None,
    max_loss: float,
    max_size: int | None,
    auto: bool,
    trials: int,
    max_latency: float | None,
    target: str | None,
    data: str | None,
    metric: str | None,
    objective: str,
    batches: str,
    runtime: str,
    agree: str,
    seed: int,
    replay: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make MODEL (a bundle or a model's name) smaller and faster, and keep only the passes whose results measure
    better.

    edgekit measures quality, size and latency before and after every pass in one run. It rolls back a pass that loses,
    and the report gives the reason. A run that was stopped continues after its last finished pass.

    With --target, edgekit refuses a pass in a precision that the device must never be given, sets open parameters by
    the device's plan, and requires that the result fits into its memory. If the device is this machine, edgekit
    measures the latency; otherwise it estimates the latency from the data sheet, and every record and the report say
    so.
    """
    from edgekit.compression.run import plan
    from edgekit.compression.trials import Constraints
    from edgekit.importers.api import open_model
    from edgekit.search.compress import carry_out, check_replay, job_of, prepare

    if model.endswith(".gguf"):
        raise EdgekitError(
            f"{model}: a GGUF file holds a language model; run: edgekit llm compress {model} -o small.gguf"
        )
    _check_usage(output, recipe, max_loss, max_size, auto, replay, dry_run)
    if output is not None and not dry_run:
        prepare(output, force=force)
    job = job_of(
        model,
        data=data,
        recipe=recipe,
        auto=auto,
        replay=replay,
        target=target,
        max_loss=max_loss,
        metric=metric,
        objective=objective,
        runtime=runtime,
        batches=console.batch_sizes(batches),
        agree=[name.strip() for name in agree.split(",")],
        seed=seed,
        notify=console.note,
    )
    if output is None or dry_run:
        _show_plan(plan(job), as_json)
        return
    constraints = Constraints(max_loss, max_size, max_latency)
    with console.steps() as show:
        result = carry_out(job, constraints, auto=auto, trials=trials, notify=console.note, progress=show)
    written = result.save(output, force=force)
    _show_result(result, written, output, as_json)
    if replay is not None:
        check_replay(result, open_model(replay))
        console.note(f"replayed: identical to {replay}")


def _check_usage(
    output: Path | None,
    recipe: Path | None,
    max_loss: float,
    max_size: int | None,
    auto: bool,
    replay: str | None,
    dry_run: bool,
) -> None:
    """Raise for options that contradict each other, or that would have no effect."""
    if not 0 <= max_loss < math.inf:
        raise click.UsageError(f"--max-loss {max_loss:g}: expected a finite number from 0")
    if max_size is not None and max_size <= 0:
        raise click.UsageError(f"--max-size {max_size}: expected at least 1 byte")
    if replay is not None and (auto or recipe is not None or max_size is not None):
        raise click.UsageError("--replay runs a bundle's own passes; leave --auto, --recipe and --max-size out")
    if auto and (recipe is not None or dry_run):
        raise click.UsageError("--auto searches for a recipe; leave --recipe and --dry-run out")
    if not auto:
        given = click.get_current_context().get_parameter_source
        for name in ("max_latency", "trials"):
            if given(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name.replace('_', '-')} is for --auto; it has no effect without --auto")
    if output is None and not dry_run:
        raise click.UsageError("-o/--output is missing: name the bundle to write, such as -o t2.edge")


def _show_plan(planned: Sequence[tuple[Step, list[Change]]], as_json: bool) -> None:
    if as_json:
        plain = [(step, [asdict(change) for change in changes]) for step, changes in planned]
        console.print_json(
            [{"pass": step.name, "parameters": dict(step.parameters), "plan": rows} for step, rows in plain]
        )
        return
    for number, (step, changes) in enumerate(planned, start=1):
        given = ", ".join(f"{name} = {value}" for name, value in step.parameters.items())
        console.print_table(
            ["tensor", "before", "after"],
            [[change.tensor, change.before, change.after] for change in changes],
            title=f"{number}. {step.name}: {given}",
        )
        console.output.print()
    console.output.print("Nothing was changed: this was a dry run.")


def _show_result(result: Result, bundle: Bundle, path: Path, as_json: bool) -> None:
    """Print what a compression did. bundle: the written one."""
    packed, original = result.packed_bytes, result.source_packed_bytes
    if as_json:
        console.print_json(
            {
                "bundle": str(path),
                "digest": bundle.digest,
                "packed_bytes": packed,
                "source_packed_bytes": original,
                "records": [record.to_json() for record in result.records],
                "search": result.search.to_json() if result.search else None,
            }
        )
        return
    if result.search:
        _show_front(result.search)
    rows = []
    for record in result.records:
        after = record.after or record.before
        speed = "/".join(_number(1 / item.ratio, ".2f") for item in record.latency)
        verdict = "kept" if record.kept else "rolled back"
        quality = _number(after.quality.value, ".4f")
        rows.append([record.name, verdict, quality, f"{after.bytes:,}", speed, record.reason])
    speed = "speed-up (estimate)" if any(record.estimated_on for record in result.records) else "speed-up"
    console.print_table(["pass", "verdict", "quality", "packed bytes", speed, "reason"], rows)
    console.output.print(f"\n{path}: {original:,} to {packed:,} bytes packed")
    console.output.print(f"report: {path}/report.html")


def _show_front(search: SearchRecord) -> None:
    best = [
        [
            trial.passes,
            _number(trial.loss, "+.4f"),
            f"{trial.bytes:,}",
            f"{trial.speedup:.2f}",
            "chosen" if trial.number == search.chosen else "",
        ]
        for trial in search.front
    ]
    title = f"Pareto front of {len(search.trials)} trials, on held-out rows"
    console.print_table(["recipe", "loss", "packed bytes", "times as fast", ""], best, title=title)
    console.output.print()


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
