"""Output that commands share: tables, progress, JSON."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def printable(value: object, keep: str = "") -> str:
    """Return the value as text, with each character escaped that could move the cursor, end the line, change colors,
    reverse the order of letters, or be no character at all: names in files and messages of strangers may contain any.
    keep: characters that stay as they are."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        letter if letter in keep or letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


class PlainConsole(Console):
    """A console that prints names of strangers harmlessly, in messages and in cells of tables."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n\t"), **options)


# Without markup and emoji, a path such as data[1].npz or a reason in brackets is printed unchanged.
output = PlainConsole(highlight=False, soft_wrap=True, markup=False, emoji=False)
status = PlainConsole(stderr=True, highlight=False, markup=False, emoji=False)
NUMBER = re.compile(r"[+\-<>~]?[\d,./]+ ?[%x]?")


def progress(*, enabled: bool = True) -> Progress:
    """Return a progress bar on standard error; it draws nothing if standard error is not a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=status, transient=True, disable=not (enabled and status.is_terminal))


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """Provide a function (what, done, total) that shows the progress of work with several parts, a bar for each
    part."""
    with progress() as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            task = tasks.get(what)
            if task is None or bar.tasks[task].total != total or done < bar.tasks[task].completed:
                task = tasks[what] = bar.add_task(f"  {what}", total=total)
            bar.update(task, completed=done, visible=done < total)

        yield show


def note(message: str) -> None:
    """Print a line on standard error, for the user and not for a pipe."""
    status.print(printable(message), markup=False)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Return the numbers of a text such as '1,16,256'."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"--batch {text!r}: expected whole numbers such as 1,16,256") from None
    if min(sizes) < 1:
        raise click.UsageError(f"--batch {text!r}: expected sizes of at least 1")
    return sizes


def print_json(value: Any) -> None:
    """Print a value as JSON without NaN."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """Print a plain table; columns of numbers are right-aligned."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, header in enumerate(headers):
        cells = [printable(row[number]) for row in rows]
        numeric = bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells if cell)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    output.print(table)
