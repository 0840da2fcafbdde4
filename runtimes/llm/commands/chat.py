"""edgekit llm chat"""

from __future__ import annotations

import sys
from typing import Any

import click

from edgekit.cli.console import printable
from runtimes.llm.commands.options import EngineOptions, of_engine, of_sampling, opened

EXAMPLE = """\b
Examples:
  edgekit llm chat smollm2
  echo "Which planet is the largest?" | edgekit llm chat smollm2 --system "Answer in one sentence."
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.option("--system", help="A text that tells the model how to answer.")
@of_sampling
@of_engine
def chat(
    model: str,
    system: str | None,
    engine: EngineOptions,
    options: dict[str, Any],
) -> None:
    """Talk with MODEL (a .gguf file, a folder that transformers saved, or an installed model). Each line of standard
    input is a message; an empty line or the end of the input ends the conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    with opened(model, engine) as found:
        while line := _next_line():
            messages.append({"role": "user", "content": line})
            pieces = []
            for piece in found.chat(messages, **options):
                pieces.append(piece)
                click.echo(printable(piece, keep="\n\t"), nl=False)
            click.echo()
            messages.append({"role": "assistant", "content": "".join(pieces)})


def _next_line() -> str:
    """Return the next message without its line end; "" at the end."""
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    return sys.stdin.readline().strip()
