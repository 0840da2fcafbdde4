"""What a `Stopwatch` leaves out: waiting for a core. What it counts: everything else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.alert_broker.stream.waiting import seconds_to_end, wait_for

PINNED = f"import os, time; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); print(flush=True); "
needs_linux = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system counts no such waits")


def run(code: str) -> subprocess.Popen:
    """Run this code on one core, the same for all."""
    process = subprocess.Popen([sys.executable, "-c", PINNED + code], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


@pytest.fixture
def competitors():
    """Three processes that use the core all the time."""
    processes = [run("[0 for _ in iter(int, 1)]") for _ in range(3)]
    yield
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@needs_linux
@pytest.mark.usefixtures("competitors")
def test_time_in_which_a_process_waits_for_a_core_is_left_out():
    """Half a second of work takes two among four processes."""
    with run("[None for _ in iter(lambda: time.process_time() < 0.5, False)]") as process:
        assert 0.3 < seconds_to_end(process) < 1.0


@pytest.mark.usefixtures("competitors")
def test_time_in_which_a_process_waits_for_something_else_is_counted():
    with run("time.sleep(1.0)") as process:
        assert seconds_to_end(process) > 0.8


def test_a_condition_that_does_not_come_true_is_an_error():
    wait_for(lambda: True, 0.0)
    with pytest.raises(AssertionError, match=r"within 0.05 s"):
        wait_for(lambda: False, 0.05)
