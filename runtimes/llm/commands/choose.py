"""edgekit llm choose"""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.console import print_json, print_table
from runtimes.llm.commands.options import EngineOptions, of_engine, opened

EXAMPLE = """\b
Example:
  edgekit llm choose smollm2 "The capital of France is" --items cities.txt --best 3
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.argument("prompt")
@click.option("--items", type=Path, required=True, metavar="FILE", help="A text file with an item on each line.")
@click.option("--best", type=click.IntRange(min=1), default=1, show_default=True, help="How many items to print.")
@of_engine
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def choose(
    model: str,
    prompt: str,
    items: Path,
    best: int,
    engine: EngineOptions,
    as_json: bool,
) -> None:
    """Find the items of a catalogue that MODEL finds most probable behind PROMPT. A space goes before each item, and a
    line end behind it."""
    from edgekit.data.text import read_text

    names = [line.strip() for line in read_text(items).splitlines() if line.strip()]
    with opened(model, engine) as found:
        rows = found.best_items(prompt, [f" {name}\n" for name in names], most=best)
        if as_json:
            chosen = [{"item": names[index], "logprob": logprob} for index, logprob in rows]
            print_json({"model": found.name, "items": chosen})
            return
    print_table(["item", "log probability"], [[names[index], f"{logprob:.3f}"] for index, logprob in rows])
