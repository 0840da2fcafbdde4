"""Several answers to one prompt, and the log probabilities of their tokens."""

import json
from contextlib import closing

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from runtimes.llm.answers import scored
from runtimes.llm.engine import Item
from runtimes.llm.model import load
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.request import Request
from runtimes.llm.sampling import Sampling
from runtimes.llm.scheduler import Scheduler
from tests.gguf_files import toy_model
from tests.runtimes.llm.conftest import compiler
from tests.runtimes.llm.copying import CopyingEngine, ForgetfulEngine, alone
from tests.runtimes.llm.test_scheduler import Clock, finished, request

HOT = Sampling(2.0, seed=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with load(toy_model(tmp_path_factory.mktemp("model"), "llama", "Q8_0"), engine="torch", dtype="float64") as found:
        yield found


def test_log_probabilities_are_those_of_the_logits():
    logits = np.log(np.array([0.1, 0.4, 0.05, 0.4, 0.05]))
    found = scored(logits.astype(np.float32) + 7, 0, 4)
    assert found.logprob == pytest.approx(np.log(0.1), rel=1e-6)
    assert [number for number, _ in found.best] == [1, 3, 0, 2]
    assert [logprob for _, logprob in found.best] == pytest.approx(np.log([0.4, 0.4, 0.1, 0.05]), rel=1e-6)
    assert scored(logits, 2, 0).best == ()
    assert len(scored(logits, 2, 99).best) == 5


def test_each_token_of_an_answer_has_the_log_probability_that_the_model_gives_it(model):
    (answer,) = model.answers("in the", logprobs=3, most_tokens=12, sampling=HOT)
    prompt = model.tokenizer.encode("in the").tolist()
    ids = [token.id for token in answer.tokens]
    logits = model.engine.step([Item(-9, np.array(prompt + ids), logits="all")])[0].astype(np.float64)
    model.engine.remove(-9)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, token in zip(logprobs[len(prompt) - 1 :], answer.tokens, strict=False):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        assert [number for number, _ in token.best] == np.argsort(-row)[:3].tolist()
    assert answer.logprob == pytest.approx(sum(token.logprob for token in answer.tokens))
    assert answer.logprob < -1
    assert answer.finish == "length"


def test_several_answers_are_those_of_their_seeds(model):
    found = model.answers("in the then", n=4, most_tokens=15, sampling=HOT)
    expected = [
        "".join(model.complete("in the then", most_tokens=15, sampling=Sampling(2.0, seed=seed)))
        for seed in (4, 5, 6, 7)
    ]
    assert [answer.text for answer in found] == expected
    assert len(set(expected)) == 4
    assert model.engine.blocks.free == model.engine.blocks.number


def test_a_stop_text_and_a_constraint_end_answers(model):
    (whole,) = model.answers("in the", most_tokens=30)
    stop = whole.text[5:8]
    (found,) = model.answers("in the", most_tokens=30, stop=[stop])
    assert (found.text, found.finish) == (whole.text[: whole.text.index(stop)], "stop")
    (found,) = model.answers("in the", regex="[ab]{4}")
    assert (len(found.text), found.finish) == (4, "stop")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"n": 0}, "n = 0"),
        ({"n": 3}, "temperature = 0 would give one answer 3 times"),
        ({"logprobs": -1}, "logprobs = -1"),
        ({"drafts": -1}, "drafts = -1"),
        ({"stop": [""]}, "stop text is empty"),
    ],
)
def test_options_that_mean_nothing_are_refused(model, options, problem):
    with pytest.raises(EdgekitError, match=problem):
        model.answers("in", **options)
    assert model.engine.blocks.free == model.engine.blocks.number


# --- the prompt is computed once


