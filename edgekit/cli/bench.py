"""edgekit bench"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

import edgekit
from edgekit import machine
from edgekit.cli.console import batch_sizes, output, print_json, print_table, steps

if TYPE_CHECKING:
    from edgekit.compression.bench import Timing
    from edgekit.cost.layers import Report, Row

EXAMPLE = """\b
Examples:
  edgekit bench t2-gr
  edgekit bench t2-gr --vs t2.edge --batch 1,16,1000
  edgekit bench model.onnx --vs model.int8.onnx --threads 1 --json
  edgekit bench t2-gr --target tesla-p40 --batch 1,1000
  edgekit bench t2-gr --target x86-avx512 --layers
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.option("--vs", "others", multiple=True, help="Another model to time in the same run; repeat for more.")
@click.option("--batch", "batches", default="1,16,256", show_default=True, help="Batch sizes.")
@click.option("--runtime", default="onnxruntime", show_default=True, help="Runtime that runs the models.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each model.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.05), default=3.0, show_default=True, help="Seconds for each batch size."
)
@click.option(
    "--target", "target_name", help="Estimate the time on this device; if it is this machine, also measure it."
)
@click.option("--precision", help="With --target: the precision of float32 operators.  [default: the target's plan]")
@click.option("--power", help="With --target: one of the device's power modes.")
@click.option(
    "--layers", is_flag=True, help="With --target: print a line for each operator, not one for each operator type."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    model: str,
    others: tuple[str, ...],
    batches: str,
    runtime: str,
    threads: int,
    seconds: float,
    target_name: str | None,
    precision: str | None,
    power: str | None,
    layers: bool,
    as_json: bool,
) -> None:
    """Time MODEL (a bundle, a model's name or an .onnx file) and other models in turns in one run.

    Times are of a whole call. The ratio is the first model's time divided by this model's, paired call by call, with
    its 95 % interval: more is faster. The share of the roofline is the least time that this machine's measured rates
    allow for the graph's float32 operations and bytes, divided by the CPU time that the call took; it may exceed 100 %
    for int8.

    With --target, the command estimates the time of each operator from the device's data sheet, prints the formula and
    says whether the model fits into the device's memory. If the device is this machine, it also measures the times.
    """
    if target_name is None and (precision or power or layers):
        raise click.UsageError("--precision, --power and --layers go with --target NAME")
    if target_name is not None and runtime != "onnxruntime":
        raise click.UsageError(f"--runtime {runtime}: with --target, models are estimated, or measured on onnxruntime")
    names, sizes = [model, *others], batch_sizes(batches)
    options: dict[str, Any] = {"batches": sizes, "threads": threads, "seconds": seconds}
    with steps() as show:
        if target_name is not None:
            reports = edgekit.bench_target(
                names, target_name, precision=precision, power=power, progress=show, **options
            )
        else:
            rows = edgekit.bench(
                names, runtime=runtime, progress=lambda done: show("batch sizes", done, len(sizes)), **options
            )
    if target_name is None:
        _show_timings(rows, runtime, threads, as_json)
    elif as_json:
        _print_reports(reports, layers)
    else:
        for report in reports:
            _show_report(report, power, threads, layers)


def _show_timings(rows: list[Timing], runtime: str, threads: int, as_json: bool) -> None:
    facts: dict[str, Any] = {"machine": machine.describe(), "runtime": runtime, "threads": threads}
    if as_json:
        print_json({**facts, "results": [asdict(row) for row in rows]})
        return
    output.print(f"{facts['machine']['cpu']}, {facts['machine']['cores']} cores; {runtime}, {threads} thread(s) each\n")
    print_table(
        ["batch", "model", "p50 ms", "p90 ms", "p99 ms", "CPU p50 ms", "times as fast", "95 %", "roofline"],
        [
            [
                row.batch,
                row.model,
                *(f"{value:.3f}" for value in (row.p50_ms, row.p90_ms, row.p99_ms, row.cpu_p50_ms)),
                f"{row.speedup:.2f}",
                f"{row.speedup_low:.2f} to {row.speedup_high:.2f}",
                f"{row.roofline:.0%}" if row.roofline is not None else "-",
            ]
            for row in rows
        ],
    )


def _print_reports(reports: list[Report], layers: bool) -> None:
    local = reports[0].measured is not None
    facts = {"machine": machine.describe()} if local else {}
    results = [report.to_json(layers=layers) for report in reports]
    print_json({"target": reports[0].target, "measured_here": local, **facts, "results": results})


def _show_report(report: Report, power: str | None, threads: int, layers: bool) -> None:
    from edgekit.targets import profile

    local = report.measured is not None
    where = f"measured on this machine ({machine.cpu_name()})" if local else "estimate, nothing was run there"
    mode = f" in mode {power}" if power else ""
    threads_text = f", {threads} thread(s)" if profile.find(report.target).kind == "cpu" else ""
    output.print(
        f"{report.model} on {report.target}{mode}, batch {report.batch}, {report.precision}{threads_text}: {where}"
    )
    _show_rows(report.rows if layers else report.by_op_type(), local, layers)
    measured = f"{_ms(report.measured)} ms measured, " if local else ""
    output.print(f"sum: {measured}{_ms(report.estimate)} ms estimated")
    output.print(f"estimate: {report.formula}")
    output.print(f"memory: {report.memory}")
    if report.unknown:
        output.print(f"not counted, because their shapes are unknown: {', '.join(report.unknown)}")
    output.print()


def _show_rows(rows: tuple[Row, ...], local: bool, layers: bool) -> None:
    total = sum(row.measured or row.estimate for row in rows) or 1.0
    first = ["operator"] if layers else ["operator", "count"]
    print_table(
        [*first, *(["measured ms"] if local else []), "estimate ms", "of all", "roofline", "bound"],
        [
            [
                *([row.name] if layers else [row.op_type, row.count]),
                *([_ms(row.measured)] if local else []),
                _ms(row.estimate),
                f"{(row.measured or row.estimate) / total:.0%}",
                f"{row.roofline:.0%}",
                row.bound,
            ]
            for row in rows
        ],
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4f}"
