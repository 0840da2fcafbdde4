"""Which job has the device: deadlines first, batch work last, nothing lost, and refusals that tell the truth."""

import math
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError
from edgekit.session import Job, NextStep, Priority
from runtimes.daemon.arbiter import LEAST_REST, WINDOW, Arbiter, OverloadedError
from tests.runtimes.daemon.toy_jobs import Clock, ToyJob, Work, run_until_done

REAL_TIME, INTERACTIVE, BATCH = Priority
seconds = st.integers(1, 64).map(lambda number: number / 64)  # exact in binary, so that sums have no errors


@st.composite
def days(draw, divisible=True):
    """Jobs of all classes, with work that comes over some seconds."""
    clock, jobs = Clock(), []
    for number in range(draw(st.integers(1, 5))):
        priority = draw(st.sampled_from(list(Priority)))
        work = []
        for _ in range(draw(st.integers(1, 6))):
            comes = draw(seconds) * 4
            due = comes + draw(seconds) * 4 if priority is REAL_TIME else math.inf
            pauses = 2 ** draw(st.integers(0, 3)) - 1  # parts are exact in binary, too
            work.append(Work(comes, draw(seconds), due, pauses))
        jobs.append(ToyJob(f"job {number}", priority, clock, work, divisible))
    return clock, jobs


def urgent_work_that_waited(clock, jobs, arbiter):
    """Run the jobs; return the (job, work, other) where `other` began while more urgent `work` was waiting."""
    for job in jobs:
        arbiter.add(job)
    run_until_done(arbiter, clock, jobs)
    every = [(job, item) for job in jobs for item in job.work]
    rank = {id(item): (job.priority, item.deadline) for job, item in every}
    return [
        (job.name, item, other)
        for job, item in every
        for _, other in every
        if rank[id(other)] > rank[id(item)] and item.comes <= other.began < item.began
    ]


class FirstCome(Arbiter):
    """The planted failure: whatever came first has the device."""

    def _choose(self, running):
        found = [(job.waiting()[0].comes, job) for job in self._jobs.values() if job.waiting()]
        if running is not None or not found:
            return None
        job = min(found, key=lambda item: item[0])[1]
        return job, job.next_step(batch=True)


@given(days())
@settings(max_examples=100, deadline=None)
def test_no_work_begins_while_more_urgent_work_waits(day):
    clock, jobs = day
    assert urgent_work_that_waited(clock, jobs, Arbiter(clock=clock, most_wait=1e9)) == []


def test_the_check_of_the_order_finds_an_arbiter_that_serves_whoever_came_first():
    clock = Clock()
    jobs = [
        ToyJob("chat", INTERACTIVE, clock, [Work(0.0, 1.0), Work(0.0, 1.0)]),
        ToyJob("alerts", REAL_TIME, clock, [Work(0.5, 0.25, 1.5)]),
    ]
    assert urgent_work_that_waited(clock, jobs, FirstCome(clock=clock))


def longest_waits(day, cls=Arbiter):
    """Return by how much each real-time work that was alone in its class waited longer than a part of a step."""
    clock, jobs = day
    arbiter = cls(clock=clock, most_wait=1e9)
    for job in jobs:
        arbiter.add(job)
    run_until_done(arbiter, clock, jobs)
    others = [item for job in jobs if job.priority is not REAL_TIME for item in job.work]
    part = max((item.seconds / (item.pauses + 1) for item in others), default=0.0)
    urgent = [item for job in jobs if job.priority is REAL_TIME for item in job.work]
    free, waits = 0.0, []
    for item in sorted(urgent, key=lambda item: (item.comes, item.began)):
        free = max(free, item.comes) + item.seconds  # when it would have ended on a device of its own
        waits.append(item.ended - free - part)
    return waits


@given(days())
@settings(max_examples=100, deadline=None)
def test_real_time_work_waits_for_one_part_of_a_step_at_most(day):
    alone = [job for job in day[1] if job.priority is REAL_TIME]
    for job in alone:  # all work in the order of its coming, so that the device's busy time is known
        for item in job.work:
            item.deadline, item.pauses = 100 + item.comes, 0
    assert max(longest_waits(day), default=0.0) <= 1e-9


def test_the_check_of_the_wait_finds_steps_that_do_not_pause():
    clock = Clock()
    jobs = [
        ToyJob("chat", INTERACTIVE, clock, [Work(0.0, 1.0, pauses=7)], divisible=False),
        ToyJob("alerts", REAL_TIME, clock, [Work(0.0625, 0.125, 100.0)]),
    ]
    assert max(longest_waits((clock, jobs))) > 0.5


