"""The consumer of alerts under supervision: started again when that helps, drained, and never left behind."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from edgekit.errors import EdgekitError
from runtimes.daemon.alerts_job import (
    CODE,
    LONGEST_PAUSE,
    AlertProcess,
    AlertSettings,
    consumer_command,
    numbers_of,
)  # fmt: skip


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def supervise(tmp_path):
    """Return supervise(script), which starts a process of this Python code under supervision."""
    config, made = tmp_path / "broker.toml", []
    config.write_text("")

    def start(script, **options):
        command = [sys.executable, "-c", textwrap.dedent(script)]
        found = AlertProcess(AlertSettings(str(config)), command=command, first_pause=0.01, **options)
        made.append(found)
        found.start()
        return found

    yield start
    for found in made:
        found.stop()


COUNTING = """
    import os, signal, sys, time
    with open({count!r}, "a+") as file:
        file.write(".")
        file.flush()
        file.seek(0)
        number = len(file.read())
    {body}
"""


@pytest.mark.parametrize(
    ("ends", "starts"),
    [("sys.exit(75)", 3), ("os.kill(os.getpid(), signal.SIGSEGV)", 3), ("sys.exit(1)", 1), ("sys.exit(2)", 1)],
)
def test_it_is_started_again_after_status_75_and_signals_and_after_nothing_else(supervise, tmp_path, ends, starts):
    count = str(tmp_path / "count")
    alerts = supervise(COUNTING.format(count=count, body=f"{ends} if number < 3 else time.sleep(600)"))
    until(lambda: alerts.state == "failed" or (alerts.starts == 3 and alerts.state == "running"))
    assert alerts.starts == starts
    assert alerts.state == ("running" if starts == 3 else "failed")
    assert alerts.status()["error"].startswith("the consumer of alerts ended ")
    alerts.stop()
    assert alerts.state == ("stopped" if starts == 3 else "failed")


def test_pauses_grow_up_to_a_limit(supervise, monkeypatch):
    alerts = supervise("import sys; sys.exit(75)")
    waits = []
    wait = alerts._stop.wait

    def noted(seconds):
        waits.append(seconds)
        return wait(0.0) if seconds > 1e-3 and seconds != 1.0 else wait(seconds)

    monkeypatch.setattr(alerts._stop, "wait", noted)
    until(lambda: alerts.starts > 5)
    alerts.stop()
    pauses = [seconds for seconds in waits if seconds != 1.0]
    assert all(later == min(2 * sooner, LONGEST_PAUSE) for sooner, later in itertools.pairwise(pauses))
    assert len(pauses) >= 3


def test_a_stop_lets_the_consumer_finish_and_keeps_its_report(supervise):
    alerts = supervise("""
        import json, signal, sys, time
        def end(*_):
            time.sleep(0.3)
            print(json.dumps({"failed": None, "ledger": {"total": {"consumed": 7, "published": 7}}}))
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        print("a line before", flush=True)
        time.sleep(600)
    """)
    until(lambda: alerts.state == "running")
    time.sleep(0.5)  # it has installed its handler
    alerts.stop()
    assert alerts.status()["ledger"] == {"consumed": 7, "published": 7}
    assert alerts.state == "stopped"
    assert alerts.starts == 1


def test_a_consumer_that_does_not_end_is_killed(supervise):
    alerts = supervise(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)",
        drain_seconds=0.3,
    )
    until(lambda: alerts.state == "running")
    time.sleep(0.5)
    began = time.monotonic()
    alerts.stop()
    assert 0.2 < time.monotonic() - began < 10
    assert alerts._process.returncode == -signal.SIGKILL


def test_a_stop_before_the_start_and_in_a_pause_ends_at_once(supervise):
    alerts = supervise("import sys; sys.exit(75)")
    until(lambda: alerts.starts > 2)
    began = time.monotonic()
    alerts.stop()
    assert time.monotonic() - began < 5
    before = alerts.starts
    time.sleep(0.1)
    assert alerts.starts == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_a_consumer_does_not_outlive_a_daemon_that_is_killed(tmp_path):
    left = tmp_path / "pid"
    child = CODE.replace(
        "from edgekit.cli import main; main()",
        f"open({str(left)!r}, 'w').write(str(os.getpid())); import time; time.sleep(600)",
    )
    script = f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())])"
    parent = subprocess.Popen([sys.executable, "-c", f"{script}; time.sleep(600)"])
    until(lambda: left.exists() and left.read_text())
    number = int(left.read_text())
    os.kill(number, 0)
    parent.kill()
    parent.wait()

    def gone():
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    until(gone)


def test_the_objective_sets_the_wait_of_a_batch_unless_the_file_does(tmp_path):
    config = tmp_path / "broker.toml"
    config.write_text("[batch]\nsize = 8\n")
    command = consumer_command(AlertSettings(str(config), slo_ms=25.0), 9999)
    assert command[-2:] == ["--batch-seconds", "0.012"]
    assert command[command.index("--metrics-listen") + 1] == "127.0.0.1:9999"
    config.write_text("[batch]\nseconds = 0.5\n")
    assert "--batch-seconds" not in consumer_command(AlertSettings(str(config)), 9999)


def test_settings_are_checked(tmp_path):
    with pytest.raises(EdgekitError, match=r"alerts\.config: .*missing\.toml: no such file"):
        AlertSettings(str(tmp_path / "missing.toml")).check()
    with pytest.raises(EdgekitError, match=r"alerts\.slo_ms is 0"):
        AlertSettings(slo_ms=0.0).check()


def test_counts_of_the_page_are_added_over_partitions():
    page = (
        '# HELP edgekit_alerts_consumed_total Alerts\nedgekit_alerts_consumed_total{partition="0",topic="a"} 3.0\n'
        'edgekit_alerts_consumed_total{partition="1",topic="a"} 4.0\n'
        'edgekit_alerts_in_flight{partition="0",topic="a"} 1.0\nedgekit_ready 1.0\n'
    )
    assert numbers_of(page) == {"alerts": {"consumed": 7, "in_flight": 1}}
    assert numbers_of("") == {}
