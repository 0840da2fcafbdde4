"""A language model as a job: its answers are those of a model alone, whatever runs between its layers."""

import math
from contextlib import closing

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.session import Job, Priority
from runtimes.daemon.arbiter import Arbiter
from runtimes.daemon.language_job import LanguageJob
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.request import Request
from runtimes.llm.scheduler import Scheduler
from runtimes.llm.torch_engine import TorchEngine
from tests.runtimes.daemon.toy_jobs import Clock, ToyJob, Work
from tests.runtimes.llm.conftest import compiler


class Ticking(NativeEngine):
    """A layer takes a second of the clock, however many tokens it has."""

    clock: Clock

    def run_layers(self, state, batch, first, end):
        super().run_layers(state, batch, first, end)
        self.clock.now += end - first


class Whole(Ticking):
    """An engine that cannot stop between layers, as llama.cpp."""

    divisible = False


def request(seed, tokens=40, most=6, interactive=True):
    prompt = np.random.default_rng(seed).integers(0, 307, tokens)
    return Request(prompt, most, interactive=interactive)


def alone(model, item):
    """Return the tokens of an answer on an engine of its own."""
    with closing(NativeEngine(model, blocks=40, threads=1)) as engine:
        scheduler = Scheduler(engine, budget=512)
        scheduler.submit(item)
        return [produced.token for produced in scheduler if produced.token is not None]


def opened(model, clock, cls=Ticking, **options):
    engine = cls(model, blocks=40, threads=1)
    engine.clock = clock
    arbiter = Arbiter(clock=clock, most_wait=1e9)
    job = LanguageJob("chat", engine, deliver=Mailbox(), clock=clock, slack=arbiter.slack, **options)
    arbiter.add(job)
    return arbiter, job


class Mailbox(dict):
    """What requests got, by their numbers."""

    def __call__(self, produced):
        for item in produced:
            self.setdefault(item.request, []).append(item)


def tokens(items):
    return [item.token for item in items if item.token is not None]


def drain(arbiter):
    while arbiter.step():
        pass


@compiler
@pytest.mark.parametrize("between_tokens", [None, 20.0])
def test_answers_are_those_of_a_model_alone_with_real_time_work_between_all_layers(toy, between_tokens):
    model, clock = toy("llama", "Q4_1"), Clock()
    arbiter, job = opened(model, clock, between_tokens=between_tokens)
    with closing(job.engine):
        alerts = ToyJob("alerts", Priority.REAL_TIME, clock, [Work(float(at), 0.25, at + 2) for at in range(400)])
        arbiter.add(alerts)
        asked = [request(seed, 30 + 20 * seed, 16, interactive=seed != 1) for seed in range(3)]
        numbers = [job.scheduler.submit(item) for item in asked]
        while job.scheduler.busy:
            arbiter.step()
    found = job._deliver
    assert [tokens(found[number]) for number in numbers] == [alone(model, item) for item in asked]
    done = [item for item in alerts.work if item.ended is not None]
    assert len(done) > 20
    assert max(item.began - item.comes for item in done) <= 1.0  # one layer
    assert arbiter.served["alerts"].missed == 0


@compiler
def test_without_pauses_real_time_work_waits_for_whole_steps(toy):
    """The twin: the same check of the wait fails on an engine that cannot stop between layers."""
    clock = Clock()
    arbiter, job = opened(toy("llama", "Q4_1"), clock, Whole, between_tokens=None)
    with closing(job.engine):
        layers = job.engine.architecture.layers
        alerts = ToyJob("alerts", Priority.REAL_TIME, clock, [Work(float(at), 0.25, at + 2) for at in range(1, 60)])
        arbiter.add(alerts)
        job.scheduler.submit(request(0))
        drain(arbiter)
    assert layers > 1
    assert max(item.began - item.comes for item in alerts.work if item.ended is not None) > 1.0


@compiler
def test_torch_pauses_between_its_layers_too(toy):
    clock, seen = Clock(), []
    engine = TorchEngine(toy(), blocks=40)
    job = LanguageJob("chat", engine, deliver=Mailbox(), clock=clock)
    job.scheduler.submit(request(0))
    assert job.next_step(batch=True) is not None
    job.run(lambda: seen.append(engine.steps))
    assert len(seen) == engine.architecture.layers - 1


@compiler
def test_pauses_are_not_counted_as_the_time_of_a_step(toy):
    clock = Clock()
    _, job = opened(toy(), clock)
    with closing(job.engine):
        layers = job.engine.architecture.layers

        def work():
            clock.now += 1000

        job.scheduler.submit(request(0, 8, 3))
        for _ in range(3):
            step = job.next_step(batch=True)
            assert step is not None
            job.run(work)
        assert 0 < job._prompt_time.mean <= layers
        assert 0 < job._answer_time.mean <= layers


