"""edgekit llm chat"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgekit.cli.console import printable
from runtimes.llm.commands.options import of_engine, of_sampling, opened, read_schema

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
    engine: str,
    context: int | None,
    kv: str | None,
    threads: int | None,
    max_tokens: int,
    stop: tuple[str, ...],
    json_schema: Path | None,
    regex: str | None,
    drafts: int,
    **sampling: Any,
) -> None:
    """Talk with MODEL (a .gguf file or an installed model). Each line of standard input is a message; an empty line or
    the end of the input ends the conversation."""
    from runtimes.llm.sampling import Sampling

    chosen = Sampling(**sampling)
    schema = read_schema(json_schema)
    messages = [{"role": "system", "content": system}] if system else []
    with opened(model, engine, context, kv, threads) as found:
        while line := _next_line():
            messages.append({"role": "user", "content": line})
            pieces = []
            for piece in found.chat(
                messages,
                most_tokens=max_tokens,
                sampling=chosen,
                stop=stop,
                json_schema=schema,
                regex=regex,
                drafts=drafts,
            ):
                pieces.append(piece)
                click.echo(printable(piece, keep="\n\t"), nl=False)
            click.echo()
            messages.append({"role": "assistant", "content": "".join(pieces)})


def _next_line() -> str:
    """Return the next message without its line end; "" at the end."""
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    return sys.stdin.readline().strip()