@given(days())
@settings(max_examples=100, deadline=None)
def test_all_work_is_done_and_the_device_is_never_idle_beside_waiting_work(day):
    clock, jobs = day
    arbiter = Arbiter(clock=clock, most_wait=0.5)  # overloaded again and again, so that batch work is held back
    for job in jobs:
        arbiter.add(job)
    run_until_done(arbiter, clock, jobs)
    every = [item for job in jobs for item in job.work]
    assert all(item.ended is not None for item in every)
    assert sum(served.seconds for served in arbiter.served.values()) == pytest.approx(sum(i.seconds for i in every))
    assert {name: served.steps for name, served in arbiter.served.items()} == {j.name: len(j.work) for j in jobs}
    late = {job.name: sum(item.ended > item.deadline for item in job.work) for job in jobs}
    assert {name: served.missed for name, served in arbiter.served.items()} == late
    free = 0.0
    for item in sorted(every, key=lambda item: item.comes):
        free = max(free, item.comes) + item.seconds
    assert max(item.ended for item in every) == pytest.approx(free)


def test_batch_work_is_held_back_under_overload_and_finished_later():
    clock = Clock()
    chat = ToyJob("chat", INTERACTIVE, clock, [Work(0.0, 1.0) for _ in range(8)])
    night = ToyJob("night", BATCH, clock, [Work(0.0, 1.0) for _ in range(3)])
    arbiter = Arbiter(clock=clock, most_wait=4.0)
    arbiter.add(chat)
    arbiter.add(night)
    assert arbiter.holds_batch
    run_until_done(arbiter, clock, [chat, night])
    assert max(item.ended for item in chat.work) == 8.0
    assert [item.ended for item in night.work] == [9.0, 10.0, 11.0]
    assert not arbiter.holds_batch


def wait_behind_refusal(backlog, share, cls=Arbiter):
    """Return the refusal of a request on a device with this backlog, of which real-time work has a share, and whether
    a request is accepted after the time that the refusal names."""
    clock, period = Clock(), 1 / 8
    chat = ToyJob("chat", INTERACTIVE, clock, [Work(0.0, period) for _ in range(round(backlog / period))])
    comes = [number * period for number in range(round((6 * WINDOW + 4 * backlog / (1 - share)) / period))]
    alerts = ToyJob("alerts", REAL_TIME, clock, [Work(at, share * period, at + 1) for at in comes] if share else [])
    chat_from = 6 * WINDOW  # the share must be known first
    for item in chat.work:
        item.comes = chat_from
    arbiter = cls(clock=clock, most_wait=2.0)
    arbiter.add(chat)
    arbiter.add(alerts)

    def advance(until):
        while clock.now < until:
            if not arbiter.step():
                rest = [i.comes for job in (chat, alerts) for i in job.work if i.comes > clock.now]
                clock.now = min([until, *rest])

    advance(chat_from)
    try:
        arbiter.admit(INTERACTIVE)
    except OverloadedError as error:
        advance(clock.now + error.retry_after)
        try:
            arbiter.admit(INTERACTIVE)
        except OverloadedError:
            return error, False
        return error, True
    return None, True


class Hasty(Arbiter):
    """The planted failure: it names half of the time that a refused request must wait."""

    def admit(self, priority):
        try:
            super().admit(priority)
        except OverloadedError as error:
            error.retry_after = error.retry_after // 2
            raise


@given(st.integers(0, 10), st.sampled_from([0.0, 0.25, 0.5]))
@settings(max_examples=15, deadline=None)
@example(10, 0.5)
def test_a_refused_request_is_accepted_after_the_time_that_the_refusal_names(backlog, share):
    error, accepted = wait_behind_refusal(backlog, share)
    assert accepted
    wait = backlog / (1 - share)
    if wait > 2.0 * 1.4:  # the share is an average, and lags behind
        assert error is not None
    if wait < 2.0 / 1.4:
        assert error is None


def test_the_check_of_the_retry_time_finds_half_of_it():
    error, accepted = wait_behind_refusal(10, 0.5, Hasty)
    assert error is not None
    assert not accepted


def test_a_refusal_says_what_to_do_and_batch_work_is_always_taken():
    clock = Clock()
    arbiter = Arbiter(clock=clock, most_wait=2.0)
    arbiter.add(ToyJob("chat", INTERACTIVE, clock, [Work(0.0, 5.5)]))
    with pytest.raises(OverloadedError, match=r"would wait 5\.5 s, and 2 s are allowed; try again in 4 s") as caught:
        arbiter.admit(INTERACTIVE)
    assert caught.value.retry_after == 4
    arbiter.admit(BATCH)
    arbiter.admit(REAL_TIME)