@pytest.mark.parametrize("kind", [CopyingEngine, ForgetfulEngine])
@pytest.mark.parametrize(("length", "blocks", "budget"), [(100, 60, 64), (1, 60, 64), (97, 12, 16), (16, 11, 5)])
def test_requests_with_a_leader_share_its_prompt(toy, kind, length, blocks, budget):
    engine = kind(toy().architecture, blocks)
    scheduler = Scheduler(engine, budget=budget, clock=Clock())
    item = request(3, length, 50, drafts=0)
    numbers = [scheduler.submit(item)]
    numbers += [scheduler.submit(item, numbers[0]) for _ in range(3)]
    answers, _ = finished(scheduler)
    assert [answers[number] for number in numbers] == [alone(item.prompt.tolist(), 50)] * 4
    assert engine.blocks.free == blocks
    if kind is CopyingEngine and not scheduler.preempted:
        computed = sum(sum(step.values()) for step in engine.chosen)
        assert computed == length + 3 + 4 * 49  # of each copy, the last token of the prompt


def test_without_a_leader_the_prompt_is_computed_for_each(toy):
    engine = CopyingEngine(toy().architecture, 60)
    scheduler = Scheduler(engine, budget=64, clock=Clock())
    for _ in range(4):
        scheduler.submit(request(3, 100, 50, drafts=0))
    finished(scheduler)
    assert sum(sum(step.values()) for step in engine.chosen) > 100 + 3 + 4 * 49


@compiler
@pytest.mark.parametrize("kv", ["f16", "int4"])
def test_a_real_network_gives_the_same_bits_behind_a_shared_prompt(toy, kv):
    prompt, found = np.random.default_rng(2).integers(0, 307, 70), []
    for shared in (False, True):
        with closing(NativeEngine(toy("llama", "Q4_1"), blocks=80, kv=kv, threads=1)) as engine:
            scheduler = Scheduler(engine, budget=32, clock=Clock())
            first = scheduler.submit(Request(prompt, 150, Sampling(1.0)))
            for seed in range(1, 4):
                scheduler.submit(Request(prompt, 150, Sampling(1.0, seed=seed)), first if shared else None)
            produced = [p for p in scheduler if p.token is not None]
            assert engine.blocks.free == engine.blocks.number
        answers = {}
        for p in produced:
            answers.setdefault(p.request, []).append((p.token, p.logits.tobytes()))
        found.append(answers)
    assert found[0] == found[1]
    assert len({tuple(token for token, _ in answer) for answer in found[0].values()}) == 4


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_copies_go_on_without_a_leader_that_was_cancelled(toy, steps):
    engine = CopyingEngine(toy().architecture, 60)
    scheduler = Scheduler(engine, budget=64, clock=Clock())
    item = request(3, 100, 20)
    first = scheduler.submit(item)
    copies = [scheduler.submit(item, first) for _ in range(2)]
    for _ in range(steps):
        scheduler.step()
    assert scheduler.cancel(first)
    answers, _ = finished(scheduler)
    expected = alone(item.prompt.tolist(), 20)
    assert all(answers[number] == expected[-len(answers[number]) :] for number in copies)
    assert engine.blocks.free == 60


# --- commands


def test_complete_writes_several_answers_and_log_probabilities(edgekit, model):
    common = ["llm", "complete", str(model.source.path), "in the", "--engine", "torch", "--max-tokens", "4"]
    hot = ["--temperature", "2", "-n", "2"]
    plain = edgekit(*common, *hot)
    assert plain.status == 0
    assert plain.out.startswith("--- answer 1, seed 0\n")
    assert "--- answer 2, seed 1\n" in plain.out
    found = json.loads(edgekit(*common, *hot, "--logprobs", "2", "--json").out)
    assert [len(answer["tokens"]) for answer in found["answers"]] == [4, 4]
    token = found["answers"][0]["tokens"][0]
    assert len(token["best"]) == 2
    assert token["logprob"] <= token["best"][0]["logprob"] < 0
    assert edgekit(*common, "--logprobs", "2").status == 2
    assert edgekit(*common, "-n", "2").status == 1
