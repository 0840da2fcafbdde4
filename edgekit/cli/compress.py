"""edgekit compress"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgekit.cli.console import batch_sizes, note, output, print_json, print_table, progress

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
@click.option("-o", "--output", "target", type=Path, help="Bundle to write, such as t2.edge.")
@click.option("--recipe", "recipe_file", type=Path, help="Passes to apply; default: the recipe beside the zoo's model.")
@click.option(
    "--max-loss", type=float, default=0.01, show_default=True, help="Quality it may cost, in the metric's unit."
)
@click.option("--max-size", type=int, help="Bytes that the packed file may take; codes get narrower until it fits.")
@click.option("--auto", is_flag=True, help="Search for the recipe; needs no --recipe.")
@click.option("--trials", type=click.IntRange(min=1), default=40, show_default=True, help="Recipes that --auto tries.")
@click.option(
    "--max-latency",
    type=float,
    help="CPU milliseconds of a call at the first batch size, for --auto; with a --target elsewhere, estimated ones.",
)
@click.option("--target", "device", help="The device it is for (see edgekit targets): decides what passes may do.")
@click.option(
    "--data",
    "data_file",
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
@click.option("--batch", "batches", default="1,16,256", show_default=True, help="Batch sizes that count.")
@click.option("--runtime", default="onnxruntime", show_default=True, help="Runtime that latency is measured on.")
@click.option(
    "--agree",
    help="Other runtimes, such as openvino,c, on which the result must be as good at every batch size.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--replay", "original", help="A bundle: run the passes it kept again, and compare the bytes.")
@click.option("--dry-run", is_flag=True, help="Print what each pass would do, and do nothing.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compress(
    model: str,
    target: Path | None,
    recipe_file: Path | None,
    max_loss: float,
    max_size: int | None,
    auto: bool,
    trials: int,
    max_latency: float | None,
    device: str | None,
    data_file: str | None,
    metric: str | None,
    objective: str,
    batches: str,
    runtime: str,
    agree: str | None,
    seed: int,
    original: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make MODEL (a bundle or a model's name) smaller and faster, and keep only what measures better.

    Every pass is measured for quality, size and latency, before and after in one run; a pass that loses is rolled back
    and the report says why. A run that was stopped goes on after its last finished pass.

    With --target, a pass in a precision that the device must never be given is refused, open parameters follow the
    device's plan, and the result must fit its memory. Latency is measured if the device is this machine; else it is
    estimated from its data sheet, and every record and the report say so.
    """
    from dataclasses import replace

    from edgekit.bundle.format import GOLDEN, GRAPH, WEIGHTS, with_files
    from edgekit.bundle.zoo import folders
    from edgekit.compression import metrics, recipe, states
    from edgekit.compression.guard import Limits
    from edgekit.compression.job import Job
    from edgekit.compression.run import plan, run
    from edgekit.data.dataset import load, locate
    from edgekit.errors import EdgekitError
    from edgekit.importers.files import resolve
    from edgekit.search.ladder import narrowed

    if not 0 <= max_loss < math.inf or (max_size is not None and max_size <= 0):
        raise click.UsageError(f"--max-loss {max_loss} and --max-size {max_size} must be positive and finite")
    if original is not None and (auto or recipe_file is not None or max_size is not None):
        raise click.UsageError("--replay runs a bundle's own passes; leave --auto, --recipe and --max-size out")
    if not auto:
        given = click.get_current_context().get_parameter_source
        for name in ("max_latency", "trials"):
            if given(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name.replace('_', '-')} is for --auto; without it, it would do nothing")
    if target is None and not dry_run:
        raise click.UsageError("-o/--output is missing: name the bundle to write, such as -o t2.edge")
    if target and target.exists() and not force and not dry_run:
        raise EdgekitError(f"{target} already exists; choose another name or pass --force to replace it")
    chosen = None
    if device is not None:
        from edgekit.targets import profile

        chosen = profile.find(device)
    source = resolve(model)
    before = resolve(original) if original else None
    if before is not None and before.manifest.parent != source.digest:
        raise EdgekitError(
            f"{original} was made from {(before.manifest.parent or 'no bundle')[:12]}, {model} is "
            f"{source.digest[:12]}; replay it on the bundle that it was made from (edgekit inspect --lineage)"
        )
    steps: list[recipe.Step] = []
    if before is not None:
        steps = recipe.of_bundle(before)
        seed = before.manifest.seed or 0
    elif auto:
        if recipe_file is not None or dry_run:
            raise click.UsageError("--auto finds a recipe of its own; leave --recipe and --dry-run out")
    elif recipe_file is None:
        recipe_file = folders().get(source.manifest.name, Path()) / "recipe.toml"
        if not recipe_file.is_file():
            raise EdgekitError(f"{source.manifest.name} comes with no recipe of its own; pass --recipe FILE")
    if before is None and recipe_file is not None:
        steps = recipe.read(recipe_file)
    metric = metric or default_metric(source.manifest)
    train, test = load(locate(source.manifest, data_file), source.manifest, labelled=metrics.metric(metric).labelled)
    limits = Limits(max_loss=max_loss, batches=batch_sizes(batches), objective=objective)  # type: ignore[arg-type]
    others = tuple(
        dict.fromkeys(name.strip() for name in (agree or "").split(",") if name.strip() not in ("", runtime))
    )
    job = Job(source, steps, train, test, limits, metric, runtime, seed, chosen, others, replay=before is not None)
    if job.estimated:
        note(f"{device} is not this machine: latency is estimated from its data sheet, quality is measured here")
    if dry_run:
        _show_plan(plan(job), as_json)
        return
    assert target is not None
    target.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is an error before the work
    scratch = None if before is None else tempfile.TemporaryDirectory(prefix="edgekit-replay-")
    work = Path(scratch.name) if scratch else states.folder()
    with progress() as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            task = tasks.get(what)
            if task is None or bar.tasks[task].total != total or done < bar.tasks[task].completed:
                task = tasks[what] = bar.add_task(f"  {what}", total=total)
            bar.update(task, completed=done, visible=done < total)

        if auto:
            from edgekit.compression.trials import Constraints
            from edgekit.search.auto import search

            constraints = Constraints(max_loss, max_size, max_latency)
            result = search(job, constraints, work, trials=trials, notify=note, progress=show)
            toml = recipe.to_toml(recipe.of_bundle(result.bundle)).encode()
            result = replace(result, bundle=with_files(result.bundle, {"recipe.toml": toml}))
        else:
            result = run(job, work, notify=note, progress=show)
        if max_size is not None and not auto:
            result = narrowed(job, result, max_size, work, notify=note, progress=show)
    if not result.summary.fits:
        raise EdgekitError(
            f"the result does not fit on {device} at batch size {result.summary.memory_batch}: {result.memory}; "
            "declare smaller --batch sizes, or compress further. Nothing was written"
        )
    bundle = result.save(target, force=force)
    states.prune(work)
    _show_result(result, bundle, target, as_json)
    if before is not None:
        same = all(bundle.contents.get(name) == before.contents.get(name) for name in (WEIGHTS, GRAPH, GOLDEN))
        note(f"replayed: {'identical to' if same else 'NOT the same bytes as'} {original}")
        if not same:
            raise EdgekitError(
                f"the passes of {original} gave other bytes here; versions then: {before.manifest.versions}, now: "
                f"{bundle.manifest.versions}; see that the data and the number of threads are the same too"
            )


