"""Workers that are watched: one is given up, all are stopped, and a process that was suspended gives none up."""

import threading
import time

import pytest

from alert_broker import work_budget
from alert_broker.work_budget import AT, COMMAND, STOP, Budget, CancelledError
from tests.alert_broker.stream.waiting import Stopwatch


def worker(seconds, given_up):
    """Work on objects 1 to 3 for these seconds each, as compiled code does."""

    def work(number, shared):
        for item in range(3):
            shared[AT] = item + 1
            until = time.monotonic() + seconds[item]
            while time.monotonic() < until:
                if shared[COMMAND] == STOP:
                    return
                if shared[COMMAND] == shared[AT]:
                    given_up.append(item)
                    break
                time.sleep(0.001)

    return work


def test_the_object_that_takes_too_long_is_given_up():
    given_up = []
    Budget(seconds=0.1).run(worker([0.0, 30.0, 0.0], given_up), 1)
    assert given_up == [1]


def test_work_without_a_limit_is_left_alone():
    given_up = []
    Budget().run(worker([0.01, 0.1, 0.01], given_up), 2)
    assert given_up == []


def test_all_workers_stop_on_request():
    stopped, stopwatch = threading.Event(), Stopwatch()
    threading.Timer(0.1, stopped.set).start()
    with pytest.raises(CancelledError):
        Budget(cancelled=stopped.is_set).run(worker([30.0, 30.0, 30.0], []), 2)
    assert stopwatch.seconds() < 5.0


def test_what_a_worker_raises_is_raised():
    def work(number, shared):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Budget().run(work, 2)


def test_time_in_which_the_process_was_suspended_does_not_count(monkeypatch):
    """The calling thread was not scheduled for a minute between two checks, as after SIGSTOP."""
    real, now = work_budget.wait, [0.0]

    def wait(futures, seconds):
        now[0] += 60.0
        return real(futures, seconds)

    monkeypatch.setattr(work_budget, "wait", wait)
    given_up = []
    Budget(seconds=1.0).run(worker([0.01, 0.2, 0.01], given_up), 1)
    assert given_up == []
    assert now[0] > 60.0
