"""A session as a job: every request gets its own rows, by its deadline."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.session import Job, Priority
from runtimes.daemon.arbiter import Arbiter
from runtimes.daemon.session_job import SessionJob
from tests.runtimes.daemon.toy_jobs import Clock


class Doubling:
    """A session: twice the input, in a second and a tenth of one for each row."""

    inputs = outputs = (TensorSpec("x", ("batch", 2), "float32"),)
    device = provider = "test"

    def __init__(self, clock):
        self.clock, self.batches = clock, []

    def run(self, arrays):
        self.batches.append(len(arrays["x"]))
        self.clock.now += 1 + 0.1 * len(arrays["x"])
        return {"x": 2 * arrays["x"]}

    def warmup(self, batch):
        pass


class Mixing(Doubling):
    """The planted failure: it returns rows in another order."""

    def run(self, arrays):
        return {name: array[::-1] for name, array in super().run(arrays).items()}


def answers_are_right(session_class, sizes, rows):
    clock = Clock()
    session = session_class(clock)
    job, arbiter = SessionJob("infer", session, rows=rows, clock=clock), Arbiter(clock=clock, most_wait=1e9)
    arbiter.add(job)
    asked = [np.full((size, 2), number, np.float32) for number, size in enumerate(sizes)]
    found = {}
    for number, array in enumerate(asked):
        job.submit({"x": array}, lambda answer, number=number: found.__setitem__(number, answer))
    while arbiter.step():
        pass
    assert max(session.batches) <= rows
    return len(found) == len(asked) and all(np.array_equal(found[n]["x"], 2 * a) for n, a in enumerate(asked))


@given(st.lists(st.integers(1, 8), min_size=1, max_size=20), st.integers(8, 20))
@settings(max_examples=50, deadline=None)
def test_each_request_gets_its_own_rows(sizes, rows):
    assert answers_are_right(Doubling, sizes, rows)


def test_the_check_of_the_rows_finds_rows_in_another_order():
    assert not answers_are_right(Mixing, [1, 2, 3], 8)


def test_earlier_deadlines_are_in_an_earlier_batch():
    clock, order = Clock(), []
    job = SessionJob("alerts", Doubling(clock), seconds=100.0, rows=1, clock=clock)
    for deadline in (50.0, 10.0, math.inf, 30.0):
        job.submit({"x": np.zeros((1, 2), np.float32)}, lambda _, d=deadline: order.append(d), deadline)
    step = job.next_step(batch=False)
    assert step is not None
    assert (step.priority, step.deadline) == (Priority.REAL_TIME, 10.0)
    while job.next_step(batch=True):
        job.run(lambda: None)
    assert order == [10.0, 30.0, 50.0, math.inf]


def test_the_slack_is_what_other_work_may_take():
    clock = Clock()
    job = SessionJob("alerts", Doubling(clock), seconds=20.0, rows=64, clock=clock)
    assert isinstance(job, Job)
    rows = np.zeros((4, 2), np.float32)
    for size in (1, 4, 2):  # so that it knows its own times
        job.submit({"x": rows[:size]}, lambda _: None)
        job.run(lambda: None)
    clock.now += 1000  # nothing came for a while
    idle = job.slack()
    assert idle == pytest.approx(20 - 2 - 1.1, abs=0.05)  # the objective, the guard, a batch of one row
    job.submit({"x": rows}, lambda _: None)
    assert job.slack() < idle - 0.3  # three rows more in its batch, and a rate of rows
    clock.now += 3
    waited = job.slack()
    assert waited < idle - 3
    clock.now += 50
    assert job.slack() == 0.0
    assert SessionJob("infer", Doubling(clock), clock=clock).slack() == math.inf


def test_work_of_other_jobs_within_the_slack_misses_nothing_and_beyond_it_does():
    """An arrival right after the other work has begun is the worst one."""

    def misses(share):
        clock = Clock()
        job = SessionJob("alerts", Doubling(clock), seconds=20.0, rows=64, clock=clock)
        arbiter = Arbiter(clock=clock)
        arbiter.add(job)
        row = np.zeros((1, 2), np.float32)
        for size in (1, 3, 2, 4):
            job.submit({"x": np.repeat(row, size, 0)}, lambda _: None)
            arbiter.step()
        clock.now += 100
        for _ in range(50):
            busy_until = clock.now + share * arbiter.slack()
            while clock.now < busy_until:  # one row a second, while the device is busy
                job.submit({"x": row}, lambda _: None)
                clock.now = min(clock.now + 1, busy_until)
            arbiter.step()
        return arbiter.served["alerts"].missed

    assert misses(1.0) == 0
    assert misses(1.3) > 0


def test_an_error_of_the_session_goes_to_its_requests_and_the_next_ones_are_answered():
    clock, found = Clock(), []
    session = Doubling(clock)
    job = SessionJob("infer", session, clock=clock)
    run, session.run = session.run, lambda arrays: 1 / 0
    job.submit({"x": np.ones((1, 2), np.float32)}, found.append)
    job.run(lambda: None)
    session.run = run
    job.submit({"x": np.ones((1, 2), np.float32)}, found.append)
    job.run(lambda: None)
    assert isinstance(found[0], ZeroDivisionError)
    assert found[1]["x"].tolist() == [[2.0, 2.0]]


def test_what_the_session_cannot_run_is_refused_at_once():
    clock = Clock()
    job = SessionJob("infer", Doubling(clock), rows=4, clock=clock)
    for arrays, reason in (
        ({"y": np.ones((1, 2), np.float32)}, "unknown input 'y'"),
        ({"x": np.ones((5, 2), np.float32)}, "a request of 5 rows; expected 1 to 4"),
        ({"x": np.full((1, 2), np.nan, np.float32)}, "NaN"),
    ):
        with pytest.raises(EdgekitError, match=reason):
            job.submit(arrays, lambda _: None)
    assert job.next_step(batch=True) is None
    with pytest.raises(EdgekitError, match="the objective is 0"):
        SessionJob("infer", Doubling(clock), seconds=0)
    with pytest.raises(EdgekitError, match="rows = 0"):
        SessionJob("infer", Doubling(clock), rows=0)
