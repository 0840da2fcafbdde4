"""Show the stream's progress: a dashboard on a terminal, or a line in a log from time to time.

Rates and latencies are those of the last `WINDOW` seconds, because percentiles since the start would hide the current
state.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from alert_broker.stream.health import STUCK_AFTER, health, readiness
from alert_broker.stream.logs import LOGGER
from alert_broker.stream.stats import SECONDS, Histogram, Snapshot, Stats

REFRESH, EVERY = 0.5, 10.0  # seconds between two refreshes of the dashboard, and between two lines
WINDOW = 30.0
MAX_ROWS = 8  # rows of a table; one more row counts the rest
BAR = 12  # characters
FATES = ("published", "filtered", "dead_lettered")
QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class View:
    """A snapshot and an earlier one. Rates and latencies are taken between the two."""

    now: Snapshot
    before: Snapshot

    @property
    def seconds(self) -> float:
        return self.now.uptime - self.before.uptime

    def rate(self, column: str) -> float:
        """Return the alerts per second in a column of the ledger. If the column fell, because partitions were revoked,
        the rate is 0."""
        change = getattr(self.now.ledger.total(), column) - getattr(self.before.ledger.total(), column)
        return max(change, 0) / self.seconds if self.seconds > 0 else 0.0

    def recent(self, stage: str) -> Histogram:
        """Return a stage's times between the two snapshots."""
        new = self.now.stages[stage]
        old = self.before.stages.get(stage) or Histogram(new.bounds)  # a stage may be added while models are opened
        counts = [after - before for after, before in zip(new.counts, old.counts, strict=True)]
        return Histogram(new.bounds, counts, new.total - old.total)

    @property
    def state(self) -> tuple[str, str]:
        """The state as text, and its colour."""
        good, answer = health(self.now, STUCK_AFTER)
        if not good:
            return f"STUCK: {answer['reason']}", "bold red"
        ready, reply = readiness(self.now, STUCK_AFTER)
        if not ready:
            return str(reply["reason"]), "yellow"
        if self.now.paused:
            return "paused by back-pressure", "yellow"
        return ("running", "green") if answer["lag"] or answer["in_flight"] else ("up to date", "green")


@contextmanager
def show(
    stats: Stats, interactive: bool | None = None, *, console: Console | None = None, every: float = EVERY
) -> Iterator[None]:
    """Show the stream's progress until the block ends: a dashboard if `interactive`, else a line every so many seconds.

    Both go to standard error. By default the display is interactive if standard error is a terminal. Lines are logged
    if `logs.configure` was called.
    """
    console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
    if console.is_terminal if interactive is None else interactive:
        # text that is printed meanwhile appears above the dashboard, unless it goes to a file
        with Live(console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()) as live:

            def draw(view: View) -> None:
                live.update(dashboard(view, console), refresh=True)

            with _repeating(stats, draw, REFRESH):
                yield
    else:
        logger = logging.getLogger(LOGGER)

        def write(view: View) -> None:
            if logger.handlers:  # the logger writes it in the form of the other lines, such as JSON
                logger.info(line(view))
            else:
                console.print(line(view), soft_wrap=True)

        with _repeating(stats, write, every):
            yield


