"""edgekit llm: run language models. Each verb is a module of this package."""

from __future__ import annotations

import click

from edgekit.cli import LazyGroup

VERBS = {
    verb: f"runtimes.llm.commands.{verb}:{verb}"
    for verb in ("complete", "chat", "choose", "perplexity", "bench", "compress")
}


@click.group(cls=LazyGroup, lazy=VERBS)
def llm() -> None:
    """Run language models on this machine: GGUF files, and folders that transformers saved."""
