"""Options that the commands of language models share, and how they open a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekit.cli.console import note

if TYPE_CHECKING:
    from runtimes.llm.model import LanguageModel

Command = TypeVar("Command", bound=Callable[..., Any])


def of_engine(command: Command) -> Command:
    """Add the options of an engine."""
    for option in (
        click.option(
            "--threads", type=click.IntRange(1, 256), help="Of the native engine [default: one for each core]."
        ),
        click.option(
            "--kv", help="How the native engine's cache stores keys and values: f16, int8 or int4 [default: f16]."
        ),
        click.option("--context", type=click.IntRange(min=1), help="Tokens of the cache [default: 4096]."),
        click.option("--engine", default="native", show_default=True, help="native (C) or torch (the reference)."),
    ):
        command = option(command)
    return command


def of_sampling(command: Command) -> Command:
    """Add the options that choose tokens."""
    for option in (
        click.option("--stop", multiple=True, help="A text that ends the answer; may be repeated."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random numbers."),
        click.option("--repetition", type=float, default=1.0, show_default=True, help="Penalty for earlier tokens."),
        click.option("--min-p", type=float, default=0.0, show_default=True, help="Least share of the best token's p."),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Choose among tokens of this sum of p."
        ),
        click.option("--top-k", type=int, default=0, show_default=True, help="Choose among so many; 0: among all."),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the most probable token."),
        click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of an answer."),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def opened(
    model: str, engine: str, context: int | None, kv: str | None, threads: int | None
) -> Iterator[LanguageModel]:
    """Load a model for a command, and free it afterwards."""
    from runtimes.llm.model import load

    note(f"loading {model}")
    given = {"kv": kv, "threads": threads}
    options = {name: value for name, value in given.items() if value is not None}
    with load(model, engine=engine, context=context, **options) as found:
        yield found
