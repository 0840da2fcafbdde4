"""edgekit llm bench"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from edgekit.cli.console import note, output, print_json, print_table, progress
from runtimes.llm.commands.options import EngineOptions, of_engine, opened

if TYPE_CHECKING:
    from runtimes.llm.engine import Engine
    from runtimes.llm.measure import Speed
    from runtimes.llm.model import LanguageModel

PEER = "llamacpp"

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
    """Measure MODEL's speed: tokens per second of a prompt, and of answers behind different numbers of tokens. If
    llama.cpp is installed, it is timed in turns with the engine."""
    from edgekit.cli.console import batch_sizes
    from edgekit.machine import describe
    from runtimes.llm.measure import measure_in_turns

    lengths = batch_sizes(contexts)
    with opened(model, engine if engine.context else replace(engine, context=max(lengths) + 256)) as found:
        engines = {engine.name: found.engine} | ({} if engine.name == PEER else _peer(found, engine.threads))
        with progress() as bar:
            task = bar.add_task("  timing", total=len(lengths))
            rows: list[tuple[str, Speed]] = []
            for length in lengths:
                rows += zip(engines, measure_in_turns(list(engines.values()), length, rounds), strict=True)
                bar.advance(task)
        for other in list(engines.values())[1:]:
            other.close()
        if as_json:
            found_rows = [{"engine": name, **row.as_json()} for name, row in rows]
            print_json({"model": found.name, "machine": describe(), "engine": engine.name, "rows": found_rows})
            return
    print_table(
        ["engine", "context", "prompt tokens/s", "answer tokens/s", "median ms", "of the memory bound"],
        [
            [
                name,
                f"{row.context:,}",
                f"{row.prompt_rate:,.0f}",
                f"{1 / row.seconds:,.0f}",
                f"{row.seconds * 1e3:.2f}",
                "" if row.bound_share is None else f"{row.bound_share:.0%}",
            ]
            for name, row in rows
        ],
    )
    output.print(
        "\nEach token of an answer reads all weights and the cache once. The bound is how fast one thread can."
    )


def _peer(model: LanguageModel, threads: int | None) -> dict[str, Engine]:
    """Return llama.cpp with the same file and as long a cache; none, and a note, if it is not here or refuses it."""
    from edgekit.errors import EdgekitError
    from runtimes.llm.blocks import blocks_for
    from runtimes.llm.model import open_engine

    options = {"blocks": blocks_for(model.context), "threads": threads}
    try:
        return {PEER: open_engine(PEER, model.source.model, options)}
    except EdgekitError as error:
        note(f"llama.cpp is not beside it: {error}")
        return {}
