"""edgekit llm perplexity"""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.console import output, print_json, steps
from runtimes.llm.commands.options import EngineOptions, of_engine, opened

EXAMPLE = """\b
Example:
  edgekit llm perplexity smollm2 LICENSE --window 512
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.argument("file", type=Path)
@click.option("--window", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a window.")
@of_engine
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def perplexity(
    model: str,
    file: Path,
    window: int,
    engine: EngineOptions,
    as_json: bool,
) -> None:
    """Measure how well MODEL predicts a text FILE: the smaller the perplexity, the better. The text is cut into
    windows, and each is read alone."""
    from edgekit.data.text import read_text

    text = read_text(file)
    with opened(model, engine) as found, steps() as show:
        result = found.perplexity(text, window, lambda done, rows: show(f"{file}: tokens", done, rows))
        if as_json:
            print_json({"model": found.name, "perplexity": result.value, "tokens": result.tokens, "window": window})
        else:
            output.print(f"perplexity {result.value:.3f} over {result.tokens:,} tokens, in windows of {window:,}")
