"""Drafts: they are found where a text repeats itself, they pay or are left out, and they change no token."""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.llm.lookup import Lookup, StepTime, worthwhile
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.request import Request
from runtimes.llm.sampling import Sampling
from runtimes.llm.scheduler import Scheduler
from tests.runtimes.llm.conftest import compiler
from tests.runtimes.llm.copying import CopyingEngine, ForgetfulEngine, KeepingEngine, alone
from tests.runtimes.llm.test_scheduler import Clock, finished, request

# --- what is found


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2]),
        ([9, 1, 2, 7, 8, 5, 1, 2], [7, 8, 5, 1]),  # two tokens, because no three are found
        ([1, 2, 3, 4, 1, 2, 5, 9, 1, 2, 3], [4, 1, 2, 5]),  # three go before a later two
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], [5, 1, 2, 3]),  # the last occurrence
        ([6, 6, 6, 6], [6, 6, 6, 6]),  # it goes on as it has begun
        ([1, 2, 1, 2, 1], [2, 1, 2, 1]),
        ([1, 2, 3, 4, 5], []),
        ([1], []),
    ],
)
def test_what_followed_the_same_tokens_is_the_draft(tokens, expected):
    assert Lookup().find(tokens, 4) == expected
    grown = Lookup()
    for end in range(1, len(tokens)):  # found the same, token by token
        grown.find(tokens[:end], 4)
    assert grown.find(tokens, 4) == expected


def test_every_guess_counts_whether_a_step_verified_it_or_not():
    lookup = Lookup()
    draft = lookup.find([1, 2, 3, 4, 5, 1, 2, 3], 4)
    before = lookup.chances(draft)
    assert before == [0.5**number for number in (1, 2, 3, 4)]
    lookup.learn(4)
    lookup.learn(5)
    assert lookup.chances(draft)[0] == pytest.approx(1 - 0.5 * 0.9**2)
    lookup.learn(9)  # wrong, and so the guess behind it says nothing
    wrong = lookup.chances(draft)[0]
    lookup.learn(2)
    assert lookup.chances(draft)[0] == wrong == pytest.approx((1 - 0.5 * 0.9**2) * 0.9)


# --- how many pay


def timed(intercept, slope, sizes):
    time = StepTime()
    for size in sizes:
        time.add(size, intercept + slope * size)
    return time


def test_step_times_are_a_line_through_the_last_steps():
    time = timed(2.0, 0.25, [1, 4, 1, 9, 2] * 20)
    assert time.slope == pytest.approx(0.25)
    assert time.of(6) == pytest.approx(3.5)
    for size in [1, 4, 9] * 60:  # the machine has become slower
        time.add(size, 4.0 + 0.5 * size)
    assert time.of(6) == pytest.approx(7.0, rel=0.05)


def test_one_step_that_took_very_long_is_no_new_line():
    time = timed(2.0, 0.25, [1, 4, 1, 9, 2] * 20)
    time.add(1, 500.0)
    assert time.of(1) == pytest.approx(2.25, rel=0.1)


def test_a_slope_that_is_not_known_is_tried():
    assert timed(2.0, 0.25, [1] * 5).slope == 0
    time = timed(2.0, 0.25, [9, 1])
    assert time.slope > 0
    for _ in range(600):
        time.add(1, 2.25)
    assert time.slope == 0  # known too long ago


@given(st.floats(0.01, 0.99), st.floats(0.0, 3.0), st.floats(0.01, 2.0), st.integers(1, 4), st.integers(1, 8))
def test_as_many_drafts_are_verified_as_give_the_most_tokens_per_second(rate, intercept, slope, tokens, most):
    time = timed(intercept, slope, [1, 2, 5, 9] * 5)
    chances = [rate**number for number in range(1, most + 1)]

    def speed(number):
        return (tokens + sum(chances[:number])) / (intercept + slope * (tokens + number))

    found = worthwhile(chances, tokens, time)
    assert speed(found) == pytest.approx(max(map(speed, range(most + 1))), rel=1e-6)


