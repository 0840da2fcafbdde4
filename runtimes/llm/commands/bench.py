"""edgekit llm bench"""

from __future__ import annotations

from dataclasses import replace

import click

from edgekit.cli.console import output, print_json, print_table, progress
from runtimes.llm.commands.options import EngineOptions, of_engine, opened

EXAMPLE = """\b
Examples:
  edgekit llm bench smollm2 --threads 1
  edgekit llm bench model.gguf --contexts 128,2048 --json
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.option("--contexts", default="128,512,2048", show_default=True, help="Tokens before those that are timed.")
@click.option("--rounds", type=click.IntRange(min=3), default=15, show_default=True, help="Timings of each step.")
@of_engine
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    model: str,
    contexts: str,
    rounds: int,
    engine: EngineOptions,
    as_json: bool,
) -> None:
    """Measure MODEL's speed: tokens per second of a prompt, and of answers behind different numbers of tokens."""
    from edgekit.cli.console import batch_sizes
    from edgekit.machine import describe
    from runtimes.llm.measure import measure

    lengths = batch_sizes(contexts)
    with opened(model, engine if engine.context else replace(engine, context=max(lengths) + 256)) as found:
        with progress() as bar:
            task = bar.add_task("  timing", total=len(lengths))
            rows = []
            for length in lengths:
                rows.append(measure(found.engine, length, rounds))
                bar.advance(task)
        if as_json:
            found_rows = [row.as_json() for row in rows]
            print_json({"model": found.name, "machine": describe(), "engine": engine.name, "rows": found_rows})
            return
    print_table(
        ["context", "prompt tokens/s", "answer tokens/s", "median ms", "of the memory bound"],
        [
            [
                f"{row.context:,}",
                f"{row.prompt_rate:,.0f}",
                f"{1 / row.seconds:,.0f}",
                f"{row.seconds * 1e3:.2f}",
                "" if row.bound_share is None else f"{row.bound_share:.0%}",
            ]
            for row in rows
        ],
    )
    output.print(
        "\nEach token of an answer reads all weights and the cache once. The bound is how fast one thread can."
    )