def test_a_device_full_of_real_time_work_has_a_finite_wait():
    clock = Clock()
    alerts = ToyJob("alerts", REAL_TIME, clock, [Work(0.0, 1.0, 9.0) for _ in range(40)])
    chat = ToyJob("chat", INTERACTIVE, clock, [Work(0.0, 1.0)])
    arbiter = Arbiter(clock=clock)
    arbiter.add(alerts)
    arbiter.add(chat)
    for _ in range(40):
        arbiter.step()
    assert chat.work[0].began is None
    assert arbiter.wait == 1.0 / LEAST_REST


def test_interactive_jobs_take_turns():
    clock = Clock()
    jobs = [ToyJob(name, INTERACTIVE, clock, [Work(0.0, 1.0) for _ in range(3)]) for name in ("a", "b")]
    arbiter = Arbiter(clock=clock, most_wait=1e9)
    for job in jobs:
        arbiter.add(job)
    run_until_done(arbiter, clock, jobs)
    assert [item.ended for item in jobs[0].work] == [1.0, 3.0, 5.0]
    assert [item.ended for item in jobs[1].work] == [2.0, 4.0, 6.0]


class Broken(ToyJob):
    def run(self, between):
        raise RuntimeError("no memory on the device")


def test_a_job_that_raises_is_removed_also_in_another_jobs_pause_and_the_others_go_on():
    clock, failures = Clock(), []
    chat = ToyJob("chat", INTERACTIVE, clock, [Work(0.0, 1.0, pauses=1)])
    broken = Broken("vision", REAL_TIME, clock, [Work(0.25, 1.0, 2.0)])
    arbiter = Arbiter(clock=clock, failed=lambda job, error: failures.append((job.name, str(error))))
    arbiter.add(chat)
    arbiter.add(broken)
    run_until_done(arbiter, clock, [chat])
    assert failures == [("vision", "no memory on the device")]
    assert chat.work[0].ended == 1.0
    assert arbiter.jobs == ("chat",)


def test_a_job_that_cannot_say_its_next_step_is_removed_and_the_others_go_on():
    class Lost(ToyJob):
        def next_step(self, *, batch):
            raise RuntimeError("the queue is torn")

    clock, failures = Clock(), []
    chat = ToyJob("chat", INTERACTIVE, clock, [Work(0.0, 1.0)])
    arbiter = Arbiter(clock=clock, failed=lambda job, error: failures.append((job.name, str(error))))
    arbiter.add(Lost("vision", REAL_TIME, clock, []))
    arbiter.add(chat)
    run_until_done(arbiter, clock, [chat])
    assert failures == [("vision", "the queue is torn")]
    assert arbiter.jobs == ("chat",)
    arbiter = Arbiter(clock=clock)
    arbiter.add(Lost("vision", REAL_TIME, clock, []))
    with pytest.raises(RuntimeError, match="torn"):
        arbiter.step()


def test_a_name_is_taken_once_and_the_limits_are_checked():
    arbiter, clock = Arbiter(), Clock()
    arbiter.add(ToyJob("chat", INTERACTIVE, clock, []))
    with pytest.raises(EdgekitError, match="a job 'chat' has this device already"):
        arbiter.add(ToyJob("chat", BATCH, clock, []))
    with pytest.raises(EdgekitError, match="most_wait is 0"):
        Arbiter(most_wait=0)


def test_a_toy_job_is_a_job_and_only_real_time_work_is_ordered_by_deadline():
    clock = Clock()
    first = ToyJob("first", INTERACTIVE, clock, [Work(0.0, 1.0)])
    assert isinstance(first, Job)
    second = ToyJob("second", INTERACTIVE, clock, [Work(0.0, 1.0, deadline=0.5)])
    arbiter = Arbiter(clock=clock)
    arbiter.add(first)
    arbiter.add(second)
    arbiter.step()
    assert first.work[0].ended == 1.0


def test_the_thread_sleeps_until_it_is_woken():
    looked = []

    class Idle:
        name = "idle"

        def next_step(self, *, batch):
            looked.append(time.monotonic())
            return NextStep(BATCH, 0.0) if batch and len(looked) == 5 else None

        def run(self, between):
            ran.set()

        def slack(self):
            return math.inf

        def backlog(self):
            return 0.0

    ran, stop = threading.Event(), threading.Event()
    arbiter = Arbiter()
    arbiter.add(Idle())
    thread = threading.Thread(target=arbiter.run, args=(stop.is_set,))
    thread.start()
    while not ran.is_set():
        before = len(looked)
        arbiter.wake()
        deadline = time.monotonic() + 10
        while len(looked) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(looked) > before, "the arbiter did not look for work after it was woken"
    stop.set()
    arbiter.wake()
    thread.join(10)
    assert not thread.is_alive()