@contextmanager
def _repeating(stats: Stats, draw: Callable[[View], None], seconds: float) -> Iterator[None]:
    """Draw in a thread of its own, every so many seconds and once at the end."""
    ended = Event()
    seen = deque([stats.snapshot()])

    def look() -> None:
        seen.append(stats.snapshot())
        while len(seen) > 2 and seen[1].uptime < seen[-1].uptime - WINDOW:
            seen.popleft()
        draw(View(seen[-1], seen[0]))

    def work() -> None:
        while not ended.wait(seconds):
            look()

    thread = Thread(target=work, name="dashboard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


def line(view: View) -> str:
    """Return the state in one line of plain text."""
    now, total = view.now, view.now.ledger.total()
    latency = view.recent("end-to-end")
    parts = [
        f"{_duration(now.uptime)} {view.state[0]}",
        f"{view.rate('consumed'):,.0f} alerts/s",
        f"lag {_lag(now):,}",
        f"consumed {total.consumed:,} = published {total.published:,} + filtered {total.filtered:,}"
        f" + dead-lettered {total.dead_lettered:,} + in flight {total.in_flight:,}",
        f"revoked {total.revoked:,}" if total.revoked else "",
        f"expired {total.expired:,}" if total.expired else "",
        f"p99 {_time(latency.quantile(0.99), at_most='at most ')}" if latency.count else "",
    ]
    return ", ".join(part for part in parts if part)


def dashboard(view: View, console: Console) -> RenderableType:
    """Return the dashboard, with as many rows in its tables as fit on the terminal."""
    pictures = (_picture(view, rows) for rows in range(MAX_ROWS, 1, -1))
    for picture in pictures:
        if len(console.render_lines(picture)) < console.height:
            break
    return picture


def _picture(view: View, rows: int) -> RenderableType:
    now, (state, colour) = view.now, view.state
    models = ", ".join(f"{name} {digest[:12]}" for name, digest in now.models.items()) or "no model yet"
    head = Table.grid(expand=True)
    head.add_column()
    head.add_column(justify="right")
    head.add_row(Text(state, style=colour), Text(f"{models}   up {_duration(now.uptime)}", style="dim"))
    queues = ", ".join(f"{name} {number}" for name, number in now.queue_depths.items())
    waiting = f"batches waiting: {queues}; " if queues else ""
    window = Text(f"{waiting}rates and times of the last {view.seconds:.0f} s", style="dim")
    lower = [_partitions(view, rows), _counts("most probable class", now.classes, rows)]
    lower.append(_counts("dead letters", now.reasons, rows))
    side_by_side = [
        Columns(tables, padding=(0, 2, 1, 0))
        for part in ([_ledger(view), _latencies(view)], lower)
        if (tables := [table for table in part if table.row_count])
    ]
    return Group(head, Rule(window, align="right", style="dim"), side_by_side[0], "", *side_by_side[1:])


def _ledger(view: View) -> Table:
    """Return a table: consumed = published + filtered + dead-lettered + in flight."""
    table = _table("", "alerts", "per s")
    total = view.now.ledger.total()
    for column in ("consumed", *FATES):
        sign = " " if column == "consumed" else "=" if column == FATES[0] else "+"
        name = Text(
            f"{sign} {column.replace('_', '-')}",
            "bold red" if column == "dead_lettered" and total.dead_lettered else "",
        )
        table.add_row(name, f"{getattr(total, column):,}", f"{view.rate(column):,.0f}")
    table.add_row("+ in flight", f"{total.in_flight:,}")
    if total.revoked:
        table.add_row(Text("  revoked", "dim"), f"{total.revoked:,}")
    if total.expired:
        table.add_row(Text("  expired", "bold red"), f"{total.expired:,}")
    table.add_row(Text("  lag", "bold"), f"{_lag(view.now):,}")
    return table


def _latencies(view: View) -> Table:
    table = _table("at most", *(f"p{share * 100:.0f}" for share in QUANTILES))
    for stage in view.now.stages:
        recent = view.recent(stage)
        times = [_time(recent.quantile(share)) if recent.count else "-" for share in QUANTILES]
        style = "bold" if stage == "end-to-end" else ""
        table.add_row(Text(stage, style), *times)
    return table


def _partitions(view: View, rows: int) -> Table:
    """Return a table of the partitions, those with the largest lag first."""
    now = view.now
    table = _table("partition", "lag", "consumed", "in flight")
    known = sorted(now.lag.keys() | now.ledger.entries.keys(), key=lambda at: (-now.lag.get(at, 0), at))
    for at in known[:rows]:
        entry = now.ledger.entries.get(at)
        numbers = [f"{entry.consumed:,}", f"{entry.in_flight:,}"] if entry else ["0", "0"]
        table.add_row(f"{at[0]}[{at[1]}]", f"{now.lag[at]:,}" if at in now.lag else "not ours", *numbers)
    if len(known) > rows:
        table.add_row(Text(f"and {len(known) - rows} more", style="dim"))
    return table


def _counts(title: str, counts: Counter[str], rows: int, width: int = 44) -> Table:
    table = _table(title, "alerts", "")
    total = counts.total()
    for name, number in counts.most_common(rows):
        # reasons quote damaged packets
        clean = "".join(character if character.isprintable() else "?" for character in name)
        short = clean if len(clean) <= width else clean[: width - 1] + "…"
        table.add_row(Text(short), f"{number:,}", Text("█" * math.ceil(BAR * number / total), style="cyan"))
    if len(counts) > rows:
        rest = total - sum(number for _, number in counts.most_common(rows))
        table.add_row(Text(f"{len(counts) - rows} more", style="dim"), f"{rest:,}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    return table


def _lag(now: Snapshot) -> int:
    return sum(max(number, 0) for number in now.lag.values())


def _time(bound: float, at_most: str = "") -> str:
    """Return a bucket's upper bound as text."""
    if math.isinf(bound):
        return f"> {SECONDS[-1]:g} s"
    return f"{at_most}{bound:g} s" if bound >= 1 else f"{at_most}{bound * 1000:g} ms"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
