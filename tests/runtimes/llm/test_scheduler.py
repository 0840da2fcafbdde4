"""Schedules: nobody starves, no block is lost, and the tokens are those of a request that runs alone."""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError
from runtimes.llm.engine import Engine
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.sampling import Sampling
from runtimes.llm.scheduler import LEAST_CHUNK, PATIENCE, Request, Scheduler
from tests.runtimes.llm.conftest import compiler


class CountingEngine(Engine):
    """An engine without a network: the token that it wants next is a hash of all tokens before."""

    def __init__(self, architecture, blocks):
        super().__init__(architecture, blocks)
        self.slots = {}  # (block, slot): token
        self.chosen = []  # the tokens of each step, by sequence

    def begin(self, batch):
        return None

    def run_layers(self, state, batch, first, end):
        if first == 0:
            for span, table in zip(batch.spans, batch.tables, strict=True):
                for token, index in zip(batch.ids[span].tolist(), batch.index[span].tolist(), strict=True):
                    self.slots[int(table[index // 16]), index % 16] = token

    def finish(self, state, batch):
        logits = np.zeros((len(batch.wanted), self.architecture.vocabulary), np.float32)
        for row, wanted in zip(logits, batch.wanted.tolist(), strict=True):
            span, table = next(
                (span, table)
                for span, table in zip(batch.spans, batch.tables, strict=True)
                if span.start <= wanted < span.stop
            )
            length = batch.index[span.start] + wanted - span.start + 1
            row[next_token([self.slots[int(table[at // 16]), at % 16] for at in range(length)])] = 1
        return logits

    def step(self, items, between=None):
        self.chosen.append({item.sequence: len(item.inputs) for item in items})
        return super().step(items, between)

    def copy_block(self, source, target):
        for slot in range(16):
            if (source, slot) in self.slots:
                self.slots[target, slot] = self.slots[source, slot]

    def export_blocks(self, blocks):
        raise AssertionError

    def import_blocks(self, blocks, content):
        raise AssertionError

    def close(self):
        pass


class FailingEngine(CountingEngine):
    """Fails in the third step, behind its last layer."""

    def finish(self, state, batch):
        if len(self.chosen) == 3:
            raise MemoryError
        return super().finish(state, batch)


def next_token(tokens):
    return hash(tuple(tokens)) % 300


def alone(prompt, most, ends=frozenset()):
    """Return the answer of a request that has an engine to itself."""
    tokens = list(prompt)
    for _ in range(most):
        token = next_token(tokens)
        if token in ends:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class Clock:
    now = 0.0

    def __call__(self):
        self.now += 0.001
        return self.now


@pytest.fixture
def architecture(toy):
    return toy().architecture


def finished(scheduler, most_steps=20_000):
    """Run all requests; return their answers by number, and why each ended."""
    answers, ends = {}, {}
    for _ in range(most_steps):
        if not scheduler.busy:
            return answers, ends
        for item in scheduler.step():
            if item.token is not None:
                answers.setdefault(item.request, []).append(item.token)
            if item.finish:
                ends[item.request] = item.finish
    raise AssertionError("a request never ends")


def request(seed, length, most=8, **options):
    return Request(np.random.default_rng(seed).integers(0, 300, length), most, **options)


LOADS = st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40), st.booleans()), min_size=1, max_size=12)


# answers must go on while the first prompt waits for blocks, however long it has waited
BLOCKED = [(118, 27, False), (13, 17, True), (138, 30, False), (120, 27, True), (129, 6, False), (13, 30, False)]


@given(LOADS, st.integers(1, 80), st.integers(13, 40), st.lists(st.integers(0, 11), max_size=3))
@example([*BLOCKED, (116, 38, True), (71, 25, True)], 10, 25, [])
@settings(max_examples=50)
def test_whatever_comes_answers_are_those_of_a_request_alone(toy, loads, budget, blocks, cancelled):
    engine = CountingEngine(toy().architecture, blocks)
    scheduler = Scheduler(engine, budget=budget, clock=Clock())
    requests = {}
    for seed, (length, most, interactive) in enumerate(loads):
        item = request(seed, length, most, interactive=interactive)
        requests[scheduler.submit(item)] = item
    for _ in range(3):
        scheduler.step()
    given_up = {number for number in cancelled if number in requests and scheduler.cancel(number)}
    answers, ends = finished(scheduler)
    assert engine.blocks.free == blocks
    assert all(sum(step.values()) <= budget for step in engine.chosen)
    for number, item in requests.items():
        if number not in given_up and number in ends:
            expected = alone(item.prompt.tolist(), item.most_tokens)
            assert answers.get(number, []) == expected[len(expected) - len(answers.get(number, [])) :]
            assert ends[number] == "length"


def test_an_answer_ends_at_its_end_token(architecture):
    engine = CountingEngine(architecture, 20)
    item = request(1, 10, 50)
    whole = alone(item.prompt.tolist(), 50)
    scheduler = Scheduler(engine)
    number = scheduler.submit(Request(item.prompt, 50, ends=frozenset({whole[7]})))
    answers, ends = finished(scheduler)
    assert answers[number] == whole[: whole.index(whole[7])]
    assert ends[number] == "stop"


def test_a_long_prompt_does_not_stop_answers(architecture):
    engine = CountingEngine(architecture, 120)
    scheduler = Scheduler(engine, budget=32, clock=Clock())
    chats = [scheduler.submit(request(seed, 4, 60)) for seed in range(3)]
    for _ in range(5):
        scheduler.step()
    long = scheduler.submit(request(9, 1000, 1))
    engine.chosen.clear()
    while long in [item.number for item in (*scheduler._running, *scheduler._waiting)]:
        scheduler.step()
    assert all(step.get(chat) == 1 for step in engine.chosen[:-1] for chat in chats)
    assert [step[long] for step in engine.chosen[:-1]] == [29] * (len(engine.chosen) - 1)


def test_answers_that_fill_the_budget_take_turns_and_leave_a_prompt_its_chunk(architecture):
    engine = CountingEngine(architecture, 127)
    scheduler = Scheduler(engine, budget=20, clock=Clock())
    chats = [scheduler.submit(request(seed, 1, 200)) for seed in range(40)]
    while len(scheduler._waiting):
        scheduler.step()
    prompt = scheduler.submit(request(99, 64, 1))
    engine.chosen.clear()
    for _ in range(40):
        scheduler.step()
    served = [sum(step.get(chat, 0) for step in engine.chosen) for chat in chats]
    assert max(served) - min(served) <= 2
    chunks = [number for number, step in enumerate(engine.chosen) if prompt in step]
    assert sum(step.get(prompt, 0) for step in engine.chosen) == 64
    assert max(np.diff([-1, *chunks])) <= PATIENCE + 2
    assert engine.chosen[chunks[0]][prompt] == LEAST_CHUNK


def test_interactive_prompts_go_first_until_batch_work_has_waited(architecture):
    clock = Clock()
    engine = CountingEngine(architecture, 120)
    scheduler = Scheduler(engine, budget=16, clock=clock)
    batch = scheduler.submit(request(0, 160, 1, interactive=False))
    chat = scheduler.submit(request(1, 160, 1))
    scheduler.step()
    assert list(engine.chosen[-1]) == [chat]
    clock.now += 3600
    other = scheduler.submit(request(2, 160, 1))
    scheduler.step()
    while chat in [item.number for item in scheduler._running]:
        scheduler.step()
    scheduler.step()
    assert batch in engine.chosen[-1]
    assert other not in engine.chosen[-1]


def test_who_gives_blocks_back_is_computed_again_to_the_same_tokens(architecture):
    engine = CountingEngine(architecture, 16)
    scheduler = Scheduler(engine, budget=64, clock=Clock())
    requests = {scheduler.submit(item): item for item in (request(seed, 40, 90) for seed in range(4))}
    answers, _ = finished(scheduler)
    assert scheduler.preempted > 0
    for number, item in requests.items():
        assert answers[number] == alone(item.prompt.tolist(), 90)
    assert engine.blocks.free == 16


def test_a_request_that_can_never_be_answered_is_refused(architecture):
    scheduler = Scheduler(CountingEngine(architecture, 10))
    with pytest.raises(EdgekitError, match="both need at least 1"):
        scheduler.submit(request(0, 0))
    with pytest.raises(EdgekitError, match="the model's context is 2048"):
        scheduler.submit(request(0, 2000, 49))
    with pytest.raises(EdgekitError, match="need 11 blocks, and the cache has 10"):
        scheduler.submit(request(0, 100, 61))


def test_a_prompt_that_no_engine_can_compute_is_refused_at_once(architecture):
    scheduler = Scheduler(CountingEngine(architecture, 10))
    for prompt, problem in ((np.array([307]), "outside 0 to 306"), (np.array([1.5]), "expected")):
        with pytest.raises(EdgekitError, match=problem):
            scheduler.submit(Request(prompt, 5))
    assert not scheduler.busy


def test_a_budget_beyond_the_most_rows_of_the_engine_is_cut(architecture):
    engine = CountingEngine(architecture, 20)
    engine.rows = 16
    scheduler = Scheduler(engine, budget=1000)
    number = scheduler.submit(request(0, 60))
    answers, _ = finished(scheduler)
    assert answers[number] == alone(request(0, 60).prompt.tolist(), 8)
    assert max(sum(step.values()) for step in engine.chosen) == 16


def test_a_chat_does_not_wait_for_a_long_prompt_of_batch_work_that_has_begun(architecture):
    engine = CountingEngine(architecture, 120)
    scheduler = Scheduler(engine, budget=16, clock=Clock())
    scheduler.submit(request(0, 1000, 1, interactive=False))
    scheduler.step()
    chat = scheduler.submit(request(1, 10, 1))
    scheduler.step()
    assert engine.chosen[-1][chat] == 10


def test_a_request_may_be_cancelled_between_two_layers(architecture):
    engine = CountingEngine(architecture, 40)
    scheduler = Scheduler(engine, budget=64, clock=Clock())
    requests = [request(seed, 20, 12) for seed in range(3)]
    numbers = [scheduler.submit(item) for item in requests]
    scheduler.step()
    produced = scheduler.step(lambda layer: scheduler.cancel(numbers[1]))
    assert [item.request for item in produced] == [numbers[0], numbers[2]]
    assert not scheduler.cancel(numbers[1])
    answers, _ = finished(scheduler)
    for number, item in ((numbers[0], requests[0]), (numbers[2], requests[2])):
        assert answers[number] == alone(item.prompt.tolist(), 12)[2:]
    assert engine.blocks.free == 40


@pytest.mark.parametrize("where", ["between", "behind"])
def test_after_a_step_that_failed_the_answers_are_the_same(architecture, where):
    engine = (FailingEngine if where == "behind" else CountingEngine)(architecture, 40)
    scheduler = Scheduler(engine, budget=24, clock=Clock())
    requests = [request(seed, 30, 12) for seed in range(3)]
    numbers = [scheduler.submit(item) for item in requests]
    produced = [*scheduler.step(), *scheduler.step()]

    def fail(layer):
        raise MemoryError

    with pytest.raises(MemoryError):
        scheduler.step(fail if where == "between" else None)
    engine.chosen.append({})
    answers, _ = finished(scheduler)
    for number, item in zip(numbers, requests, strict=True):
        before = [p.token for p in produced if p.request == number]
        assert before + answers[number] == alone(item.prompt.tolist(), 12)
    assert engine.blocks.free == 40


@compiler
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_a_real_network_gives_the_same_bits_under_random_schedules(toy, kv):
    model, rng = toy("llama", "Q4_1"), np.random.default_rng(3)
    asked = [
        Request(rng.integers(0, 307, rng.integers(1, 90)), 12, Sampling(temperature=float(seed % 2), seed=seed))
        for seed in range(10)
    ]
    expected = {}
    with closing(NativeEngine(model, blocks=40, kv=kv, threads=1)) as engine:
        for number, item in enumerate(asked):
            scheduler = Scheduler(engine, budget=512)
            scheduler.submit(item)
            expected[number] = [(p.token, p.logits.tobytes()) for p in iter(scheduler) if p.token is not None]
    for budget, blocks, threads in ((1, 40, 1), (7, 16, 2), (64, 12, 2), (200, 40, 2)):
        with closing(NativeEngine(model, blocks=blocks, kv=kv, threads=threads)) as engine:
            scheduler = Scheduler(engine, budget=budget)
            for item in asked:
                scheduler.submit(item)
            found = {}
            for p in iter(scheduler):
                if p.token is not None:
                    found.setdefault(p.request, []).append((p.token, p.logits.tobytes()))
            assert found == expected
            assert engine.blocks.free == engine.blocks.number
