"""Functions that the commands on alerts share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from edgekit.errors import missing_extra

MEGABYTE = 1_000_000
EXTRA_OF = {"confluent_kafka": "stream"}  # packages that the extra `alerts` does not install


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Provide a function that returns true after Ctrl-C or SIGTERM. A second signal raises KeyboardInterrupt."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def alert_packages() -> Iterator[None]:
    """Name the extra to install if an import fails because a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = str(error.name)
        raise missing_extra(name, EXTRA_OF.get(name, "alerts"), "working with alerts") from None


def key_values(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """Return the pairs NAME=VALUE as a dictionary. An error does not show the value, which may be a secret."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.UsageError(f"{flag}: expected NAME=VALUE, got a text of another form")
        values[name] = value
    return values
