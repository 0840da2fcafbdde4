"""Options that the commands of language models share, and how they open a model."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.console import note
from edgekit.data.text import read_text
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from runtimes.llm.model import LanguageModel


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user says of the engine; None leaves it to the engine."""

    name: str
    context: int | None
    kv: str | None
    threads: int | None
    weights: str | None = None
    weights_memory: str | None = None
    gpu_layers: int | None = None


def of_engine(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an engine, which the command gets as one `engine: EngineOptions`."""

    @functools.wraps(command)
    def collected(*, engine: str, **options: Any) -> Any:
        given = {item.name: options.pop(item.name) for item in fields(EngineOptions)[1:]}
        return command(engine=EngineOptions(engine, **given), **options)

    for option in (
        click.option(
            "--gpu-layers",
            type=click.IntRange(min=-1),
            help="Of llama.cpp: layers on the GPU, -1 for all [default: 0].",
        ),
        click.option(
            "--weights-memory", metavar="SIZE", help="Most memory for weights of the native engine, such as 2GB."
        ),
        click.option(
            "--weights",
            help="How the native engine stores matrices of floats: kept or q8_0 [default: q8_0 for folders].",
        ),
        click.option(
            "--threads", type=click.IntRange(1, 256), help="Of native and llamacpp [default: one for each core]."
        ),
        click.option(
            "--kv",
            help="How the cache stores keys and values. native: f16, int8 or int4 [default: f16]; llamacpp: f16, q8_0 "
            "or q4_0 [default: f16]; torch: also gear, h2o and other policies, perhaps with options, such as "
            "h2o:budget=256 [default: full].",
        ),
        click.option("--context", type=click.IntRange(min=1), help="Tokens of the cache [default: 4096]."),
        click.option(
            "--engine",
            default="native",
            show_default=True,
            help="native (C), torch (the reference) or llamacpp (a library that others have built).",
        ),
    ):
        collected = option(collected)
    return collected


def of_sampling(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of answers, which the command gets as `options`, as `LanguageModel.complete` takes them."""

    @functools.wraps(command)
    def collected(
        *,
        max_tokens: int,
        stop: tuple[str, ...],
        json_schema: Path | None,
        regex: str | None,
        drafts: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition: float,
        seed: int,
        **others: Any,
    ) -> Any:
        from runtimes.llm.sampling import Sampling

        options = {
            "most_tokens": max_tokens,
            "sampling": Sampling(temperature, top_k, top_p, min_p, repetition, seed),
            "stop": stop,
            "json_schema": read_schema(json_schema),
            "regex": regex,
            "drafts": drafts,
        }
        return command(options=options, **others)

    for option in (
        click.option(
            "--drafts",
            type=click.IntRange(min=0),
            default=8,
            show_default=True,
            help="Most tokens that a step guesses from the text before and verifies; 0: none.",
        ),
        click.option("--regex", help="The answer matches this regular expression (Rust's syntax)."),
        click.option("--json-schema", type=Path, metavar="FILE", help="The answer is JSON that obeys this schema."),
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
        collected = option(collected)
    return collected


def read_schema(path: Path | None) -> dict[str, Any] | None:
    """Return the JSON schema of a file."""
    if path is None:
        return None
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise EdgekitError(f"{path}: no JSON ({error}); expected a JSON schema, which is an object") from None
    if not isinstance(found, dict):
        raise EdgekitError(f"{path}: the JSON is a {type(found).__name__}; expected a JSON schema, which is an object")
    return found


@contextlib.contextmanager
def opened(model: str, engine: EngineOptions) -> Iterator[LanguageModel]:
    """Load a model for a command, and free it afterwards."""
    from runtimes.llm.model import load

    note(f"loading {model}")
    options = {name: value for name, value in asdict(engine).items() if name != "name" and value is not None}
    with load(model, engine=engine.name, **options) as found:
        yield found
