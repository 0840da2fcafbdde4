"""edgekit bench"""

from __future__ import annotations

from typing import Any

import click

from edgekit.cli.console import batch_sizes, output, print_json, print_table, progress

EXAMPLE = """\b
Examples:
  edgekit bench t2-gr
  edgekit bench t2-gr --vs t2.edge --batch 1,16,1000
  edgekit bench model.onnx --vs model.int8.onnx --threads 1 --json
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.option("--vs", "others", multiple=True, help="Another model to time beside it; repeat for more.")
@click.option("--batch", "batches", default="1,16,256", show_default=True, help="Batch sizes.")
@click.option("--runtime", default="onnxruntime", show_default=True, help="Runtime to time them on.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each.")
@click.option("--seconds", type=click.FloatRange(min=0.05), default=3.0, show_default=True, help="For a batch size.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    model: str, others: tuple[str, ...], batches: str, runtime: str, threads: int, seconds: float, as_json: bool
) -> None:
    """Time MODEL (a bundle, a model's name or an .onnx file), beside others in turns in one run.

    Times are of a whole call. The ratio is the first model's time by this one's, paired call by call, with its 95 %
    interval: more is faster. The share of the roofline is the least time that this machine's measured rates allow for
    the graph's float32 operations and bytes, by the CPU time it took; int8 may pass 100 %.
    """
    from edgekit import machine
    from edgekit.bench import compare
    from edgekit.zoo import resolve

    names = [model, *others]
    bundles = [resolve(name) for name in names]
    sizes = batch_sizes(batches)
    with progress() as bar:
        task = bar.add_task("batch sizes", total=len(sizes))

        def show(done: int) -> None:
            bar.update(task, completed=done)

        rows = compare(names, bundles, sizes, runtime=runtime, threads=threads, seconds=seconds, progress=show)
    facts: dict[str, Any] = {"machine": machine.describe(), "runtime": runtime, "threads": threads}
    if as_json:
        from dataclasses import asdict

        print_json({**facts, "results": [asdict(row) for row in rows]})
        return
    output.print(f"{facts['machine']['cpu']}, {facts['machine']['cores']} cores; {runtime}, {threads} thread(s) each\n")
    print_table(
        ["batch", "model", "p50 ms", "p90 ms", "p99 ms", "CPU p50 ms", "times as fast", "95 %", "roofline"],
        [
            [row.batch, row.model, f"{row.p50_ms:.3f}", f"{row.p90_ms:.3f}", f"{row.p99_ms:.3f}",
             f"{row.cpu_p50_ms:.3f}", f"{row.speedup:.2f}", f"{row.speedup_low:.2f} to {row.speedup_high:.2f}",
             f"{row.roofline:.0%}" if row.roofline is not None else "-"]
            for row in rows
        ],
    )  # fmt: skip
