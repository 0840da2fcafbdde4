"""What tools/bench_llm.py computes from times, with times that are known."""

import json

import numpy as np
import pytest

from edgekit.cost.timing import in_turns
from tests.conftest import ROOT
from tools.bench_llm import PARTS, ROWS, SHORT, Bench, Row, compared, table

OURS = ["native f16", "native int8", "native int4"]


def times(slow=1.0, noise=0.05, rounds=41):
    """Return the seconds of each engine in turns: all grow and shrink together, as on a machine that others use."""
    rng = np.random.default_rng(0)
    seconds = {"native f16": 0.004 * slow, "native int8": 0.0038, "native int4": 0.003}
    seconds |= {"llama.cpp, flash attention off": 0.012, "llama.cpp, flash attention on": 0.010}
    load = iter(np.repeat(rng.uniform(1, 4, rounds + 2), len(seconds)) * rng.normal(1, noise, 5 * (rounds + 2)))
    calls = [lambda value=value: (value * next(load),) for value in seconds.values()]
    taken = in_turns(calls, least=rounds, most=rounds)[:, :, 0]
    return dict(zip(seconds, taken.T, strict=True))


def test_ratios_are_those_to_the_best_of_each_of_the_others():
    found = compared(times(), OURS, {"ik_llama.cpp, f16 cache": 0.02, "ik_llama.cpp, q8_0 cache": 0.0163})
    ratios = found["times of llama.cpp"]
    assert ratios["best"] == "llama.cpp, flash attention on"
    assert ratios["native f16"] == pytest.approx(2.5, rel=0.05)
    assert ratios["native int4"] == pytest.approx(3.33, rel=0.05)
    assert found["times of ik_llama.cpp"]["best"] == "ik_llama.cpp, q8_0 cache"
    assert found["ms"]["ik_llama.cpp, q8_0 cache"] == 16.3


def test_a_planted_slow_down_of_a_tenth_shows_although_the_machine_is_four_times_slower_at_times():
    before, after = (compared(times(slow), OURS, {})["times of llama.cpp"] for slow in (1.0, 1.1))
    assert after["native f16"] / before["native f16"] == pytest.approx(1 / 1.1, rel=0.01)
    assert after["native int8"] == before["native int8"]


def test_no_ratio_is_given_without_another_engine():
    found = compared({name: taken for name, taken in times().items() if name in OURS}, OURS, {})
    assert list(found) == ["ms"]


def test_the_table_says_what_the_report_says():
    row = {"row": "1 token at 128", "share of the memory bound": {"native f16": 0.61}}
    row |= compared(times(), OURS, {})
    report = {"parts": {"a model": {"clock": "CPU", "threads": 1, "rows": [row]}}}
    line = table(report).splitlines()[-1]
    assert line.startswith("| 1 token at 128 | ")
    assert f"{row['times of llama.cpp']['native int4']:.2f}" in line
    assert "61%" in line


class FakeEngine:
    """Counts the tokens of sequences."""

    class architecture:  # noqa: N801
        vocabulary = 100

    def __init__(self):
        self.lengths, self.steps = {}, []
        self.blocks = self
        self.tables = self.lengths

    def length(self, sequence):
        return self.lengths.get(sequence, 0)

    def step(self, items):
        self.steps.append([len(item.inputs) for item in items])
        for item in items:
            self.lengths[item.sequence] = self.length(item.sequence) + len(item.inputs)

    def truncate(self, sequence, length):
        self.lengths[sequence] = length
        return length

    def remove(self, sequence):
        del self.lengths[sequence]


def test_each_row_times_the_step_that_it_names():
    engine = FakeEngine()
    bench = Bench(engine)
    for row in ROWS:
        bench.prepare(row)
        before = dict(engine.lengths)
        assert {q: n for q, n in before.items() if n} == {i: n for i, (n, _) in enumerate(row.sequences) if n}
        engine.steps.clear()
        assert all(seconds >= 0 for seconds in bench.run(row))
        assert sum(map(sum, engine.steps)) == sum(tokens for _, tokens in row.sequences)
        assert max(map(sum, engine.steps)) <= 512
        assert {q: n for q, n in engine.lengths.items() if n} == {q: n for q, n in before.items() if n}


def test_a_row_whose_names_lie_would_be_found():
    engine = FakeEngine()
    bench = Bench(engine)
    bench.prepare(Row("1 token at 2,048", [(128, 1)]))
    assert engine.lengths == {0: 128}
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)
    assert {row.name for row in SHORT} < {row.name for row in ROWS}


def test_the_published_table_is_the_stored_report():
    report = json.loads((ROOT / "benchmarks" / "llm.json").read_text())
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert table(report).strip() in text
    report["parts"]["SmolLM2 Q4_1"]["rows"][0]["ms"]["native f16"] *= 1.01
    assert table(report).strip() not in text
