"""edgekit llm complete"""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from edgekit.cli.console import print_json, printable
from runtimes.llm.commands.options import of_engine, of_sampling, opened

EXAMPLE = """\b
Examples:
  edgekit llm complete smollm2 "The three primary colours are" --max-tokens 20
  cat story.txt | edgekit llm complete model.gguf - --temperature 0.8 --seed 3
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.argument("prompt")
@of_sampling
@of_engine
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def complete(
    model: str,
    prompt: str,
    engine: str,
    context: int | None,
    kv: str | None,
    threads: int | None,
    max_tokens: int,
    stop: tuple[str, ...],
    as_json: bool,
    **sampling: Any,
) -> None:
    """Write how MODEL (a .gguf file or an installed model) continues PROMPT; "-" reads it from standard input."""
    from runtimes.llm.sampling import Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    with opened(model, engine, context, kv, threads) as found:
        started = time.perf_counter()
        pieces = []
        for piece in found.complete(text, most_tokens=max_tokens, sampling=Sampling(**sampling), stop=stop):
            pieces.append(piece)
            if not as_json:
                click.echo(printable(piece, keep="\n\t"), nl=False)
        if as_json:
            print_json({"model": found.name, "text": "".join(pieces), "seconds": time.perf_counter() - started})
        else:
            click.echo()
