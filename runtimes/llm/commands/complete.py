"""edgekit llm complete"""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from edgekit.cli.console import print_json, printable
from runtimes.llm.commands.options import EngineOptions, of_engine, of_sampling, opened

EXAMPLE = """\b
Examples:
  edgekit llm complete smollm2 "The three primary colours are" --max-tokens 20
  cat story.txt | edgekit llm complete model.gguf - --temperature 0.8 --seed 3
  edgekit llm complete smollm2 "Jupiter as JSON: " --json-schema planet.json
  edgekit llm complete smollm2 "A name for a cat:" --temperature 1 -n 5 --max-tokens 8 --logprobs 3 --json
"""


@click.command(epilog=EXAMPLE)
@click.argument("model")
@click.argument("prompt")
@of_sampling
@click.option(
    "-n", "--answers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Number of answers to write."
)
@click.option(
    "--logprobs", type=click.IntRange(0, 1000), help="With --json: log p of each token, and of this many best ones."
)
@of_engine
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def complete(
    model: str,
    prompt: str,
    answers: int,
    logprobs: int | None,
    engine: EngineOptions,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Write how MODEL (a .gguf file, a folder that transformers saved, or an installed model) continues PROMPT; "-"
    reads it from standard input."""
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs needs --json, which prints them")
    text = sys.stdin.read() if prompt == "-" else prompt
    with opened(model, engine) as found:
        started = time.perf_counter()
        if answers == 1 and not as_json:
            for piece in found.complete(text, **options):
                click.echo(printable(piece, keep="\n\t"), nl=False)
            click.echo()
            return
        written = found.answers(text, n=answers, logprobs=logprobs or 0, **options)
        seconds = time.perf_counter() - started
        if as_json:
            rows = [answer.as_json(found.tokenizer, logprobs is not None) for answer in written]
            print_json({"model": found.name, "text": written[0].text, "answers": rows, "seconds": seconds})
            return
    for number, answer in enumerate(written, 1):
        click.echo(f"--- answer {number}, seed {options['sampling'].seed + number - 1}")
        click.echo(printable(answer.text, keep="\n\t"))