def test_without_a_time_there_is_no_draft():
    assert worthwhile([0.9], 1, StepTime()) == 0


# --- in the scheduler


def run(engine, budget, requests):
    scheduler = Scheduler(engine, budget=budget, clock=Clock())
    numbers = [scheduler.submit(item) for item in requests]
    answers, _ = finished(scheduler)
    return scheduler, [answers[number] for number in numbers]


LOADS = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 60), st.integers(0, 8)), min_size=1, max_size=8)


@pytest.mark.parametrize("kind", [CopyingEngine, ForgetfulEngine])
@given(loads=LOADS, budget=st.integers(1, 60), blocks=st.integers(11, 40))
@settings(max_examples=40)
def test_answers_with_drafts_are_those_of_a_request_alone(toy, kind, loads, budget, blocks):
    engine = kind(toy().architecture, blocks)
    requests = [request(seed, length, most, drafts=drafts) for seed, (length, most, drafts) in enumerate(loads)]
    _, answers = run(engine, budget, requests)
    assert answers == [alone(item.prompt.tolist(), item.most_tokens) for item in requests]
    assert engine.blocks.free == blocks
    assert all(sum(step.values()) <= budget for step in engine.chosen)


def test_drafts_save_steps_and_a_broken_engine_shows_in_the_answers(toy):
    architecture = toy().architecture
    asked = [request(seed, 20, 100) for seed in range(2)]
    plain = [Request(item.prompt, item.most_tokens, drafts=0) for item in asked]
    expected = [alone(item.prompt.tolist(), item.most_tokens) for item in asked]
    engine, without, broken = (kind(architecture, 40) for kind in (CopyingEngine, CopyingEngine, KeepingEngine))
    scheduler, answers = run(engine, 64, asked)
    assert answers == expected
    assert 0 < scheduler.accepted < scheduler.drafted
    assert run(without, 64, plain)[1] == expected
    assert len(engine.chosen) < 0.6 * len(without.chosen)
    assert run(broken, 64, asked)[1] != expected


def test_drafts_that_cost_more_than_they_give_are_left_out(toy):
    engine = CopyingEngine(toy().architecture, 40)
    clock = Clock()
    step = engine.step

    def slow(items, between=None):
        clock.now += sum(len(item.inputs) for item in items)  # a second for each token: nothing is gained
        return step(items, between)

    engine.step = slow
    scheduler = Scheduler(engine, budget=64, clock=clock)
    item = request(0, 20, 200)
    number = scheduler.submit(item)
    answers, _ = finished(scheduler)
    assert answers[number] == alone(item.prompt.tolist(), 200)
    assert scheduler.drafted <= 16  # what it took to find out


@compiler
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_a_real_network_gives_the_same_bits_with_drafts(toy, kv):
    model, rng = toy("llama", "Q4_1"), np.random.default_rng(5)
    prompts = [np.tile(rng.integers(0, 307, 9), 4), rng.integers(0, 307, 40), np.tile(rng.integers(0, 307, 3), 9)]
    found = {}
    for drafts, budget, threads in ((0, 512, 1), (8, 512, 1), (3, 9, 2), (8, 14, 2)):
        with closing(NativeEngine(model, blocks=30, kv=kv, threads=threads)) as engine:
            scheduler = Scheduler(engine, budget=budget, clock=Clock())
            for seed, prompt in enumerate(prompts * 2):
                sampling = Sampling(temperature=0.3 * (seed % 2), repetition=1 + 0.05 * (seed % 3), seed=seed)
                scheduler.submit(Request(prompt, 60, sampling, drafts=drafts))
            answers = {}
            for p in iter(scheduler):
                if p.token is not None:
                    answers.setdefault(p.request, []).append((p.token, p.logits.tobytes()))
            assert engine.blocks.free == engine.blocks.number
            found[drafts, budget] = answers
            assert (scheduler.accepted > 0) == (drafts > 0)
            assert (scheduler.drafted > scheduler.accepted) == (drafts > 0)
    first, *others = found.values()
    assert all(other == first for other in others)
