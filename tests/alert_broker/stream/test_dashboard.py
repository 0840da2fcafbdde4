"""The text on the screen."""

import io
import json
import re
import sys
import threading
from dataclasses import replace

import pytest
from rich.console import Console

from alert_broker.stream import logs
from alert_broker.stream.dashboard import View, dashboard, line, show
from alert_broker.stream.stats import STAGES, Stats
from tests.alert_broker.stream.sample import busy_stats
from tests.alert_broker.stream.waiting import wait_for


def screen(view: View, width: int = 100, height: int = 40) -> str:
    console = Console(width=width, height=height, file=io.StringIO(), markup=False, emoji=False, highlight=False)
    console.print(dashboard(view, console))
    return console.file.getvalue()


@pytest.fixture
def view() -> View:
    """Return a view of 4 seconds in which the numbers of `busy_stats` were doubled."""
    stats = busy_stats()
    before = replace(stats.snapshot(), uptime=3600.0)
    stats.ledger.add(("ztf", 0), consumed=400, published=360, filtered=36, dead_lettered=4)
    stats.observe("inference", 2.0, times=40)
    return View(replace(stats.snapshot(), uptime=3604.0), before)


def row(text: str, name: str) -> list[str]:
    """Return the numbers that follow a name."""
    return re.search(rf"{re.escape(name)} +(.*)", text)[1].split()


def test_the_account_and_its_rates(view):
    text = screen(view)
    assert row(text, "consumed")[:2] == ["1,650", "100"]
    assert row(text, "= published")[:2] == ["1,498", "90"]
    assert row(text, "+ filtered")[:2] == ["126", "9"]
    assert row(text, "+ dead-lettered")[:2] == ["14", "1"]
    assert row(text, "+ in flight")[0] == "12"
    assert row(text, "revoked")[0] == "7"
    assert row(text, "lag")[0] == "42"
    assert row(text, "ztf[0]")[:3] == ["40", "1,400", "0"]
    assert row(text, "SNIa")[0] == "700"
    assert "t2-gr abababababab   up 1:00:04" in text


def test_latencies_are_of_the_window_not_since_the_start(view):
    assert row(screen(view), "inference") == ["2.5", "s", "2.5", "s", "2.5", "s"]
    # the twin: since the start, 100 quick batches come first
    since_the_start = View(view.now, replace(Stats().snapshot(), uptime=0.0))
    assert row(screen(since_the_start), "inference") == ["25", "ms", "2.5", "s", "2.5", "s"]
    assert row(screen(view), "decode ") == ["-", "-", "-"]
    assert "batches waiting: decode 3, publish 0; rates and times of the last 4 s" in screen(view)


def test_the_line_says_the_same(view):
    assert line(view) == (
        "1:00:04 running, 100 alerts/s, lag 42, consumed 1,650 = published 1,498 + filtered 126 + dead-lettered 14 "
        "+ in flight 12, revoked 7"
    )
    view.now.stages["end-to-end"].add(99.0)
    assert line(view).endswith("revoked 7, p99 > 30 s")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ready": False}, "no partition is assigned"),
        ({"ready": False, "models": {}}, "no model is loaded yet"),
        ({"paused": True}, "paused by back-pressure"),
        ({"progress_age": 1e4}, "STUCK: no progress for 10000 s with 42 messages to come"),
        ({}, "running"),
    ],
)
def test_the_state_is_named(view, changes, words):
    spoiled = View(replace(view.now, **changes), view.before)
    assert screen(spoiled, 120).startswith(words)
    assert words in line(spoiled)


def test_up_to_date_is_told_from_running():
    stats = Stats()
    stats.ready = True
    now = stats.snapshot()
    assert "0:00:00 up to date, 0 alerts/s" in line(View(now, now))


def crowded() -> View:
    stats = busy_stats()
    stats.lag = {("a-topic-with-a-long-name", number): 10**6 + number for number in range(200)}
    stats.classes.update({f"class number {number}": number for number in range(60)})
    stats.reasons.update({f"reason {number} " + "of great length " * 20: number for number in range(60)})
    stats.models = {"t2-gr": "a" * 64, "t2-ugrizy": "b" * 64}
    stats.queue_depths = dict.fromkeys(STAGES[:4], 1000)
    stats.ledger.add(("a-topic-with-a-long-name", 7), consumed=10**8)
    now = stats.snapshot()
    return View(now, replace(now, uptime=-1.0))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 40), (120, 30), (200, 60)])
def test_however_much_there_is_it_fits(width, height):
    lines = screen(crowded(), width, height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any("a-topic-with-a-long-name[199]" in text for text in lines)  # the partition with the largest lag
    assert any(re.search(r"and \d+ more", text) for text in lines)
    assert any(text.startswith("dead letters") or "  dead letters" in text for text in lines)


def test_text_from_packets_is_no_markup():
    stats = Stats()
    stats.reasons["[red]\x1b[31mbyte[/red] :boom:"] += 1
    now = stats.snapshot()
    text = screen(View(now, now))
    assert "[red]" in text
    assert "\x1b" not in text


def test_lines_come_where_there_is_no_terminal():
    stats, console = busy_stats(), Console(file=io.StringIO(), width=40)
    with show(stats, console=console, every=0.02):
        wait_for(lambda: console.file.getvalue().count("\n") >= 2)
        stats.ledger.add(("ztf", 0), consumed=1)
    lines = console.file.getvalue().splitlines()
    assert len(lines) >= 3
    assert all("consumed 1,2" in text for text in lines)
    assert "in flight 13" in lines[-1]  # the last one is of the end


def test_lines_are_logged_where_logs_are_configured():
    stream, console = io.StringIO(), Console(file=io.StringIO())
    logger = logs.configure(as_json=True, stream=stream)
    try:
        with show(busy_stats(), console=console):
            pass
    finally:
        logger.handlers.clear()
        logger.propagate = True
    assert "consumed 1,250 = published 1,138" in json.loads(stream.getvalue())["message"]
    assert console.file.getvalue() == ""


def test_a_terminal_gets_the_picture(monkeypatch):
    stats = busy_stats()
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    threads = threading.active_count()
    with show(stats, console=console):
        stats.ledger.add(("ztf", 0), consumed=31)
    assert threading.active_count() == threads
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert row(text, "+ in flight")[0] == "43"
    assert "end-to-end" in text


def test_stdout_stays_what_it_is(capsys):
    with show(busy_stats(), interactive=True, console=Console(file=io.StringIO(), force_terminal=True)):
        sys.stdout.write('{"for": "machines"}\n')
    assert capsys.readouterr().out == '{"for": "machines"}\n'


def test_an_error_inside_ends_it_too():
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), show(busy_stats(), interactive=False, console=Console(file=io.StringIO())):
        _ = 1 / 0
    assert threading.active_count() == threads
