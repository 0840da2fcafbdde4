"""A call that does not return ends the process; one that returns in time, or whose callback is at work, does not."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from alert_broker.stream import watchdog as module
from alert_broker.stream.watchdog import TRY_AGAIN, Watchdog
from tests.alert_broker.stream.waiting import wait_for


@pytest.fixture
def ended(monkeypatch):
    monkeypatch.setattr(module, "MARGIN_SECONDS", 0.3)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    return []


@pytest.fixture
def watchdog(ended):
    watchdog = Watchdog(ended.append)
    yield watchdog
    watchdog.close()


def test_a_call_that_does_not_return_ends_the_process_and_is_named(watchdog, ended, caplog):
    words = []
    watchdog.last_words = words.append
    with watchdog.limit("commit_transaction", 0.1):
        wait_for(lambda: ended)
    assert ended == [TRY_AGAIN]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the call commit_transaction of the Kafka client has not returned" in line
    assert "status 75" in line
    assert len(words) == 1


def test_a_report_that_fails_keeps_nobody_alive(watchdog, ended):
    watchdog.last_words = lambda reason: 1 / 0
    with watchdog.limit("flush", 0.0):
        wait_for(lambda: ended)


def test_a_report_that_is_blocked_keeps_nobody_alive(watchdog, ended, monkeypatch):
    """As it is if the output is a full pipe: nobody reads it, and nobody has closed it."""
    monkeypatch.setattr(module, "LAST_WORDS_SECONDS", 0.1)
    free, words = threading.Event(), []
    watchdog.last_words = lambda reason: free.wait() and words.append(reason)
    try:
        with watchdog.limit("flush", 0.0):
            wait_for(lambda: ended)
        assert words == []  # it was blocked all the time
    finally:
        free.set()


def test_an_output_that_nobody_reads_keeps_nobody_alive(watchdog, ended, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        broken.write("the report")
        monkeypatch.setattr(module.sys, "stdout", broken)
        with watchdog.limit("flush", 0.0):
            wait_for(lambda: ended)
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):  # the twin: this is what writing the report met
            broken.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that closing it does not fail
    assert ended == [TRY_AGAIN]


def test_calls_that_return_in_time_end_nothing(watchdog, ended):
    for _ in range(20):
        with watchdog.limit("flush", 60.0):
            time.sleep(0.05)
    assert not ended
    assert not watchdog.running()


def test_a_callback_has_a_limit_of_its_own(watchdog, ended):
    with watchdog.limit("consume", 0.0), watchdog.limit("drain", 60.0):
        time.sleep(1.0)  # three times what `consume` alone may take
        assert [call.name for call in watchdog.running()] == ["drain"]
    assert not ended


def test_threads_do_not_hide_one_another(watchdog, ended, caplog):
    def work():
        with watchdog.limit("flush", 60.0):
            wait_for(lambda: ended)

    thread = threading.Thread(target=work)
    thread.start()
    with watchdog.limit("consume", 0.1):
        wait_for(lambda: ended)
    thread.join()
    assert "the call consume" in caplog.text


STUCK = """
import ctypes, logging, sys
from alert_broker.stream.watchdog import Watchdog
logging.basicConfig(level=logging.INFO)
watchdog = Watchdog()
with watchdog.ending_within(1.0), watchdog.limit("consume", 3600.0):
    print("ready", flush=True)
    {wait}
print("ended", flush=True)
"""
# as a client that waits on a condition: no signal interrupts it, so no Python handler ever runs
STUCK_IN_C = "[ctypes.CDLL(None).sleep(3600) for _ in range(100)]"


def run(wait: str, handler: str = "") -> subprocess.Popen[str]:
    text = f"import signal\n{handler}\n" + STUCK.format(wait=wait)
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_who_is_told_to_stop_ends_although_a_call_never_returns():
    process = run(STUCK_IN_C, "signal.signal(signal.SIGTERM, lambda *a: None)")
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert process.returncode == TRY_AGAIN
    assert time.monotonic() - started < 30
    (line,) = error.strip().splitlines()
    assert "told to stop 1 s ago" in line
    assert "consume for" in line


def test_who_stops_in_time_ends_with_its_own_status():
    handler = "told = []; signal.signal(signal.SIGTERM, lambda *a: told.append(1))"
    process = run("import time\n    while not told: time.sleep(0.01)", handler)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (0, "ended\n", "")


def test_other_signals_are_no_order_to_stop():
    handler = "signal.signal(signal.SIGUSR1, lambda *a: None)"
    process = run(
        "import time; end = time.monotonic() + 2.5\n    while time.monotonic() < end: time.sleep(0.1)", handler
    )
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "ended\n")
