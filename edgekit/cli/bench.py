"""edgekit bench"""

from __future__ import annotations

from typing import Any

import click

from edgekit.cli.console import batch_sizes, output, print_json, print_table, steps

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
@click.option("--vs", "others", multiple=True, help="Another model to time beside it; repeat for more.")
@click.option("--batch", "batches", default="1,16,256", show_default=True, help="Batch sizes.")
@click.option("--runtime", default="onnxruntime", show_default=True, help="Runtime to time them on.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each.")
@click.option("--seconds", type=click.FloatRange(min=0.05), default=3.0, show_default=True, help="For a batch size.")
@click.option("--target", "target_name", help="Estimate the model on this device; measure it, if it is this machine.")
@click.option("--precision", help="With --target: what float32 operators run in.  [default: the target's plan]")
@click.option("--power", help="With --target: one of the device's power modes.")
@click.option("--layers", is_flag=True, help="With --target: every operator, not one line for each kind.")
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
    """Time MODEL (a bundle, a model's name or an .onnx file), beside others in turns in one run.

    Times are of a whole call. The ratio is the first model's time by this one's, paired call by call, with its 95 %
    interval: more is faster. The share of the roofline is the least time that this machine's measured rates allow for
    the graph's float32 operations and bytes, by the CPU time it took; int8 may pass 100 %.

    With --target, operator by operator: an estimate from the device's data sheet, labelled so, with its formula; where
    the device is this machine, measured times beside the estimate. And whether the model fits into its memory.
    """
    from edgekit import machine
    from edgekit.compression.bench import bench as run_bench

    if target_name is None and (precision or power or layers):
        raise click.UsageError("--precision, --power and --layers go with --target NAME")
    if target_name is not None and runtime != "onnxruntime":
        raise click.UsageError(f"--runtime {runtime}: with --target, models are estimated, or measured on onnxruntime")
    names = [model, *others]
    sizes = batch_sizes(batches)
    if target_name is not None:
        _on_target(names, sizes, target_name, precision, power, threads, seconds, layers, as_json)
        return
    with steps() as show:
        rows = run_bench(
            names,
            batches=sizes,
            runtime=runtime,
            threads=threads,
            seconds=seconds,
            progress=lambda done: show("batch sizes", done, len(sizes)),
        )
    facts: dict[str, Any] = {"machine": machine.describe(), "runtime": runtime, "threads": threads}
    if as_json:
        from dataclasses import asdict

        print_json({**facts, "results": [asdict(row) for row in rows]})
        return
    output.print(f"{facts['machine']['cpu']}, {facts['machine']['cores']} cores; {runtime}, {threads} thread(s) each\n")
    print_table(
        ["batch", "model", "p50 ms", "p90 ms", "p99 ms", "CPU p50 ms", "times as fast", "95 %", "roofline"],
        [
            [
                row.batch,
                row.model,
                f"{row.p50_ms:.3f}",
                f"{row.p90_ms:.3f}",
                f"{row.p99_ms:.3f}",
                f"{row.cpu_p50_ms:.3f}",
                f"{row.speedup:.2f}",
                f"{row.speedup_low:.2f} to {row.speedup_high:.2f}",
                f"{row.roofline:.0%}" if row.roofline is not None else "-",
            ]
            for row in rows
        ],
    )


def _on_target(
    names: list[str],
    sizes: tuple[int, ...],
    target_name: str,
    precision: str | None,
    power: str | None,
    threads: int,
    seconds: float,
    layers: bool,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from edgekit import machine
    from edgekit.compression.bench import on_target
    from edgekit.targets import profile
    from edgekit.targets.local import is_here

    target = profile.find(target_name)
    local = is_here(target)
    if local and (precision or power or threads != 1):
        raise click.UsageError(
            f"{target.name} is this machine, where the model is measured as it is, on one thread; leave --precision, "
            "--power and --threads out"
        )
    from edgekit.importers.files import resolve

    bundles = [resolve(name) for name in names]
    with steps() as show:
        options: dict[str, Any] = {"precision": precision, "power": power, "threads": threads, "seconds": seconds}
        reports = []
        for name, bundle in zip(names, bundles, strict=True):
            found = on_target(bundle, target, sizes, here=local, progress=show, **options)
            reports += [(name, report) for report in found]
    if as_json:
        results = [
            {
                "model": name,
                **asdict(report),
                "fits": report.memory.fits,
                "needed": report.memory.needed,
                "rows": [asdict(row) for row in (report.rows if layers else report.by_op_type())],
            }
            for name, report in reports
        ]
        facts = {"machine": machine.describe()} if local else {}
        print_json({"target": target.name, "measured_here": local, **facts, "results": results})
        return
    for name, report in reports:
        rows = report.rows if layers else report.by_op_type()
        where = f"measured on this machine ({machine.cpu_name()})" if local else "estimate, nothing was run there"
        threads_text = f", {threads} thread(s)" if target.kind == "cpu" else ""
        output.print(
            f"{name} on {target.name}{f' in mode {power}' if power else ''}, batch {report.batch}, {report.precision}"
            f"{threads_text}: {where}"
        )
        total = sum(row.measured or row.estimate for row in rows) or 1.0
        first = ["operator"] if layers else ["operator", "count"]
        print_table(
            [*first, *(["measured ms"] if local else []), "estimate ms", "of all", "roofline", "bound"],
            [
                [
                    row.name if layers else row.op_type,
                    *([] if layers else [row.count]),
                    *([_ms(row.measured)] if local else []),
                    _ms(row.estimate),
                    f"{(row.measured or row.estimate) / total:.0%}",
                    f"{row.roofline:.0%}",
                    row.bound,
                ]
                for row in rows
            ],
        )
        if report.measured is not None:
            output.print(f"sum: {_ms(report.measured)} ms measured, {_ms(report.estimate)} ms estimated")
        else:
            output.print(f"sum: {_ms(report.estimate)} ms estimated")
        output.print(f"estimate: {report.formula}")
        output.print(f"memory: {report.memory}")
        if report.unknown:
            output.print(f"not counted, their shapes are unknown: {', '.join(report.unknown)}")
        output.print()


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4f}"