@compiler
def test_a_step_of_an_engine_without_pauses_fits_into_the_slack(toy):
    clock, slack = Clock(), 0.0
    engine = Whole(toy(), blocks=100, threads=1)
    engine.clock = clock

    class Measured(LanguageJob):
        def _learn(self, shape, seconds):
            shapes.append(shape)
            super()._learn(shape, 0.001 + 0.001 * shape.tokens)  # a step of 30 tokens takes 31 ms

    shapes = []
    job = Measured("chat", engine, deliver=Mailbox(), slack=lambda: slack, between_tokens=None, clock=clock)
    with closing(engine):
        slack = 1.0
        for seed in range(3):
            job.scheduler.submit(request(seed, 300, 2))
        while job.next_step(batch=True):
            job.run(lambda: None)
            slack = 0.031 if len(shapes) > 3 else 0.016 + 0.01 * len(shapes)
    assert max(shape.tokens for shape in shapes[8:]) <= 30
    assert max(shape.tokens for shape in shapes[8:]) >= 20


@compiler
def test_batch_work_is_held_back_gives_up_its_blocks_and_is_finished_later(toy):
    model, clock = toy("llama", "Q4_1"), Clock()
    arbiter, job = opened(model, clock)
    with closing(job.engine):
        late, soon = request(1, 500, 8, interactive=False), request(2, 400, 8)
        assert job.engine.blocks.count(900) > job.engine.blocks.number  # both do not fit
        found, first = job._deliver, job.scheduler.submit(late)
        job.next_step(batch=True)
        job.run(lambda: None)
        second = job.scheduler.submit(soon)
        while job.next_step(batch=False):
            job.run(lambda: None)
        assert found[second][-1].finish == "length"
        held = len(found.get(first, ()))
        assert held < 8
        assert job.next_step(batch=False) is None
        step = job.next_step(batch=True)
        assert step is not None
        assert step.priority is Priority.BATCH
        drain(arbiter)
    assert tokens(found[first]) == alone(model, late)
    assert tokens(found[second]) == alone(model, soon)


@compiler
def test_requests_come_and_go_in_the_pauses_of_a_step(toy):
    clock, todo = Clock(), []
    arbiter, job = opened(toy(), clock, prepare=lambda: todo.pop()() if todo else None)
    with closing(job.engine):
        first = job.scheduler.submit(request(0))
        arbiter.step()
        before, numbers = len(job._deliver[first]), []
        todo[:] = [lambda: job.scheduler.cancel(first), lambda: numbers.append(job.scheduler.submit(request(1)))]
        drain(arbiter)
        assert len(job._deliver[first]) == before
        assert job._deliver[numbers[0]][-1].finish == "length"
        assert job.engine.blocks.tables == {}
        assert job.backlog() == 0.0


@compiler
def test_an_engine_that_fails_ends_its_job(toy):
    clock, failed = Clock(), []
    arbiter, job = opened(toy(), clock)
    arbiter._failed = lambda job, error: failed.append(str(error))
    with closing(job.engine):
        job.scheduler.submit(request(0))

        def broken(*_):
            raise RuntimeError("the device is gone")

        job.engine.run_layers = broken
        arbiter.step()
    assert failed == ["the device is gone"]
    assert arbiter.jobs == ()


@compiler
def test_the_backlog_is_the_work_that_a_new_request_waits_for(toy):
    clock = Clock()
    arbiter, job = opened(toy(), clock, budget=32)
    assert isinstance(job, Job)
    assert job.slack() == math.inf
    with closing(job.engine):
        for seed in range(3):
            job.scheduler.submit(request(seed, 100, 4))
        arbiter.step()
        before = job.backlog()
        assert before > 0
        job.scheduler.submit(request(9, 100, 4, interactive=False))
        job.next_step(batch=True)
        assert job.backlog() == before
        for _ in range(3):
            job.scheduler.submit(request(9, 100, 4))
        job.next_step(batch=True)
        assert job.backlog() == pytest.approx(before + 3 * 104 * job._prompt_time.mean)
        drain(arbiter)
        assert job.backlog() == 0.0


@compiler
def test_answers_that_run_do_not_make_a_prompt_seem_slow(toy):
    """A step of three answers takes as long as one of 64 tokens of a prompt here: a new prompt must not be counted as
    if each of its tokens took a third of a step. The mean over all steps predicted 20 times the seconds of it."""
    clock = Clock()
    arbiter, job = opened(toy(), clock, budget=64, between_tokens=None)
    with closing(job.engine):
        for seed in range(3):
            job.scheduler.submit(Request(request(seed, 20).prompt, 60, drafts=0))
        for _ in range(40):
            arbiter.step()
        assert len(job.scheduler.lengths()[0]) == 3
        number = job.scheduler.submit(request(9, 300, 1))
        job.next_step(batch=True)
        predicted, began = job.backlog(), clock.now
        while number not in job._deliver:
            arbiter.step()
        # the answer of a request that has not begun is a part of the wait, and takes no step after the prompt here
        answer = job._answer_time.mean
        assert clock.now - began <= predicted <= 2 * (clock.now - began) + answer


@compiler
def test_limits_are_checked(toy):
    engine = NativeEngine(toy(), blocks=4, threads=1)
    with closing(engine):
        for options in ({"between_tokens": 0.0}, {"budget": 0}):
            with pytest.raises(EdgekitError, match="expected"):
                LanguageJob("chat", engine, deliver=Mailbox(), **options)