def default_metric(manifest: Any) -> str:
    """Probabilities are measured by their log-loss; of other outputs nothing is known but what the original gives."""
    return "log-loss" if manifest.outputs[0].name == "probabilities" else "relative-error"


def _show_plan(planned: Sequence[tuple[Step, list[Change]]], as_json: bool) -> None:
    if as_json:
        plain = [(step, [asdict(change) for change in changes]) for step, changes in planned]
        print_json([{"pass": step.name, "parameters": dict(step.parameters), "plan": rows} for step, rows in plain])
        return
    for number, (step, changes) in enumerate(planned, start=1):
        given = ", ".join(f"{name} = {value}" for name, value in step.parameters.items())
        print_table(
            ["tensor", "before", "after"],
            [[change.tensor, change.before, change.after] for change in changes],
            title=f"{number}. {step.name}: {given}",
        )
        output.print()
    output.print("Nothing was changed: this was a dry run.")


def _show_result(result: Result, bundle: Bundle, path: Path, as_json: bool) -> None:
    """bundle: as it was written."""
    packed, original = result.packed_bytes, result.source_packed_bytes
    if as_json:
        print_json(
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
    print_table(["pass", "verdict", "quality", "packed bytes", speed, "reason"], rows)
    output.print(f"\n{path}: {original:,} to {packed:,} bytes packed")
    output.print(f"report: {path}/report.html")


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
    print_table(["recipe", "loss", "packed bytes", "times as fast", ""], best, title=title)
    output.print()


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
